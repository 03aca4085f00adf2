"""The search and its memory bank: valid, repeatable, and the same whether it was killed or not."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import analytic
import pytest
from analytic import Problem, run, section

from entrecipes.errors import UserError
from entrecipes.experts.proxy_pruning import Measured, MemoryBank, Trial, search
from entrecipes.recipe.base import build
from entrecipes.recipe.experts import Memory

SHORT = {"rounds": 4, "candidates": 3}


def lines(path: Path) -> list[dict]:
    """The bank's lines, without the wall clock."""
    return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]


def trial(number: int, loss: float | None, group: int = 0) -> Trial:
    """A trial with that loss."""
    return Trial(group, 0, number, "random", (0.5,), (number,), 1.0, loss, None if loss is None else -loss, 0.0, 0.0)


def test_every_trial_is_within_the_budget_new_and_rewarded_as_documented(tmp_path):
    problem, how = Problem(0), section(penalty=3.0)
    best, bank = run(problem, how, tmp_path / "memory.jsonl")
    trials = bank.trials(0)
    assert len(trials) == 40 and len({one.kept for one in trials}) == 40
    assert [(one.round, one.number) for one in trials] == [(r, n) for r in range(10) for n in range(4)]
    assert trials[0].proposer == "uniform" and {one.proposer for one in trials[1:]} == {"evolution"}
    for one in trials:
        assert abs(one.flops / problem.target - 1) <= how.tolerance
        assert one.loss == problem.loss(one.kept) and one.compute == sum(one.kept)
        over = max(0, problem.units.flops(one.kept) / problem.target - 1)
        assert one.reward == pytest.approx(-(one.loss - 0.5) / 0.5 - 3 * over)
    assert any(one.flops > problem.target for one in trials)
    assert best.reward == max(one.reward for one in trials)


def test_the_bank_reads_back_what_was_measured(tmp_path):
    _, bank = run(Problem(0), section(**SHORT), tmp_path / "memory.jsonl")
    assert MemoryBank(tmp_path / "memory.jsonl").trials(0) == bank.trials(0)
    assert MemoryBank(tmp_path / "memory.jsonl").trials(1) == []
    kinds = [line["kind"] for line in lines(tmp_path / "memory.jsonl")]
    assert kinds == ["search", *(["round"] + ["trial"] * 3) * 4]


@pytest.mark.parametrize("proposer", ["random", "sensitivity", "evolution", "tpe"])
def test_same_seed_same_trials_other_seed_or_group_others(proposer):
    problem = Problem(1)

    def kept(seed: int = 0, group: int = 0) -> list[tuple[int, ...]]:
        bank = MemoryBank()
        search(how, problem.task(seed, group), problem.evaluate, bank, build("proposer", how.proposer))
        return [one.kept for one in bank.trials(group)]

    how = section(proposer, **SHORT)
    assert kept() == kept()
    if proposer != "sensitivity":  # which draws nothing
        assert kept() != kept(seed=1) and kept() != kept(group=1)


@pytest.mark.parametrize("proposer", ["random", "sensitivity", "evolution", "tpe"])
def test_resumes_from_any_byte_to_the_same_file(tmp_path, proposer):
    whole = tmp_path / "whole.jsonl"
    how = section(proposer, rounds=6, candidates=3)
    best, bank = run(Problem(2), how, whole)
    content, torn = whole.read_bytes(), tmp_path / "torn.jsonl"
    for size in [0, 1, *range(50, len(content), len(content) // 9), len(content) - 1, len(content)]:
        torn.write_bytes(content[:size])
        problem = Problem(2)
        again, _ = run(problem, how, torn)
        assert dataclasses.replace(again, seconds=0) == dataclasses.replace(best, seconds=0)
        assert lines(torn) == lines(whole)
        held = sum(b'"kind": "trial"' in line for line in content[:size].splitlines(keepends=True) if b"\n" in line)
        assert len(problem.measured) == len(bank.trials(0)) - held


def test_a_killed_process_is_carried_on_as_if_it_had_not_been(tmp_path):
    path, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen([sys.executable, analytic.__file__, str(path), "evolution", "0.05"], env=os.environ)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b'"kind": "trial"') >= 7):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(MemoryBank(path).trials(0))
    problem, how = Problem(3), section("evolution", rounds=6)
    assert 7 <= before < 24
    run(problem, how, path)
    assert len(problem.measured) == 24 - before
    run(Problem(3), how, whole)
    assert lines(path) == lines(whole)


