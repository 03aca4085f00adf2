"""`entrecipes compare` as it is typed, with real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import tiny

from entrecipes import cli

SECTIONS = {"training": {"log_every": 32}, "evaluation": {"every": 32, "held_out": {"images": 8, "noise_levels": 4}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the comparison of one arm that trains and one that diverges stands."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny(**SECTIONS)))
    command = [
        sys.executable,
        "-m",
        "entrecipes",
        "compare",
        "tiny.yaml",
        "--seeds",
        "1",
        "training.checkpoint_every=80",
    ]
    command += ["--arm", "hot", "tiny.yaml", "optimizer.learning_rate=1e30", "-o", "out", "--jobs", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_a_diverged_run_is_told_and_the_others_go_on(here):
    said = (here / "said").read_text()
    assert "tiny, seed 0: heldout_nats" in said and "after 160 images" in said
    assert "hot, seed 0: FAILED: the loss became nan within" in said
    assert "note: hot, seed 0, failed" in said and "\n  hot   not reached" in said
    assert "fewer images" in said and "out/report.html" in said
    record = json.loads((here / "out/comparison.json").read_text())
    assert record["arms"]["hot"]["runs"]["0"]["state"] == "failed"
    run = record["arms"]["tiny"]["runs"]["0"]
    assert run["images"] == [32, 64, 96, 128, 160] and run["folder"] == "out/runs/tiny/seed-0" and run["jobs"] == 2
    assert record["command"].startswith("entrecipes compare tiny.yaml training.checkpoint_every=80 --arm hot")
    assert str(here) not in json.dumps(record) and str(here) not in (here / "out/report.md").read_text()


def test_what_is_finished_is_not_run_again(here, capsys):
    pipeline = here / "out/runs/tiny/seed-0/pipeline/model_index.json"
    before = pipeline.stat().st_mtime_ns
    assert cli.main(["compare", "tiny.yaml", "--seeds", "1", "-o", "out"]) == 0
    said = capsys.readouterr().out
    assert "was there already" in said and pipeline.stat().st_mtime_ns == before
    table = [line.split()[:2] for line in said.splitlines()]
    nats = json.loads((here / "out/comparison.json").read_text())["arms"]["tiny"]["final"]["mean"]
    assert ["heldout_nats", f"{nats:.4g}"] in table


def test_equal_seconds_from_a_base_that_is_trained_first(tmp_path, monkeypatch, capfd):
    """The base, two rounds of timing two copies beside each other, and the run, each a process; then none of them."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(tiny(training={"log_every": 32, "images": 64})))
    tuned = {"extends": "base.yaml", "pipeline": {"build": None, "pretrained": "outputs/base"}}
    Path("tuned.yaml").write_text(yaml.safe_dump(tuned | {"training": {"images": "100k"}}))
    command = ["compare", "tuned.yaml", "--seeds", "1", "--seconds", "0.5", "--jobs", "2", "-o", "out"]
    assert cli.main(command) == 0
    said = capfd.readouterr().out
    assert "base base: tuned starts from outputs/base, which is trained first\nbase base: 64 images, " in said
    kept = json.loads(Path("out/budget.json").read_text())["arms"]["tuned"]
    images = round(kept["images_per_second"] * 0.5 / 16) * 16
    assert kept["images_per_second"] == max(kept["rounds"]) and kept["images"] == max(images, 16)
    assert f"after {kept['images']} images" in said and len(kept["rounds"]) == kept["jobs"] == 2
    assert json.loads(Path("out/runs/tuned/seed-0/run.json").read_text())["images"] == kept["images"]
    assert "pretrained: outputs/base" in Path("out/runs/tuned/seed-0/recipe.yaml").read_text()
    assert {path.name for path in Path("out/logs").iterdir()} == {
        "base-base-seed-0.log", "tuned-timing-1.log", "tuned-timing-2.log", "tuned-seed-0.log"
    }  # fmt: skip
    report = Path("out/report.md").read_text()
    assert "equal in seconds: 0.5 of training each" in report and "--seconds 0.5" in report
    assert "tuned starts from outputs/base, the run of base: 64 images" in report
    assert cli.main(command) == 0
    said = capfd.readouterr().out
    assert "was there already" in said and "timed at" not in said and "trained first" not in said


