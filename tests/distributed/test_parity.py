"""Two processes do what one does: every method's losses, decisions, tables, measures and weights, on tiny real runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import drive
import parity
import pytest
from accelerate.state import AcceleratorState
from cases import CASES, Places

QUICK = ("entprog, cost aware", "masks dual, entropy", "metrics of images")
"""In the default tier; InfoNoise and EntPruner on two processes are in tests/recipes."""
LAST = ("tdc", "tdc by information")
"""What ends its processes' connection: each in a launch of its own."""
UNEQUAL = ("entprog, last first, measured",)
"""Where measured seconds decide, no two runs are alike."""
RELATIVE = 1e-5
LOOSER = {"bf16": 1e-3}
"""bf16 rounds each product to 3 digits, and halves of a batch round in another way than the whole."""
TOLERANCES = {
    "train": (1e-4, 1e-6),
    "event": (1e-4, 1e-6),
    "prune": (1e-2, 1e-6),  # ZiCo divides by deviations of gradients, some of which are rounding
    "held_out": (1e-4, 1e-6),
    "metric": (1e-3, 1e-5),
    "noise": (1e-2, 1e-5),  # logged with four digits
}
"""Of the rows of each kind: relative, absolute."""


def train_alone(listed: Path, bare: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        drive.main(listed, bare)
    AcceleratorState._reset_state(reset_partial_state=True)


def train_together(listed: Path, bare: bool = False) -> None:
    command = [parity.DRIVER, listed, *["--bare"] * bare]
    parity.wait(parity.together(command, listed.parent), listed.parent)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTRECIPES_HOME", str(folder / "home"))
        patch.setenv("HF_HOME", str(folder / "hf"))
        yield Places(folder)


def trained(folder: Path, places: Places, *names: str, bare: bool = False) -> Path:
    """The folder with the cases' runs in `one/` and `two/`."""
    recipes = {name: CASES[name](places) for name in names}
    train_alone(parity.write(folder, recipes, "one"), bare)
    train_together(parity.write(folder, recipes, "two"), bare)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, places: Places) -> Path:
    return trained(tmp_path_factory.mktemp("quick"), places, *QUICK, bare=True)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory, places: Places) -> Path:
    return trained(
        tmp_path_factory.mktemp("rest"), places, *(name for name in CASES if name not in (*QUICK, *LAST, *UNEQUAL))
    )


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_do_what_one_does(quick: Path, name: str) -> None:
    check(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*QUICK, *LAST, *UNEQUAL)])
def test_two_processes_do_what_one_does_in_every_choice(rest: Path, name: str) -> None:
    check(rest, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_two_processes_find_and_train_the_same_experts(tmp_path: Path, places: Places, name: str) -> None:
    trained(tmp_path, places, name)
    check(tmp_path, name)
    one, two = (tmp_path / processes / parity.slug(name) for processes in ("one", "two"))
    for part in ("base", "experts/0", "experts/1"):
        same_curve(one / part, two / part, RELATIVE)
    plans = [json.loads((folder / "search/plan.json").read_text()) for folder in (one, two)]
    assert not list(parity.apart(*plans, 1e-4, 1e-7))


def check(folder: Path, name: str) -> None:
    """Compare all that both runs left."""
    one, two = (folder / processes / parity.slug(name) for processes in ("one", "two"))
    assert [row["world_size"] for row in parity.lines(two, "start")] == [2], "really two"
    looser = LOOSER.get(name, 0.0)
    same_curve(one, two, max(RELATIVE, looser))
    for kind, (relative, absolute) in TOLERANCES.items():
        rows = [parity.lines(run, kind) for run in (one, two)]
        assert not list(parity.apart(*rows, max(relative, looser), absolute)), kind
    first, second = (parity.weights(run) for run in (one, two))
    assert first.keys() == second.keys()
    for key, weight in first.items():
        distance = (weight.double() - second[key].double()).abs()
        # what has no gradient but rounding, such as a key's bias, moves by the optimizer's steps all the same
        assert not weight.numel() or (distance.max() < 1e-3 and distance.mean() < 1e-4), key
    for name in {path.name for run in (one, two) for path in run.glob("samples/*.png")}:
        first, second = (parity.picture(run / "samples" / name) for run in (one, two))
        assert first.shape == second.shape and abs(first - second).max() <= 2, "of the same seeds, shared out"


def same_curve(one: Path, two: Path, relative: float) -> None:
    """The loss of every step."""
    first, second = map(parity.losses, (one, two))
    assert len(first) > 1 and second == pytest.approx(first, rel=relative)
