"""A run that prunes, in real processes: killed within its stages, on two processes, loaded by plain diffusers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from test_end_to_end import ENVIRONMENT, call, entrecipes, hashes, launch, rows, write
from tiny import DIT, FLOW, tiny

PRUNE = {
    "type": "entpruner",
    "score": "information",
    "stages": 3,
    "until": 0.7,
    "draws": {"images": 8, "noise_levels": 4},
    "vote": {"samples": 3, "batches": 2, "batch_size": 4},
    "distill": {"weight": 0.1},
}
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 6}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    done = entrecipes("run", write(folder, tiny(DEEP, FLOW, prune=PRUNE)), f"training.output={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_killed_within_its_stages_the_run_ends_bit_equal(finished, tmp_path):
    recipe, folder = write(tmp_path, tiny(DEEP, FLOW, prune=PRUNE)), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "entrecipes", "run", str(recipe), f"training.output={folder}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stages = 0
    for line in process.stdout:  # the second stage has just been carried out, and no checkpoint holds it yet
        stages += '"prune"' in line
        if stages == 2:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((folder / "checkpoints").glob("images-*")), "it goes on from between the stages"
    done = entrecipes("run", recipe, f"training.output={folder}")
    assert done.returncode == 0, done.stderr
    assert hashes(folder) == hashes(finished)
    for kind in ("train", "held_out", "metric", "prune", "event"):
        assert rows(folder, kind) == rows(finished, kind)
    records = [json.loads((place / "pruning.json").read_text()) for place in (folder, finished)]
    assert records[0]["kept"] == records[1]["kept"] and len(records[0]["kept"]) == 3


def test_two_processes_prune_the_same_blocks(finished, tmp_path):
    done = launch(write(tmp_path, tiny(DEEP, FLOW, prune=PRUNE)), tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "two", "start")[0]["world_size"] == 2
    one, two = (json.loads((folder / "pruning.json").read_text()) for folder in (finished, tmp_path / "two"))
    assert one["kept"] == two["kept"]
    assert [row["images"] for row in one["stages"]] == [row["images"] for row in two["stages"]]
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (finished, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_plain_diffusers_runs_the_pruned_pipeline(finished, tmp_path):
    (tmp_path / "entrecipes.py").write_text("raise ImportError('entrecipes must not be needed')")
    (tmp_path / "load.py").write_text(
        "import torch\nfrom diffusers import DiTPipeline\n"
        f"pipeline = DiTPipeline.from_pretrained({str(finished / 'pipeline')!r})\n"
        "assert pipeline.transformer.config.num_layers == len(pipeline.transformer.transformer_blocks) == 3\n"
        "images = pipeline([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images\n"
        "print(len(images))\n"
    )
    done = call(sys.executable, tmp_path / "load.py", env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr
    assert "newly initialized" not in done.stderr and "not used" not in done.stderr


def test_a_mistake_exits_with_2_before_training(tmp_path):
    recipe = write(tmp_path, tiny(DEEP, FLOW, prune={"type": "written", "remove": [0]}))
    done = entrecipes("run", recipe, f"training.output={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "prune.remove: block 0 can't be removed" in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()