def test_a_run_folder_is_an_arm(here, capsys):
    run = "out/runs/tiny/seed-0"
    again = ["--arm", "again", "tiny.yaml", run]
    assert cli.main(["compare", run, *again, "-o", "elsewhere", "--report-only", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "again reaches seed-0's final" in said and "1.00x fewer images" in said


def test_the_metric_and_the_target_can_be_chosen(here, capsys):
    command = ["compare", "out/runs/tiny/seed-0", "--arm", "b", "out/runs/tiny/seed-0", "-o", "other"]
    assert cli.main([*command, "--metric", "loss", "--target", "1e9"]) == 0
    assert "b reaches loss of 1,000,000,000 with 1.00x fewer images" in capsys.readouterr().out
    assert cli.main([*command, "--metric", "heldout_nat"]) == 2
    assert "no 'heldout_nat' was measured; did you mean 'heldout_nats'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "what is to be compared?"),
        (["tiny.yml"], "there is no recipe 'tiny.yml'"),
        (["tiny.yaml", "tiny.yaml"], "two arms are called tiny; name them"),
        (["tiny.yaml", "--arm", "alone"], "--arm alone: an arm is a name, a recipe and changes"),
        (["tiny.yaml", "--arm", "a=b", "tiny.yaml"], "--arm a=b tiny.yaml: an arm is a name"),
        (["tiny.yaml", "--seeds", "x"], "--seeds: say how many"),
        (["tiny.yaml", "--seeds", "0"], "--seeds 0: that is no seed at all"),
        (["tiny.yaml", "--seconds", "0"], "--seconds 0: more than 0"),
        (["tiny.yaml", "--jobs", "0"], "--jobs 0: at least one"),
        (["tiny.yaml", "training.batch_szie=3"], "did you mean 'batch_size'"),
        (["tiny.yaml", "--arm", "long", "tiny.yaml", "training.images=320"], "these arms have no equal conditions:"),
        (["tiny.yaml", "-o", "empty", "--report-only"], "nothing to compare: no run has finished yet"),
        (["tiny.yaml", "--baseline", "tinny"], "--baseline tinny: there is no such arm; did you mean 'tiny'?"),
    ],
)
def test_mistakes_exit_with_2_and_run_nothing(here, argv, message, capsys):
    assert cli.main(["compare", *argv]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert not (here / "outputs").exists() and not (here / "empty").exists()


def test_changes_for_all_may_stand_behind_the_seeds_or_two_dashes(here, capsys):
    for tail in (["--seeds", "2", "training.images=64"], ["--arm", "b", "tiny.yaml", "--", "training.images=64"]):
        assert cli.main(["compare", "tiny.yaml", "-o", "empty", "--report-only", *tail]) == 2
        assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_another_recipe_is_set_aside_and_made_anew(here, capsys):
    command = ["compare", "tiny.yaml", "--seeds", "1", "-o", "changing", "training.images=64"]
    assert cli.main(command) == 0 and cli.main([*command, "noise.mean=0.5"]) == 0
    runs = here / "changing/runs/tiny"
    assert "mean: 0.5" in (runs / "seed-0/recipe.yaml").read_text()
    assert "mean: -1.2" in (runs / "seed-0.previous-1/recipe.yaml").read_text()
    assert capsys.readouterr().out.count("s of training") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_goes_on_where_it_was(here, number):
    """The runs stop with a checkpoint, nothing is left running, and the end is that of an uninterrupted one."""
    command = [sys.executable, "-m", "entrecipes", "compare", "tiny.yaml", "--seeds", "1", "--jobs", "2"]
    command += ["--arm", "b", "tiny.yaml", "noise.mean=0", "-o", f"stopped-{number}"]
    command += ["training.images=8k", "training.checkpoint_every=4k", "evaluation.every=800"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rows = here / f"stopped-{number}/runs/tiny/seed-0/metrics.jsonl"
    until = time.time() + 120
    while not (rows.exists() and '"train"' in rows.read_text()) and time.time() < until:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 130, process.stderr.read()
    checkpoints = sorted((rows.parent / "checkpoints").glob("images-*"))
    assert checkpoints and not (rows.parent / "run.json").exists()
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f"stopped-{number}" in _text(path)]
    assert not alive
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=400).returncode == 0
    starts = [json.loads(line)["images"] for line in rows.read_text().splitlines() if '"start"' in line]
    assert len(starts) == 2 and starts[1] > 0, "it went on from its checkpoint"


def _text(path: Path) -> str:
    try:
        return path.read_text() if int(path.parent.name) != os.getpid() else ""
    except OSError:
        return ""
