"""Budgets equal in seconds, and the bases that arms start from: what is timed, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny

from entrecipes.errors import UserError
from entrecipes.report.comparison.notes import notes
from entrecipes.training.bases import bases, train_bases
from entrecipes.training.budget import FILE, budget, untimed
from entrecipes.training.compare import compare
from entrecipes.training.planning import plan

BASE = {"pipeline": {"build": None, "pretrained": "outputs/start"}, "extends": "start.yaml"}
ARMS = {
    "tuned": (["tuned.yaml"], []),
    "wide": (["start.yaml"], ["training.batch_size=32", "evaluation.every=32", "training.images=320"]),
}
OWN = {"tuned": ARMS["tuned"], "wide": (["start.yaml"], ["training.batch_size=16", "evaluation.every=32"])}


@pytest.fixture(autouse=True)
def recipes(tmp_path, monkeypatch):
    """A working directory with a recipe, and one that starts from its run."""
    monkeypatch.chdir(tmp_path)
    Path("start.yaml").write_text(yaml.safe_dump(tiny(training={"seed": 5, "log_every": 32})))
    Path("tuned.yaml").write_text(yaml.safe_dump(BASE))


def timed(arms: dict, output: str = "out", **speeds: float) -> None:
    """What a comparison leaves that has timed these arms."""
    found = {each.arm: each.resolved for each in plan(arms, [0], Path(output))}
    rows = {
        name: {"images_per_second": speed, "rounds": [speed / 2, speed], "jobs": 2, "begins": "", "recipe": found[name]}
        for name, speed in speeds.items()
    }
    Path(output).mkdir(exist_ok=True)
    (Path(output) / FILE).write_text(json.dumps({"seconds": 10, "arms": rows}))


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_the_budget_is_the_speed_times_the_seconds_in_whole_batches():
    timed(ARMS, tuned=10.0, wide=25.0)
    plans = plan(ARMS, [0, 1], Path("out"))
    given = budget(plans, Path("out"), 10)
    assert {name: each.images for name, each in given.arms.items()} == {"tuned": 96, "wide": 256}
    assert budget(plans, Path("out"), 0.01).arms["wide"].images == 32, "at least one batch"
    longer = budget(plans, Path("out"), 21)
    assert longer.arms["tuned"].images == 208 and longer.arms["tuned"].rounds == (5.0, 10.0)
    kept = json.loads((Path("out") / FILE).read_text())
    assert kept["seconds"] == 21 and kept["arms"]["tuned"]["images"] == 208


def test_a_changed_arm_is_timed_again_and_no_other():
    timed(ARMS, tuned=10.0, wide=25.0)

    def names(*changes: str) -> list[str]:
        arms = ARMS | {"wide": (ARMS["wide"][0], [*ARMS["wide"][1], *changes])}
        return [each.arm for each in untimed(plan(arms, [3, 4], Path("out")), Path("out"))]

    assert names() == names("training.images=64", "evaluation.held_out.images=4", "training.checkpoint_every=16") == []
    assert names("training.batch_size=64") == names("training.cpu_threads=2") == ["wide"]
    assert [each.arm for each in untimed(plan(ARMS, [0, 1], Path("new")), Path("new"))] == ["tuned", "wide"]


def test_arms_of_equal_seconds_may_differ_in_images_and_in_when_they_are_measured():
    timed(OWN, tuned=10.0, wide=25.0)
    compared = compare(OWN, [0], output="out", seconds=10, train=False)
    assert compared.unequal == () and compared.budget.arms["wide"].images == 256
    assert ("training.images", 96, 256) in compared.arms["wide"].changes
    said = notes(compared)[2]
    assert said.startswith("equal in seconds: 10 of training each") and "tuned 10, wide 25" in said
    with pytest.raises(UserError, match="evaluation.every: 64 in tuned, 32 in wide"):
        compare(OWN, [0], output="out", train=False)
    arms = OWN | {"other": (["start.yaml"], ["data.split_seed=1"])}
    with pytest.raises(UserError, match="data.split_seed: 0 in tuned, 1 in other"):
        compare(arms, [0], output="out", seconds=10, train=False)


@pytest.mark.parametrize(
    "arms, more, message",
    [
        (OWN, {"seconds": 0}, "--seconds 0: more than 0"),
        (OWN, {"overrides": ["training.images=64"]}, "--seconds 10 decides .* leave out training.images=64"),
        (OWN, {}, "budget.json: tuned, wide not timed yet"),
    ],
)
def test_what_can_not_be_timed_is_told(arms, more, message):
    with pytest.raises(UserError, match=message):
        compare(arms, [0], output="out", **{"seconds": 10, "train": False, **more})
    assert not Path("out").exists()


def test_a_damaged_budget_is_told():
    Path("out").mkdir()
    (Path("out") / FILE).write_text("{")
    with pytest.raises(UserError, match="budget.json: damaged .* timed again"):
        compare(OWN, [0], output="out", seconds=10, train=False)


# -- bases ------------------------------------------------------------------------------------------------------------


def test_the_base_is_the_run_of_the_recipe_that_is_named():
    Path("again.yaml").write_text(yaml.safe_dump(BASE | {"extends": "tuned.yaml"} | pretrained("outputs/tuned")))
    arms = {"again": (["again.yaml"], []), "tuned": (["tuned.yaml"], []), "scratch": (["start.yaml"], [])}
    found = bases(plan(arms, [0, 1], Path("out"), ["training.batch_size=8"]))
    assert [(str(folder), names) for folder, (_, names) in found.items()] == [
        ("outputs/start", ("again", "tuned")),
        ("outputs/tuned", ("again",)),
    ]
    base, _ = found[Path("outputs/start")]
    assert base.resolved["training"]["batch_size"] == 16 and base.resolved["training"]["seed"] == base.seed == 5


@pytest.mark.parametrize("source", ["outputs/elsewhere", "start", "owner/name", "outputs/"])
def test_what_names_no_recipe_is_no_base(source):
    Path("tuned.yaml").write_text(yaml.safe_dump(BASE | pretrained(source)))
    assert bases(plan({"tuned": ARMS["tuned"]}, [0], Path("out"))) == {}


def test_bases_that_start_from_each_other_are_refused():
    Path("other.yaml").write_text(yaml.safe_dump(BASE | pretrained("outputs/tuned")))
    Path("tuned.yaml").write_text(yaml.safe_dump(BASE | pretrained("outputs/other")))
    with pytest.raises(UserError, match="goes in a circle by way of outputs/"):
        bases(plan({"tuned": ARMS["tuned"]}, [0], Path("out")))


def test_a_packaged_recipe_is_found_by_its_name():
    found = bases(plan({"lora": (["entprog/lora"], [])}, [0], Path("out")))
    assert list(found) == [Path("outputs/entprog/pretrain")]


def test_a_base_that_fails_names_its_log():
    Path("start.yaml").write_text(yaml.safe_dump(tiny() | pretrained("nowhere")))
    failed = (
        r"outputs/start: the base of tuned failed: nowhere: no such folder.* \(see out/logs/base-start-seed-0.log\)"
    )
    with pytest.raises(UserError, match=failed):
        train_bases(plan({"tuned": ARMS["tuned"]}, [0], Path("out")), Path("out"), print)


def pretrained(source: str) -> dict:
    return {"pipeline": {"build": None, "pretrained": source}}
