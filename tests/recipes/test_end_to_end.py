"""The whole path as users walk it, in real processes: run, kill, resume, two processes, publish, load without us."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import UNET, tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
TIMING = {"seconds", "images_per_second", "peak_memory_gib"}
LEARNED = {"type": "infonoise", "warmup": 48, "ramp": 48, "refresh_every": 32, "buffer": 100}
STILL = {**UNET, "config": {**UNET["config"], "dropout": 0.0}}


def write(folder: Path, recipe: dict, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


def call(*command: object, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, **options}
    return subprocess.run([str(part) for part in command], **options)


def entrecipes(*arguments: object, **options) -> subprocess.CompletedProcess:
    return call(sys.executable, "-m", "entrecipes", *arguments, **options)


def rows(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines if line["kind"] == kind]


def hashes(folder: Path) -> dict[str, str]:
    """Of the final weights, average and optimizer, and of the published pipeline's weights."""
    last = sorted(folder.glob("checkpoints/images-*"))[-1]
    files = [*last.glob("*.safetensors"), *folder.glob("pipeline/*/*.safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny run, its noise schedule learned, that went through in one piece."""
    folder = tmp_path_factory.mktemp("finished")
    done = entrecipes("run", write(folder, tiny(noise=LEARNED)), f"training.output={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_everything_and_says_where(finished):
    for name in ("recipe.yaml", "recipe.source.yaml", "metrics.jsonl", "run.json", "report.html", "README.md",
                 "samples/final.png", "pipeline/model_index.json", "pipeline/README.md"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    index = json.loads((finished / "pipeline/model_index.json").read_text())
    assert {library for library, _ in (v for v in index.values() if isinstance(v, list))} == {"diffusers"}
    assert rows(finished, "start")[0]["world_size"] == 1
    assert len(rows(finished, "train")) == 10 and len(rows(finished, "held_out")) == 4


def test_the_snippet_of_the_card_runs_without_entrecipes(finished, tmp_path):
    """A stranger's process: plain diffusers, and entrecipes can't be imported."""
    card = (finished / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    (tmp_path / "entrecipes.py").write_text("raise ImportError('entrecipes must not be needed')")
    (tmp_path / "snippet.py").write_text(snippet)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    blocked = call(sys.executable, "-c", "import entrecipes", env=environment, cwd=tmp_path)
    assert "must not be needed" in blocked.stderr
    for place in (finished, finished.parent):  # the snippet names the folder as the card's reader sees it
        done = call(sys.executable, tmp_path / "snippet.py", env=environment, cwd=place)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr


def test_generate_and_evaluate_take_the_run(finished, tmp_path):
    done = entrecipes("generate", finished, "-n", 4, "--labels", "3,7", "--steps", 2, "-o", tmp_path / "grid.png")
    assert done.returncode == 0 and (tmp_path / "grid.png").exists(), done.stderr
    done = entrecipes("evaluate", finished, "-o", tmp_path / "numbers.json")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "numbers.json").read_text())[0]
    assert measured["value"] == pytest.approx(rows(finished, "held_out")[-1]["nats"], rel=1e-4)
    done = entrecipes("generate", finished, "--labels", "12")
    assert done.returncode == 2 and "12 is not a class" in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_writes_nothing(tmp_path):
    done = entrecipes("run", write(tmp_path, tiny()), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout and "trainable of" in done.stdout and "held-out nats" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_ends_bit_equal(finished, tmp_path, kills):
    """`kill -9`, resume, again and again: weights, average, optimizer and numbers equal the uninterrupted run's."""
    recipe, folder, chance = write(tmp_path, tiny(noise=LEARNED)), tmp_path / "run", random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "entrecipes", "run", str(recipe), f"training.output={folder}"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()  # the run has begun
        time.sleep(chance.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = entrecipes("run", recipe, f"training.output={folder}")
    assert done.returncode == 0, done.stderr
    assert hashes(folder) == hashes(finished)
    for kind in ("train", "held_out", "metric", "noise"):
        assert rows(folder, kind) == rows(finished, kind)
    assert [row["images"] for row in rows(folder, "noise")] == [48, 64, 96, 128, 160]


def launch(recipe: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Two gloo processes through `accelerate launch` and the ddp config."""
    config = ROOT / "recipes/accelerate/ddp.yaml"
    return call(sys.executable, "-m", "accelerate.commands.launch", "--config_file", config,
                ROOT / "scripts/train.py", recipe, f"training.output={folder}", *overrides)  # fmt: skip


def test_two_processes_follow_the_curve_of_one_and_resume(tmp_path):
    recipe = write(tmp_path, tiny(STILL, noise=LEARNED, training={"images": 320, "checkpoint_every": 144}))
    one, two = tmp_path / "one", tmp_path / "two"
    done = entrecipes("run", recipe, f"training.output={one}")
    assert done.returncode == 0, done.stderr
    done = launch(recipe, two)
    assert done.returncode == 0, done.stderr
    assert rows(two, "start")[0]["world_size"] == 2, "the launch must really have run two processes"
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (one, two)]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    tables = [[row["density"] for row in rows(folder, "noise")] for folder in (one, two)]
    assert len(tables[0]) == len(tables[1]) == 10
    for table, same in zip(*tables, strict=True):
        assert table == pytest.approx(same, rel=1e-2), "both processes' errors make one table"
    nats = [[row["nats"] for row in rows(folder, "held_out")] for folder in (one, two)]
    assert nats[1] == pytest.approx(nats[0], rel=1e-4) and nats[1][-1] < nats[1][0], "the average must move in both"

    coarse = write(
        tmp_path,
        tiny(STILL, noise=LEARNED, training={"images": 160, "checkpoint_every": 112, "log_every": 80}),
        "coarse.yaml",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    middle = whole / "checkpoints/images-000000000112"  # of a log window
    for changed in ([f"training.output={whole}"], [f"training.output={resumed}", f"training.resume={middle}"]):
        done = entrecipes("run", coarse, *changed, "--accelerate", "ddp")  # the same launch, spelled the short way
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done:") == 1, "of several processes one speaks"
    start = rows(resumed, "start")[0]
    assert (start["images"], start["world_size"]) == (112, 2)
    assert rows(resumed, "train")[-1]["loss"] == pytest.approx(rows(whole, "train")[-1]["loss"], abs=1e-6)


def test_a_users_mistakes_exit_with_2_and_one_message(tmp_path):
    done = entrecipes("run", write(tmp_path, tiny(data={"type": "folder", "path": str(tmp_path / "none")})))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "none") in done.stderr
    done = entrecipes(
        "run", write(tmp_path, tiny()), "training.resume=nowhere/images-1", f"training.output={tmp_path}/x"
    )
    assert done.returncode == 2 and "nowhere/images-1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("engine", "said"),
    [({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: it takes"), ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1: set")],
)
def test_engines_that_can_not_be_used_are_refused_by_name(tmp_path, engine, said):
    done = entrecipes("run", write(tmp_path, tiny()), "--dry-run", env={**ENVIRONMENT, **engine})
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on(tmp_path):
    recipe, folder = write(tmp_path, tiny(training={"images": 3200, "checkpoint_every": None})), tmp_path / "run"
    command = [sys.executable, "-m", "entrecipes", "run", str(recipe), f"training.output={folder}"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while '"kind": "train"' not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in error and "Traceback" not in error
    stopped = int(next(folder.glob("checkpoints/images-*")).name.split("-")[1])
    done = entrecipes("run", recipe, f"training.output={folder}", f"training.images={stopped + 160}")
    assert done.returncode == 0, done.stderr
    assert [row["images"] for row in rows(folder, "start")] == [0, stopped]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]
