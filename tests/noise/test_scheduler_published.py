"""What a run with InfoNoise leaves, and loading it in another process: by name, and with trust_remote_code."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from scheduler_case import ours, profile
from tiny import tiny

from entrecipes import InfoNoiseScheduler, SequencePipeline, SequenceTransformer1DModel
from entrecipes.diffusion.pipelines import load_components
from entrecipes.errors import UserError
from entrecipes.hub import export_shim
from entrecipes.recipe.load import load
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.training.launch import run_recipe

NOISE = {"type": "infonoise", "warmup": 32, "ramp": 0, "refresh_every": 32, "base": {"type": "log_normal"}}

STRANGER = """
import sys
from diffusers import DiffusionPipeline

def load(name, **options):
    pipeline = DiffusionPipeline.from_pretrained(name, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

assert type(load("run/pipeline").scheduler).__name__ == "EDMEulerScheduler"
for shim in ("shim", "shim of sequences"):
    try:
        load(shim)
        raise SystemExit(f"{shim} was loaded without trust")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
assert "entrecipes" not in sys.modules
images = load("shim", trust_remote_code=True)
assert images.scheduler.profile is not None and images.scheduler.settings["pivot"], images.scheduler
assert len(images(batch_size=2, class_labels=[1, 2], num_inference_steps=3, output_type="np").images) == 2
assert load("shim of sequences", trust_remote_code=True)(2, num_inference_steps=2).sequences[1]
images.save_pretrained("by name")

import entrecipes
again = load("by name")
assert type(again.scheduler) is entrecipes.InfoNoiseScheduler and again.scheduler.profile is not None
again.save_pretrained("by name again")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run in `run`."""
    folder = tmp_path_factory.mktemp("published")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny(noise=NOISE, evaluation={"every": None, "grid": 1, "steps": 2})))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    run_recipe(load(str(recipe), [f"training.output={folder / 'run'}"]))
    return folder


def test_a_run_leaves_what_it_learned_twice(folder: Path) -> None:
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "noise"][-1]
    for place in (run, run / "pipeline"):
        scheduler = InfoNoiseScheduler.from_pretrained(place, subfolder="infonoise")
        assert scheduler.settings["base_class"] == "EDMEulerScheduler" and scheduler.settings["train_images"] == 160
        assert scheduler.settings["pivot"] == last["pivot"] and scheduler.learning.base.type == "log_normal"
        assert scheduler.profile.x0_error.tolist() == pytest.approx(last["x0_error"], rel=1e-3)
        scheduler.set_timesteps(5)
        assert scheduler.sigmas[0] == pytest.approx(80) and scheduler.sigmas[-2] == pytest.approx(0.002)
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]


def test_the_card_says_how_to_load_it(folder: Path) -> None:
    card = (folder / "run" / "README.md").read_text()
    snippet = next(part for part in card.split("```python\n") if part.startswith("from entrecipes")).split("```")[0]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "run" / "pipeline")
    exec(snippet, {"pipeline": pipeline})
    assert type(pipeline.scheduler) is InfoNoiseScheduler and pipeline.scheduler.profile is not None


def test_other_processes_load_it_by_name_or_with_trust(folder: Path) -> None:
    sequences = SequencePipeline(
        SequenceTransformer1DModel(sample_size=8, alphabet="ab", num_layers=1, num_attention_heads=2),
        ours("edm", profile=profile()),
    )
    sequences.save_pretrained(folder / "sequences")
    export_shim(folder / "run" / "pipeline", folder / "shim")
    export_shim(folder / "sequences", folder / "shim of sequences")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf")}
    command = [sys.executable, "-c", STRANGER]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("by name", "by name again"):
        index = json.loads((folder / name / "model_index.json").read_text())
        assert index["scheduler"] == ["entrecipes", "InfoNoiseScheduler"]
    trained_on = load_components(Pipeline(pretrained=str(folder / "by name")))  # what it would publish is stock again
    assert type(trained_on.scheduler) is diffusers.EDMEulerScheduler and trained_on.path.name == "edm"


def test_what_can_not_be_exported_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pipeline.*pipeline/ folder"):
        export_shim(folder / "run", tmp_path / "new")
    with pytest.raises(UserError, match="exists already"):
        export_shim(folder / "run" / "pipeline", tmp_path)
    model = diffusers.UNet2DModel.from_pretrained(folder / "run" / "pipeline" / "unet")
    diffusers.DDPMPipeline(model, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match="nothing in it comes from entrecipes"):
        export_shim(tmp_path / "stock", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_script_compares_grids(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = Path(__file__).parents[2] / "scripts" / "compare_grids.py"
    changes = ["evaluation.metrics=[kid, precision_recall]", "evaluation.samples=10"]
    options = ["--steps", "2", "3", "--seeds", "2", "--grids", "base", "rescaled", "--json", str(folder / "grids.json")]
    monkeypatch.setattr(sys, "argv", [str(script), str(folder / "run"), *changes, *options])
    runpy.run_path(str(script))["main"]()
    said, found = capsys.readouterr().out, json.loads((folder / "grids.json").read_text())
    assert found["profile"] == "learned by the run" and found["stock"] == "EDMEulerScheduler"
    rows = [row for row in found["rows"] if row["metric"] == "kid_efflite0_10"]
    # two steps are the ends of every grid, at first order both; three differ by grid and order
    assert len(rows) == 2 * 2 * 2 and len({tuple(row["values"]) for row in rows}) == 1 + 2 * 2
    assert "| kid_efflite0_10, order 2 | 2 steps | 3 steps |" in said and said.count("| stock | ") == 2 * 3


def test_nothing_is_written_before_anything_was_learned(tmp_path: Path) -> None:
    scheduler = ours("edm", train_images=1000)
    scheduler.sample_timesteps(4)
    scheduler._learner.publish(tmp_path, scheduler.base)
    assert not any(tmp_path.iterdir()) and torch.isfinite(scheduler.timesteps).all()
