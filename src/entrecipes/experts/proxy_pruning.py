"""Proxy-based pruning: which units of the base keep how much, found in rounds with a memory bank.

TDC (arXiv 2312.13307, v3) prunes each group's network by a multi-round decision process with a memory bank. Its action
space, reward and rounds are not public; here, per group: a plan is one share per unit, projected onto the FLOPs that
the group may spend, so that whatever is proposed is valid; its reward is the relative rise of a fixed-noise loss inside
the group; and every trial is kept, so that a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from entrecipes.errors import UserError
from entrecipes.experts.memory import MemoryBank, Plan, Trial
from entrecipes.recipe.base import build
from entrecipes.recipe.experts import EvolutionProposer, Search

if TYPE_CHECKING:
    from entrecipes.experts.grouping import Group
    from entrecipes.experts.units import Units

Each = Callable[[Callable[[Plan], Trial], Sequence[Plan]], Iterable[Trial]]

TRIES = 20
"""How often a round that is short of new plans asks again, before it is carried out with those it has."""


@dataclass(frozen=True)
class Task:
    """What a proposer is to solve: one group's network.

    Args:
        group: The group of noise levels.
        units: What may shrink.
        importance: Per unit, how much the criterion gives for all of it; normalised to sum 1.
        target: FLOPs of one forward pass of one sample that the network may cost.
        base_loss: Loss of the base inside the group, on the draws that candidates are measured on.
        seed: Of everything random.
        levels: Shares that a unit may keep, before projection; `search` takes these three from its section.
        rounds: Rounds of the search.
        candidates: Plans in each round.
    """

    group: Group
    units: Units
    importance: Sequence[float]
    target: float
    base_loss: float
    seed: int
    levels: Sequence[float] = Search().levels
    rounds: int = Search().rounds
    candidates: int = Search().candidates

    def uniform(self) -> tuple[float, ...]:
        """The one share of every unit that costs `target`, before projection; blocks go only where they must."""
        variable = sum(unit.flops * unit.atoms for unit in self.units.units)
        share = min(max(1 - (self.units.base_flops - self.target) / variable, 0.0), 1.0)
        return tuple(max(share, 0.5) if unit.kind == "blocks" else share for unit in self.units.units)


@dataclass(frozen=True)
class Measured:
    """What a candidate's measurement gave.

    Args:
        loss: Inside the group, on the fixed draws.
        compute: FLOPs spent on it, short recovery included.
    """

    loss: float
    compute: float


class Proposer(Protocol):
    """Who proposes plans.

    Two attributes may be added. `when_short` says what is done where it gives fewer new plans than asked for: `again`
    asks it again (up to 20 times), `evolution`, the default, lets evolution fill up, `stop` takes what there is. A
    round without any new plan ends the search. `whole_memory = True` shows it all trials, where any are shown.
    """

    name: str
    last_note: str
    """What is to be said of the last proposals, for the log; may be empty."""

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[tuple[float, ...]]:
        """Shares of the units, one tuple a plan: of these the first `count` that are new are measured.

        Args:
            task: What is to be solved.
            round: Number of the round, from 0.
            shown: Trials of earlier rounds, each with a finite loss.
            count: Plans wanted; fewer, or none, and more may be given.
            rng: Source of all randomness.
        """
        ...


def search(
    section: Search,
    task: Task,
    evaluate: Callable[[tuple[int, ...]], Measured],
    bank: MemoryBank,
    proposer: Proposer,
    agree: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    each: Each = map,
) -> Trial:
    """Search one group's network: `rounds` rounds of `candidates` plans, the uniform plan first.

    What the bank holds is not measured again; given the same `evaluate`, a search that was killed gives the same trials
    as one that was not. No two trials of a group keep the same atoms. The search ends early after a round in which
    nobody proposed anything new: `uniform` has one plan only.

    Args:
        section: Rounds, candidates, memory, tolerance and penalty.
        task: The group's task.
        evaluate: Kept atoms per unit -> loss and FLOPs spent.
        bank: Trials so far; read and written in the first process only.
        proposer: Who proposes; asked in the first process only.
        agree: Calls what it is given in the first process and returns the result (or raises the error) in all.
        each: Calls the first argument with every plan of the second, in one process each, and gives all results to all.

    Returns:
        The trial with the highest reward, the earliest among equals. Reward = -(loss - base_loss) / base_loss
        - penalty * max(0, flops / target - 1).

    Raises:
        UserError: If the bank belongs to another search, the budget can't be met, or no trial had a finite loss.
    """
    task = replace(task, levels=section.levels, rounds=section.rounds, candidates=section.candidates)
    agree(partial(bank.begin, _identity(section, task)))
    for number in range(section.rounds):
        plans = agree(partial(_plans_left, section, task, number, bank, proposer))
        if plans is None:
            break
        for trial in each(partial(_measured, section, task, evaluate), plans):
            agree(partial(bank.add, trial))
    return agree(partial(_best, bank, task.group.number))


def _measured(section: Search, task: Task, evaluate: Callable[[tuple[int, ...]], Measured], plan: Plan) -> Trial:
    start = time.perf_counter()
    measured = evaluate(plan.kept)
    return _trial(section, task, plan, measured, time.perf_counter() - start)


def _identity(section: Search, task: Task) -> dict[str, Any]:
    """What a search's trials depend on; with more rounds it goes on."""
    keys = section.model_dump(mode="json", exclude={"rounds"})
    return {
        "group": task.group.number,
        "seed": task.seed,
        "target": task.target,
        "base_loss": task.base_loss,
        "log_sigma": list(task.group.log_sigma),
        "units": [[unit.path, unit.kind, unit.atoms] for unit in task.units.units],
        **{f"search.{key}": value for key, value in keys.items()},
    }