def test_a_torn_last_line_is_dropped_with_a_warning_and_never_written_on(tmp_path, caplog):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    bank.add(trial(0, 1.0))
    path.write_bytes(path.read_bytes() + b'{"kind": "trial", "gro')
    with caplog.at_level(logging.WARNING):
        bank = MemoryBank(path)
        assert bank.trials(0) == [trial(0, 1.0)]
    assert str(path) in caplog.text and "cut short" in caplog.text
    assert path.read_bytes().endswith(b"gro")  # reading alone changes nothing
    bank.add(trial(1, 2.0))
    assert MemoryBank(path).trials(0) == [trial(0, 1.0), trial(1, 2.0)]


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "memory.jsonl"
    path.write_text('{"kind": "trial", "group": 0}\nhello\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*delete the file"):
        MemoryBank(path).trials(0)


def test_a_bank_of_another_search_is_refused(tmp_path):
    path = tmp_path / "memory.jsonl"
    run(Problem(0), section(**SHORT), path)
    content = path.read_bytes()
    others = {
        "seed": lambda: run(Problem(0), section(**SHORT), path, seed=5),
        "target": lambda: run(Problem(0, ratio=0.7), section(**SHORT), path),
        "units": lambda: run(Problem(0, units=4), section(**SHORT), path),
        "search.levels": lambda: run(Problem(0), section(**SHORT, levels=(1.0, 0.5)), path),
        "search.proposer": lambda: run(Problem(0), section("random", **SHORT), path),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=re.escape(str(path)) + rf": group 0 .*{what}.* delete the file"):
            other()
    assert path.read_bytes() == content
    problem = Problem(0)
    _, bank = run(problem, section(rounds=5, candidates=3), path)  # with more rounds it goes on
    assert len(problem.measured) == 3 and len(bank.trials(0)) == 15


def test_shown_are_the_best_then_the_latest_without_doubles_and_only_finite_ones():
    bank = MemoryBank()
    for number, loss in enumerate([5.0, 1.0, 4.0, None, 3.0, 2.0]):
        bank.add(trial(number, loss))
    bank.add(trial(9, 0.0, group=1))
    numbers = [one.number for one in bank.shown(0, Memory(best=2, last=3))]
    assert numbers == [1, 5, 2, 4]
    assert [one.number for one in bank.shown(0, Memory(best=8, last=4))] == [1, 5, 4, 2, 0]
    assert [one.number for one in bank.shown(0, Memory(best=1, last=0))] == [1]
    assert bank.shown(0, None) == []


class Listener:
    """A proposer that gives what it is told to and remembers what it was shown."""

    name, last_note = "listener", "spoke"

    def __init__(self, given: list[tuple[float, ...]], **attributes: object) -> None:
        self.given, self.shown = given, []
        vars(self).update(attributes)

    def propose(self, task, round, shown, count, rng):
        """The same in each round."""
        self.shown.append([one.kept for one in shown])
        return self.given


def listened(proposer: Listener, **keys: object) -> MemoryBank:
    """The bank of a search by it."""
    problem, bank = Problem(0, units=3), MemoryBank()
    search(section(**{"rounds": 3, "candidates": 3, **keys}), problem.task(), problem.evaluate, bank, proposer)
    return bank


def test_rounds_that_are_short_are_filled_up_by_evolution_and_say_so():
    proposer = Listener([(1.0, 0.5, 0.25)])
    trials = listened(proposer).trials(0)
    assert [one.proposer for one in trials] == ["uniform", "listener", *["evolution"] * 7]
    assert trials[1].note == "spoke" and "listener" in trials[2].note and "spoke" in trials[2].note
    assert len({one.kept for one in trials}) == 9


def test_one_that_stops_ends_the_search_and_others_are_asked_again():
    stopping = Listener([(1.0, 0.5, 0.25)], when_short="stop")
    assert [one.proposer for one in listened(stopping).trials(0)] == ["uniform", "listener"]
    assert len(stopping.shown) == 2  # round 1 brought nothing new
    insisting = Listener([(1.0, 0.5, 0.25)], when_short="again")
    assert len(listened(insisting).trials(0)) == 2
    assert len(insisting.shown) == 42


def test_memory_decides_what_is_shown():
    proposer = Listener([])
    trials = listened(proposer, memory=None).trials(0)
    assert proposer.shown == [[], [], []] and len({one.kept for one in trials}) == 9
    proposer = Listener([])
    trials = listened(proposer, memory={"best": 1, "last": 1}).trials(0)
    for end, shown in zip((0, 3, 6), proposer.shown, strict=True):
        best = max(trials[:end], key=lambda one: one.reward, default=None)
        assert set(shown) == {one.kept for one in [best, *trials[max(0, end - 1) : end]] if one}
    greedy = Listener([], whole_memory=True)
    listened(greedy, memory={"best": 1, "last": 1})
    assert [len(shown) for shown in greedy.shown] == [0, 3, 6]
    greedy = Listener([], whole_memory=True)
    listened(greedy, memory=None)
    assert greedy.shown == [[], [], []]


def test_a_trial_without_a_finite_loss_is_kept_but_never_chosen_nor_shown(tmp_path):
    problem, count = Problem(0), iter(range(100))

    def evaluate(kept: tuple[int, ...]) -> Measured:
        number = next(count)
        return Measured({0: math.nan, 2: math.inf, 3: -math.inf}.get(number, problem.loss(kept)), 1.0)

    best, _ = run(problem, section(**SHORT), tmp_path / "memory.jsonl", evaluate=evaluate)
    bank = MemoryBank(tmp_path / "memory.jsonl")
    losses = [one.loss for one in bank.trials(0)]
    assert [losses[i] for i in (0, 2, 3)] == [None] * 3 and None not in losses[4:] and len(losses) == 12
    assert best.loss == min(loss for loss in losses if loss is not None)


def test_no_finite_loss_at_all_is_an_error():
    with pytest.raises(UserError, match="group 0 had a finite loss; lower search.recovery.learning_rate"):
        run(Problem(0), section(**SHORT), evaluate=lambda kept: Measured(math.nan, 0.0))


def test_a_budget_out_of_reach_is_an_error_before_anything_is_measured():
    problem = Problem(0, ratio=0.05)
    with pytest.raises(UserError, match="smallest network"):
        run(problem, section(**SHORT))
    assert problem.measured == []


def test_shares_that_cannot_be_fitted_are_left_out():
    problem = Problem(0, units=3)
    whole = problem.units.project

    def project(shares, target, tolerance):
        if shares[0] == 1:
            raise UserError("nothing near enough")
        return whole(shares, target, tolerance)

    problem.units.project = project
    bank = MemoryBank()
    search(section(**SHORT), problem.task(), problem.evaluate, bank, Listener([(1.0, 0.5, 0.25), (0.9, 0.5, 0.25)]))
    trials = bank.trials(0)
    assert len(trials) == 12 and [one.shares for one in trials if one.proposer == "listener"] == [(0.9, 0.5, 0.25)]


def test_several_processes_agree_and_only_the_first_touches_the_bank(tmp_path):
    """The first process's answers are replayed to a second one, whose bank and proposer would fail if touched."""
    problem, how, answers = Problem(0), section(**SHORT), []

    def first(make):
        answers.append(make())
        return answers[-1]

    bank = MemoryBank(tmp_path / "memory.jsonl")
    best = search(how, problem.task(), problem.evaluate, bank, build("proposer", how.proposer), first)
    other, replay = Problem(0), iter(answers)
    untouchable = SimpleNamespace(begin=print, add=print)
    second = search(how, other.task(), other.evaluate, untouchable, None, lambda make: next(replay))
    assert second == best and other.measured == problem.measured and next(replay, "end") == "end"
