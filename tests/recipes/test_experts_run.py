"""A TDC run in real processes: all stages, killed in each of them, taken apart, loaded by plain diffusers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_end_to_end import ENVIRONMENT, call, entrecipes, hashes, launch, rows, write
from tiny import DIT, FLOW, UNET, tiny

from entrecipes.cli import main

SEARCH = {
    "rounds": 2,
    "candidates": 2,
    "recovery": {"steps": 1, "batch_size": 4},
    "draws": {"images": 4, "noise_levels": 4},
    "tolerance": 0.1,
}
TDC = {"type": "tdc", "groups": 2, "k": 0.7, "search": SEARCH}
VP = {"class": "DDIMScheduler", "config": {"beta_schedule": "squaredcos_cap_v2"}}
WIDE = {**UNET, "config": {**UNET["config"], "block_out_channels": [16, 16], "norm_num_groups": 8}}
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 4}}


def unet(**changes):
    sections = {"experts": TDC, "training": {"images": 480}} | changes
    return tiny(WIDE, VP, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tdc")
    done = entrecipes("run", write(folder, unet()), f"training.output={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def parts(folder: Path) -> dict[str, dict[str, str]]:
    """What each part's newest checkpoint holds."""
    return {name: hashes(folder / name) for name in ("base", "experts/0", "experts/1")}