def _plans_left(section: Search, task: Task, number: int, bank: MemoryBank, proposer: Proposer) -> list[Plan] | None:
    """The plans of a round that are still to be measured; None if it has no plan."""
    plans = bank.plans(task.group.number, number)
    if not plans:
        plans = _propose(section, task, number, bank, proposer)
        if not plans:
            return None
        bank.add_plans(plans, getattr(proposer, "last_exchange", ()))
    done = {trial.kept for trial in bank.trials(task.group.number)}
    return [plan for plan in plans if plan.kept not in done]


def _propose(section: Search, task: Task, number: int, bank: MemoryBank, proposer: Proposer) -> list[Plan]:
    """The plans of a new round: projected, none of them measured before, the uniform plan first of all."""
    group = task.group.number
    rng = np.random.default_rng([task.seed, group, number])
    shown = bank.shown(group, section.memory)
    if section.memory is not None and getattr(proposer, "whole_memory", False):
        shown = [trial for trial in bank.trials(group) if trial.loss is not None]
    known = {trial.kept for trial in bank.trials(group)}
    plans: list[Plan] = []

    def take(name: str, proposals: Sequence[Sequence[float]], note: str = "") -> None:
        for shares in proposals:
            if len(plans) == section.candidates:
                return
            shares = tuple(float(share) for share in shares)
            try:
                kept = tuple(task.units.project(shares, task.target, section.tolerance))
            except UserError:
                if name == "uniform":
                    raise
                continue  # where units are coarse, there may be nothing near enough to these shares
            if kept not in known:
                known.add(kept)
                plans.append(Plan(group, number, len(plans), name, shares, kept, note))

    def ask(who: Proposer) -> list[tuple[float, ...]]:
        missing = section.candidates - len(plans)
        return who.propose(task, number, shown, missing, rng) if missing else []

    if number == 0:
        take("uniform", [task.uniform()])
    proposals = ask(proposer)
    take(proposer.name, proposals, proposer.last_note)
    when_short = getattr(proposer, "when_short", "evolution")
    again, note = proposer, ""
    if when_short == "evolution":
        again, note = build("proposer", EvolutionProposer()), f"in place of {proposer.name}: {proposer.last_note}"
    for _ in range(0 if when_short == "stop" else TRIES):
        if len(plans) == section.candidates:
            break
        take(again.name, ask(again), note)
    return plans


def _trial(section: Search, task: Task, plan: Plan, measured: Measured, seconds: float) -> Trial:
    """The plan with what it gave."""
    flops = float(task.units.flops(plan.kept))
    loss = float(measured.loss) if math.isfinite(measured.loss) else None
    reward = None
    if loss is not None:
        reward = -(loss - task.base_loss) / task.base_loss - section.penalty * max(0.0, flops / task.target - 1)
    found = {"flops": flops, "loss": loss, "reward": reward, "seconds": seconds, "compute": float(measured.compute)}
    return Trial(**asdict(plan), **found)


def _best(bank: MemoryBank, group: int) -> Trial:
    """The trial with the highest reward."""
    trials = [trial for trial in bank.trials(group) if trial.reward is not None]
    if not trials:
        raise UserError(
            f"experts.search: no candidate of group {group} had a finite loss; lower search.recovery.learning_rate, or "
            "check that the base's own loss is finite"
        )
    return max(trials, key=lambda trial: trial.reward)
