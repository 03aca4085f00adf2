"""Two processes do what one does: every method's losses, decisions, tables, measures and weights, on tiny real runs."""

from __future__ import annotations

import json
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
REST = [name for name in CASES if name not in (*QUICK, *LAST, *UNEQUAL)]
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
    return trained(tmp_path_factory.mktemp("rest"), places, *REST)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_do_what_one_does(quick: Path, name: str) -> None:
    check(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_two_processes_do_what_one_does_in_every_choice(rest: Path, name: str) -> None:
    check(rest, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_two_processes_find_and_train_the_same_experts(tmp_path: Path, places: Places, name: str) -> None:
    trained(tmp_path, places, name)
    one, two = (tmp_path / processes / parity.slug(name) for processes in ("one", "two"))
    for part in ("base", "experts/0", "experts/1"):
        same_runs(one / part, two / part)
    plans = [json.loads((folder / "search/plan.json").read_text()) for folder in (one, two)]
    assert not list(parity.apart(*plans, 1e-4, 1e-7)), "the same networks for the same groups"
    trials = [json.loads(f"[{','.join((run / 'search/memory.jsonl').read_text().splitlines())}]") for run in (one, two)]
    assert not list(parity.apart(*trials, 1e-4, 1e-7)), "candidates tried side by side are in the bank in order"
    nats = [[row["nats"] for row in parity.lines(run, "held_out")] for run in (one, two)]
    assert nats[1] == pytest.approx(nats[0], rel=1e-4)


def check(folder: Path, name: str) -> None:
    """Compare all that both runs of a case left."""
    same_runs(*(folder / processes / parity.slug(name) for processes in ("one", "two")), LOOSER.get(name, 0.0))


def same_runs(one: Path, two: Path, looser: float = 0.0) -> None:
    """Their curves, rows, weights and samples."""
    assert [row["world_size"] for row in parity.lines(two, "start")] == [2], "really two"
    same_curve(one, two, max(RELATIVE, looser))
    for kind, (relative, absolute) in TOLERANCES.items():
        rows = [parity.lines(run, kind) for run in (one, two)]
        assert not list(parity.apart(*rows, max(relative, looser), absolute)), kind
    same_weights(one, two)
    for name in {path.name for run in (one, two) for path in run.glob("samples/*.png")}:
        first, second = (parity.picture(run / "samples" / name) for run in (one, two))
        assert first.shape == second.shape and abs(first - second).max() <= 2, "of the same seeds, shared out"


def same_curve(one: Path, two: Path, relative: float) -> None:
    """The loss of every step."""
    first, second = map(parity.losses, (one, two))
    assert len(first) > 1 and second == pytest.approx(first, rel=relative)


def same_weights(one: Path, two: Path) -> None:
    """The final weights and their average."""
    first, second = (parity.weights(run) for run in (one, two))
    assert first.keys() == second.keys()
    for key, weight in first.items():
        distance = (weight.double() - second[key].double()).abs()
        # what has no gradient but rounding, such as a key's bias, moves by the optimizer's steps all the same
        assert not weight.numel() or (distance.max() < 2e-3 and distance.mean() < 5e-4), key