def trials(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "search/memory.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_what_a_run_leaves(finished):
    plan = json.loads((finished / "search/plan.json").read_text())
    small, large = plan["groups"]
    assert (
        large["ratio"] == 1
        and large["flops"] == plan["base_flops"]
        and large["kept"] == [unit["atoms"] for unit in plan["units"]]
    )
    assert small["flops"] == pytest.approx(0.85 * plan["base_flops"], rel=0.1)
    training = plan["costs"]["training_flops"]
    spent = 3 * sum(group["images"] * group["flops"] for group in plan["groups"])
    assert training["experts"] == spent
    assert 0.9 * training["budget"] < training["total"] <= training["budget"]
    facts = json.loads((finished / "run.json").read_text())
    assert facts["experts"]["groups"] == plan["groups"] and facts["pipeline"]["class"] == "ExpertsPipeline"
    for name in ("README.md", "report.html", "samples/final.png", "metrics.jsonl", "pipeline/model_index.json"):
        assert (finished / name).is_file(), name
    held_out = rows(finished, "held_out")
    assert [row["images"] for row in held_out][-1] == 480


def test_another_process_loads_each_part(finished, tmp_path):
    (tmp_path / "entrecipes.py").write_text("raise ImportError('entrecipes must not be needed')")
    (tmp_path / "load.py").write_text(
        "import torch\nfrom diffusers import DiffusionPipeline, UNet2DModel\n"
        f"folder = {str(finished)!r}\n"
        "pipeline = DiffusionPipeline.from_pretrained(\n"
        "    folder + '/pipeline', custom_pipeline=folder + '/pipeline', trust_remote_code=True)\n"
        "images = pipeline(class_labels=[1, 2], num_inference_steps=3, output_type='pt',\n"
        "    generator=torch.Generator().manual_seed(0)).images\n"
        "assert images.shape == (2, 1, 8, 8) and images.isfinite().all()\n"
        "inputs = torch.randn(2, 1, 8, 8), torch.tensor(900), torch.tensor([1, 2])\n"
        "with torch.no_grad():\n"
        "    for number in range(2):\n"
        "        stock = UNet2DModel.from_pretrained(f'{folder}/stock/expert_{number}')\n"
        "        expert = pipeline.denoiser.experts[number]\n"
        "        torch.testing.assert_close(stock(*inputs).sample, expert(*inputs).sample)\n"
        "print(type(expert).__name__)\n"
    )
    done = call(sys.executable, tmp_path / "load.py", env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr and "not used" not in done.stderr


def test_killed_in_every_stage_the_run_ends_bit_equal(finished, tmp_path):
    recipe, folder = write(tmp_path, unet()), tmp_path / "run"
    for part in ("base", "expert 0", "expert 1"):
        kill_at(recipe, folder, lambda line, part=part: f'"part": "{part}"' in line and '"train"' in line, 4)
        assert not (folder / "run.json").exists()
    done = entrecipes("run", recipe, f"training.output={folder}")
    assert done.returncode == 0, done.stderr
    assert parts(folder) == parts(finished) and trials(folder) == trials(finished)
    assert rows(folder, "held_out")[-1] == rows(finished, "held_out")[-1]


def test_a_killed_search_goes_on_from_its_memory_bank(finished, tmp_path):
    recipe, folder = write(tmp_path, unet()), tmp_path / "run"
    for name in ("base", "search", "recipe.yaml", "base.yaml"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copyfile
        folder.mkdir(exist_ok=True)
        copy(finished / name, folder / name)
    (folder / "base.yaml").unlink()
    (folder / "search/plan.json").unlink()
    bank = folder / "search/memory.jsonl"
    text = bank.read_text()
    bank.write_text(text[: len(text) * 2 // 3])  # torn within a line
    recipe.write_text((finished / "recipe.yaml").read_text())
    done = entrecipes("run", recipe, f"training.output={folder}", "experts.stop_after=search")
    assert done.returncode == 0, done.stderr
    assert trials(folder) == trials(finished)
    assert not (folder / "experts/0").exists()


def test_experts_train_by_themselves(finished, tmp_path):
    recipe, folder = write(tmp_path, unet()), tmp_path / "run"
    done = entrecipes("run", recipe, f"training.output={folder}", "experts.stop_after=search")
    assert done.returncode == 0 and "entrecipes run" in done.stderr, done.stderr
    alone = entrecipes("run", folder / "experts/1.yaml")
    assert alone.returncode == 0, alone.stderr
    done = entrecipes("run", recipe, f"training.output={folder}")
    assert done.returncode == 0, done.stderr
    assert '"part": "expert 1"' not in done.stdout and '"part": "expert 0"' in done.stdout
    assert parts(folder) == parts(finished)


def test_a_dit_loses_blocks_and_learns_its_own_noise(tmp_path):
    experts = {**TDC, "by": "information", "search": {**SEARCH, "units": ["blocks", "heads"], "tolerance": 0.2}}
    noise = {"type": "infonoise", "warmup": 48, "refresh_every": 48}
    recipe = write(tmp_path, tiny(DEEP, FLOW, experts=experts, noise=noise, training={"images": 800}))
    done = entrecipes("run", recipe, f"training.output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    generated = entrecipes(
        "generate", tmp_path / "run", "--count", "2", "--steps", "2", "--output", tmp_path / "out.png"
    )
    assert generated.returncode == 0, generated.stderr


def test_a_given_base_is_not_trained_again(finished, tmp_path, capsys):
    recipe, given = write(tmp_path, unet()), f"experts.base={finished / 'base'}"
    command = ["run", str(recipe), f"training.output={tmp_path / 'run'}", given]
    done = entrecipes(*command, "experts.k=1")
    assert done.returncode == 0 and '"part": "base"' not in done.stdout, done.stderr
    assert not (tmp_path / "run/search/memory.jsonl").exists()
    assert main([*command, "experts.k=1"]) == 0
    assert '"part"' not in capsys.readouterr().out
    assert main([*command, "experts.k=0.8"]) == 2
    assert "holds another run (experts.k" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_and_train_the_same_experts(finished, tmp_path):
    done = launch(write(tmp_path, unet()), tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "search/plan.json").read_text()) for folder in (finished, tmp_path / "two"))
    assert [group["images"] for group in one["groups"]] == [group["images"] for group in two["groups"]]
    assert one["boundaries"] == two["boundaries"] and one["costs"] == two["costs"]
    assert rows(tmp_path / "two/experts/0", "start")[0]["world_size"] == 2
    nats = [rows(folder, "held_out")[-1]["nats"] for folder in (finished, tmp_path / "two")]
    assert nats[1] == pytest.approx(nats[0], rel=0.02)


MISTAKES = {
    "another recipe": (["experts.k=0.8"], "holds another run (experts.k"),
    "an unreachable budget": (["experts.k=null", "experts.ratios=[0.05, 1]", "training.output=other"], "experts"),
    "another base": (["training.output=other", "experts.base={finished}/experts/0"], "experts.base"),
    "no base": (["training.output=other", "experts.base=nowhere"], "experts.base"),
    "pruning beside": (["prune.type=one_shot"], "prune.type: experts.type tdc"),
    "too short": (["training.output=other", "training.images=64"], "experts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_exits_with_2(finished, tmp_path, mistake, capsys):
    overrides, expected = MISTAKES[mistake]
    recipe = write(tmp_path, unet())
    said = [one.format(finished=finished).replace("=other", f"={tmp_path / 'other'}") for one in overrides]
    assert main(["run", str(recipe), f"training.output={finished}", *said]) == 2
    assert expected in capsys.readouterr().err


def kill_at(recipe: Path, folder: Path, here, count: int) -> None:
    """Start a run, and kill it when a line of its output is the count-th that `here` holds for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "entrecipes", "run", str(recipe), f"training.output={folder}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        count -= here(line)
        if not count:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
