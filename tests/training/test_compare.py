"""Which runs a comparison needs, which it may take as they are, and what it refuses before anything runs."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny

from entrecipes.errors import UserError
from entrecipes.recipe.load import load
from entrecipes.training.compare import check_equal, compare
from entrecipes.training.planning import Planned, plan
from entrecipes.training.processes import Runner, _last_words, jobs_beside

ARMS = {"edm": (["tiny.yaml"], []), "flat": (["tiny.yaml"], ["noise={type: log_uniform}"])}


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A working directory with a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny()))


def finish(planned: Planned, folder: str | Path | None = None, images: int = 160) -> Path:
    """Leave what a finished run leaves for the one who looks whether it may be reused."""
    folder = Path(folder or planned.folder)
    folder.mkdir(parents=True)
    loaded = load(planned.recipe, [*planned.overrides, f"training.output={folder}"])
    (folder / "recipe.yaml").write_text(loaded.resolved_yaml())
    (folder / "run.json").write_text(json.dumps({"images": images}))
    return folder


def test_every_arm_gets_every_seed_in_turn():
    plans = plan(ARMS, [0, 2], Path("out"), ["training.images=320"])
    assert [(each.arm, each.seed) for each in plans] == [("edm", 0), ("flat", 0), ("edm", 2), ("flat", 2)]
    assert plans[3].folder == Path("out/runs/flat/seed-2")
    resolved = plans[3].resolved
    assert (resolved["training"]["seed"], resolved["evaluation"]["seed"]) == (2, 200_000)
    assert (resolved["training"]["images"], resolved["noise"]["type"]) == (320, "log_uniform")
    assert resolved["data"]["split_seed"] == plans[0].resolved["data"]["split_seed"], "one held-out set for all seeds"
    assert resolved["evaluation"]["held_out"] == plans[0].resolved["evaluation"]["held_out"]
    assert len(plan(ARMS, None, Path("out"))) == 6, "three seeds by default"


def test_only_the_same_finished_run_is_reused():
    def planned(*overrides: str) -> Planned:
        return plan({"edm": (["tiny.yaml"], overrides)}, [1], Path("out"))[0]

    assert not planned().finished and planned().foreign is None
    finish(planned())
    assert planned().finished
    assert planned("training.checkpoint_every=32", "evaluation.grid=2", "training.cpu_threads=2").finished
    for override, key in {
        "noise.mean=0": "noise.mean",
        "evaluation.every=32": "evaluation.every",
        "training.images=320": "training.images",
        "evaluation.held_out.gate_pivot=0.5": "evaluation.held_out.gate_pivot",
    }.items():
        assert not planned(override).finished
        assert [change[0] for change in planned(override).foreign] == [key]
    run = planned().folder / "run.json"
    for unfinished in ('{"images": 144}', '{"images"', "{}"):
        run.write_text(unfinished)
        assert not planned().finished
    run.unlink()
    assert not planned().finished and planned().foreign == []


def test_a_given_run_stands_in_for_its_seed():
    earlier = finish(plan(ARMS, [1], Path("elsewhere"))[0], "earlier")
    for sources in (["tiny.yaml", earlier], [earlier]):
        plans = plan({"edm": (sources, [])}, [0, 1], Path("out"))
        assert [each.folder for each in plans] == [Path("out/runs/edm/seed-0"), earlier]
        assert [each.finished for each in plans] == [False, True]


def test_runs_alone_are_compared_over_the_seeds_they_share():
    folders = [finish(each, f"run-{number}") for number, each in enumerate(plan(ARMS, [0, 1], Path("elsewhere")))]
    plans = plan({"edm": ([folders[0], folders[2]], []), "flat": ([folders[3]], [])}, None, Path("out"))
    assert [(each.arm, each.seed, each.folder) for each in plans] == [("edm", 1, folders[2]), ("flat", 1, folders[3])]
    with pytest.raises(UserError, match="no seed in common"):
        plan({"edm": ([folders[0]], []), "flat": ([folders[3]], [])}, None, Path("out"))


def test_a_run_that_does_not_belong_is_refused_by_name():
    flat = finish(plan(ARMS, [0], Path("elsewhere"))[1], "flat-run")
    with pytest.raises(UserError, match="flat-run: can't be edm's run with seed 0 .noise.*log_uniform.* there"):
        plan({"edm": (["tiny.yaml", flat], [])}, [0], Path("out"))
    (flat / "run.json").unlink()
    with pytest.raises(UserError, match="flat-run: can't be flat's run with seed 0 .it has not finished"):
        plan({"flat": (["tiny.yaml", flat], ["noise={type: log_uniform}"])}, [0], Path("out"))
    with pytest.raises(UserError, match="other.yaml: no run folder"):
        plan({"edm": (["tiny.yaml", "other.yaml"], [])}, [0], Path("out"))


@pytest.mark.parametrize(
    "override, line",
    [
        ("training.images=320", "  training.images: 160 in edm, 320 in other"),
        ("training.batch_size=32", "  training.batch_size: 16 in edm, 32 in other"),
        ("data.split_seed=1", "  data.split_seed: 0 in edm, 1 in other"),
        ("evaluation.held_out.gate_pivot=0.5", "  evaluation.held_out.gate_pivot: 0.2 in edm, 0.5 in other"),
        ("evaluation.held_out.seed=1", "  evaluation.held_out.seed: 0 in edm, 1 in other"),
        ("evaluation.every=32", "  evaluation.every: 64 in edm, 32 in other"),
    ],
)
def test_unequal_conditions_are_refused_before_anything_runs(override, line):
    arms = ARMS | {"other": (["tiny.yaml"], [override])}
    with pytest.raises(UserError) as refused:
        compare(arms, [0], output="out")
    assert line in str(refused.value).splitlines() and "--unequal" in str(refused.value)
    assert not Path("out").exists()
    compared = compare(arms, [0], output="out", unequal=True, train=False)
    assert compared.unequal == (override.split("=")[0],)
    assert {run.state for run in compared.runs} == {"missing"}


def test_what_may_differ_is_told_of_each_arm():
    arms = ARMS | {"harmless": (["tiny.yaml"], ["training.log_every=32", "description=another"])}
    compared = compare(arms, [0], output="out", train=False)
    assert compared.arms["edm"].changes == compared.arms["harmless"].changes == ()
    assert ("noise.type", "log_normal", "log_uniform") in compared.arms["flat"].changes


def test_what_a_change_takes_away_is_told_once_an_arm(caplog):
    plan({"edm": (["tiny.yaml"], ["evaluation.samples=2k"])}, [0, 1], Path("out"))
    assert [record.getMessage() for record in caplog.records] == [
        "warning: edm: command line: evaluation.samples: has no effect while evaluation.metrics is empty"
    ]


def test_nats_need_a_pinned_gate():
    plans = plan({"edm": (["tiny.yaml"], ["evaluation.held_out.gate_pivot=null"])}, [0], Path("out"))
    with pytest.raises(UserError, match="gate_pivot=0.2"):
        check_equal(plans, "edm", "heldout_nats")
    assert check_equal(plans, "edm", "kid_efflite0_500") == []


@pytest.mark.parametrize(
    "arms, seeds, message",
    [
        ({"a b": ARMS["edm"], "a-b": ARMS["edm"]}, [0], "names must differ"),
        ({"..": ARMS["edm"]}, [0], "names must differ"),
        (ARMS, [0, 0], "--seeds 0 0"),
        (ARMS, [-1], "--seeds -1"),
        ({"edm": (["tiny.yaml"], ["nose.type=log_uniform"])}, [0], "did you mean 'noise'"),
    ],
)
def test_mistakes_are_told(arms, seeds, message):
    with pytest.raises(UserError, match=message):
        compare(arms, seeds, output="out")


def test_an_unknown_baseline_is_told():
    with pytest.raises(UserError, match="--baseline edn: there is no such arm; did you mean 'edm'?"):
        compare(ARMS, [0], output="out", baseline="edn")


def test_two_comparisons_never_train_the_same_run():
    (planned,) = plan({"edm": ARMS["edm"]}, [0], Path("out"))
    log = Path("out/logs/edm-seed-0.log")
    log.parent.mkdir(parents=True)
    with log.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = []
        (run,) = Runner(Path("out"), listener=lambda arm, run: said.append((arm, run.state))).run_all([planned])
    assert run.state == "failed" and "another process is still at it" in run.message
    assert said == [("edm", "failed")] and not planned.folder.exists()


def test_the_last_attempt_says_why_it_failed():
    log = Path("a.log")
    attempt = '{"kind": "command", "jobs": 1}\n'
    log.write_text(f"{attempt}error: an old one\n{attempt}{{}}\nwarning: w\nerror: the loss became nan\nmore\n")
    assert _last_words(log) == "the loss became nan"
    log.write_text(f"{attempt}Traceback\n  File\nValueError: broken\n")
    assert _last_words(log) == "ValueError: broken"
    log.write_text(f'{attempt}{{"kind": "train"}}\n')
    assert _last_words(log) == ""


def test_how_many_ran_beside_a_run_is_remembered():
    log = Path("a.log")
    assert jobs_beside(log) is None
    log.write_text('{"kind": "command", "jobs": 1}\n{"kind": "train"}\n{"kind": "command", "jobs": 4}\nwords\n')
    assert jobs_beside(log) == 4
