"""Several processes that become one, or one several; that lose one; and that measure what is trained."""

from __future__ import annotations

import json
import time
from pathlib import Path

import parity
import pytest
import yaml
from cases import CASES, FEW, Places
from test_parity import RELATIVE, TOLERANCES, same_weights, train_alone, train_together
from tiny import tiny

from entrecipes.cli import main

# Checkpoints within: the warm-up's ramp, a turn of a comparison, two stages of pruning, a curriculum's history.
MOVED = {
    "infonoise": (192, 48),
    "entprog, as published": (256, 112),
    "entpruner by information, taught": (128, 48),
    "masks dual, adaptive": (64, 24),
    "masks dual, entropy": (64, 24),
}
"""Images in all, and of the checkpoint that a run with the other number of processes goes on from."""


@pytest.mark.slow
def test_runs_go_on_with_another_number_of_processes(tmp_path: Path, places: Places) -> None:
    """From 2 to 1 and from 1 to 2 in mid-run: the same losses, decisions and weights as without a break."""
    recipes = {name: CASES[name](places) for name in MOVED}
    for name, (images, middle) in MOVED.items():
        recipes[name]["training"] |= {"images": images, "checkpoint_every": middle, "keep_checkpoints": 99}
    train_alone(parity.write(tmp_path, recipes, "one"), bare=True)
    train_together(parity.write(tmp_path, recipes, "two"), bare=True)
    for before, after, go in (("one", "then two", train_together), ("two", "then one", train_alone)):
        middles = {
            name: [f"training.resume={tmp_path / before / parity.slug(name)}/checkpoints/images-{middle:012d}"]
            for name, (_, middle) in MOVED.items()
        }
        go(parity.write(tmp_path, recipes, after, middles), bare=True)
    for name, (_, middle) in MOVED.items():
        whole = tmp_path / "one" / parity.slug(name)
        for part in ("then one", "then two"):
            rest = tmp_path / part / parity.slug(name)
            assert parity.lines(rest, "start")[0]["images"] == middle
            for kind in ("train", "event", "prune", "noise"):
                rows = [row for row in parity.lines(whole, kind) if row["images"] > middle]
                assert not list(parity.apart(rows, parity.lines(rest, kind), *TOLERANCES[kind])), (name, part, kind)
            losses = [row["loss"] for row in parity.lines(whole, "train") if row["images"] > middle]
            assert parity.losses(rest) == pytest.approx(losses, rel=RELATIVE)
            same_weights(whole, rest)


@pytest.mark.slow
def test_a_run_that_loses_a_process_says_so_and_goes_on(tmp_path: Path) -> None:
    """One of two is killed: the other ends soon, in words; the checkpoints are whole; one process goes on."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(tiny(training={"images": 160_000, "checkpoint_every": 32})))
    call = ["-m", "entrecipes", "run", recipe, f"training.output={folder}"]
    first, second = parity.together(call, tmp_path)
    try:
        while not list(folder.glob("checkpoints/images-*")):
            assert first.poll() is None and second.poll() is None, parity.said(tmp_path, 0).read_text()
            time.sleep(0.1)
        second.kill()
        assert first.wait(60) != 0
    finally:
        first.kill(), second.kill()
    said = parity.said(tmp_path, 0).read_text()
    assert "another of this run's 2 processes has ended" in said and "Traceback" not in said
    newest = int(sorted(folder.glob("checkpoints/images-*"))[-1].name.split("-")[1])
    listed = tmp_path / "rest.json"
    listed.write_text(json.dumps([[str(recipe), str(folder), f"training.images={newest + 32}"]]))
    train_alone(listed, bare=True)
    assert [row["images"] for row in parity.lines(folder, "start")] == [0, newest]


VERBS = {
    "evaluate": ([], ""),
    "score": (["--images", "9", "--levels", "4"], "scores.json"),
    "diagnose": (["--images", "9", "--levels", "8"], "diagnosis.json"),
}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path, places: Places) -> None:
    recipe = CASES["prune written"](places)
    recipe["evaluation"] |= FEW | {"metrics": ["kid"]}
    train_alone(parity.write(tmp_path, {"run": recipe}, "one"))
    run = tmp_path / "one/run"
    for verb, (options, file) in VERBS.items():
        found = []
        for name in ("alone", "together", "launched"):
            output = tmp_path / f"{verb}-{name}"
            words = [verb, str(run), *options, "-o", str(output)]
            if name == "alone":
                assert main(words) == 0
            elif name == "together":
                parity.wait(parity.together(["-m", "entrecipes", *words], tmp_path), tmp_path)
                assert parity.said(tmp_path, 1).read_text() == "", "of two processes one speaks"
            elif verb == "evaluate":
                assert main([*words, "--accelerate", "ddp"]) == 0
            else:
                continue
            found.append(json.loads((output / file).read_text()))
        for other in found[1:]:
            assert not list(parity.apart(found[0], other, 1e-4, 1e-6)), verb
