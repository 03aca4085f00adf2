"""Who proposes plans, a tuple of shares each; the search projects them onto the budget, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import nnls

from entrecipes.errors import UserError
from entrecipes.recipe.experts import (
    EvolutionProposer,
    RandomProposer,
    SensitivityProposer,
    TpeProposer,
    UniformProposer,
)

if TYPE_CHECKING:
    from entrecipes.experts.proxy_pruning import Task, Trial

Shares = tuple[float, ...]

POWERS = (1.0, 0.5, 2.0, 0.75, 1.5, 0.25)
"""How strictly FLOPs follow need: 1 is the optimum of the quadratic model, 0 would be the same share everywhere."""


class Uniform:
    """The same share everywhere: one plan, after which the search ends."""

    name, last_note, when_short = "uniform", "", "stop"

    def __init__(self, section: UniformProposer) -> None:
        pass

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Shares]:
        """The uniform plan."""
        return [task.uniform()]


class Random:
    """A level for each unit by chance, all equally likely."""

    name, last_note, when_short = "random", "", "again"

    def __init__(self, section: RandomProposer) -> None:
        pass

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Shares]:
        """`count` plans."""
        return [tuple(rng.choice(task.levels, len(task.units.units)).tolist()) for _ in range(count)]


class Sensitivity:
    """Halve each unit in turn, then keep more of what hurts more per FLOP.

    First come plans that are uniform but for one unit, which keeps half as much, or is a block that goes; the units
    with the most FLOPs first, for at most half of the search. They are trials as any other, at the budget: projection
    gives the others what the one gave up. Then the losses of all trials are fitted by c + sum_u a_u (1 - share_u)^2,
    a_u >= 0, drawn to the criterion's importance where the trials say little, and the shares that minimise this at the
    budget are proposed, with milder and stricter ones. When a new fit gives nothing new, the search ends.
    """

    name, last_note, when_short, whole_memory = "sensitivity", "", "stop", True

    def __init__(self, section: SensitivityProposer) -> None:
        pass

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Shares]:
        """The plans that halve a unit, as far as they are not shown, then those of the fit."""
        shares, savings = task.uniform(), _savings(task)
        units = sorted(range(len(shares)), key=lambda unit: -savings[unit])
        halves = [0.0 if unit.kind == "blocks" else shares[u] / 2 for u, unit in enumerate(task.units.units)]
        probes = [(*shares[:u], halves[u], *shares[u + 1 :]) for u in units[: task.rounds * task.candidates // 2]]
        measured = {trial.shares for trial in shown}
        need = _fitted_need(task, shown)
        return [probe for probe in probes if probe not in measured] + [_fill(task, need, power) for power in POWERS]


class Evolution:
    """Mu + lambda: children of tournament winners among the plans in memory, by uniform crossover and mutation.

    It begins from the uniform plan and from two that follow the criterion's importance; mu = lambda = `candidates`.
    """

    name, last_note, when_short = "evolution", "", "again"

    def __init__(self, section: EvolutionProposer) -> None:
        self.mutation = section.mutation

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Shares]:
        """The seeds in round 0, then children of the best of `shown`, or of the seeds where nothing is shown."""
        need = _importance(task)
        seeds = [task.uniform(), _fill(task, need, 1.0), _fill(task, need, 0.5)]
        best = sorted(shown, key=lambda trial: -trial.reward)[: max(2, task.candidates)]
        # what the network really has, after projection, is what gave the reward
        parents = [_kept_shares(task, trial) for trial in best] or [np.array(seed) for seed in seeds]
        children = [self._child(task, parents, bool(best), rng) for _ in range(count)]
        return (seeds[1:] if round == 0 else []) + children

    def _child(self, task: Task, parents: list[np.ndarray], ranked: bool, rng: np.random.Generator) -> Shares:
        """One child of two parents, which stand in order of reward if `ranked`."""

        def winner() -> np.ndarray:
            first, second = rng.integers(len(parents), size=2)
            return parents[min(first, second) if ranked else first]

        mother, father = winner(), winner()
        child = np.where(rng.random(len(mother)) < 0.5, mother, father)
        moves = rng.random(len(child)) < self.mutation
        up = rng.random(len(child)) < 0.5
        moves[rng.integers(len(child))] = True  # a copy of a parent is no trial
        for unit in np.flatnonzero(moves):
            child[unit] = _neighbour(task, unit, child[unit], up[unit])
        return tuple(child.tolist())


class Tpe:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by optuna: a new study of the trials shown each time.

    It is shown all trials where it is shown any: it compares where good and bad ones lie.

    Raises:
        UserError: If optuna is not installed.
    """

    name, last_note, when_short, whole_memory = "tpe", "", "again", True

    def __init__(self, section: TpeProposer) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError(
                "experts.search.proposer: tpe needs optuna: type `pip install 'entrecipes[search]'`, or take "
                "{type: evolution}"
            ) from None
        self.optuna = optuna

    def propose(
        self, task: Task, round: int, shown: Sequence[Trial], count: int, rng: np.random.Generator
    ) -> list[Shares]:
        """`count` plans, each of which knows of those before it."""
        optuna = self.optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        low, high = min(task.levels), max(task.levels)
        names = [f"unit {unit}" for unit in range(len(task.units.units))]
        space = {name: optuna.distributions.FloatDistribution(low, high) for name in names}
        sampler = optuna.samplers.TPESampler(
            seed=int(rng.integers(2**31)), n_startup_trials=2 * task.candidates, constant_liar=True
        )
        study = optuna.create_study(sampler=sampler, direction="maximize")
        for trial in shown:
            shares = _kept_shares(task, trial).clip(low, high).tolist()
            params = dict(zip(names, shares, strict=True))
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=trial.reward))
        asked = [study.ask(space) for _ in range(count)]
        return [tuple(trial.params[name] for name in names) for trial in asked]


def _kept_shares(task: Task, trial: Trial) -> np.ndarray:
    """What each unit of a trial's network really keeps, as a share [units]."""
    return np.array(trial.kept) / [unit.atoms for unit in task.units.units]


def _costs(task: Task) -> np.ndarray:
    """FLOPs of each unit of the base, a block's without what is in it [units]."""
    return np.array([unit.flops * unit.atoms for unit in task.units.units])


def _savings(task: Task) -> np.ndarray:
    """FLOPs that go with each unit of the base: with a block, those in it, too; above 0 [units]."""
    costs = _costs(task)
    savings = costs.copy()
    for unit, cost in zip(task.units.units, costs, strict=True):
        if unit.parent is not None:
            savings[unit.parent] += cost
    return np.maximum(savings, 1e-3 * savings.max())


def _importance(task: Task) -> np.ndarray:
    """The criterion's importance of the units, sum 1; all the same where it knows none [units]."""
    importance = np.maximum(np.array(task.importance, dtype=float), 0)
    return importance / importance.sum() if importance.sum() > 0 else np.full(len(importance), 1 / len(importance))


def _neighbour(task: Task, unit: int, share: float, up: bool) -> float:
    """The next level above or below that gives the unit another number of atoms; at an end, the one before it."""
    atoms = task.units.units[unit].atoms
    counts = sorted({int(level * atoms + 0.5) for level in task.levels})
    now = int(share * atoms + 0.5)
    above, below = [count for count in counts if count > now], [count for count in counts if count < now]
    step = (above[:1] or below[-1:]) if up else (below[-1:] or above[:1])
    return (step or [now])[0] / atoms


def _fill(task: Task, need: np.ndarray, power: float) -> Shares:
    """Water-filling: the shares that minimise sum_u need_u (1 - share_u)^2 at the budget, for power 1.

    Its condition is 1 - share_u = pressure * FLOPs_u / need_u within the range of levels; `power` is that of the ratio.
    """
    costs = _costs(task)
    ratio = (_savings(task) / np.maximum(need, 1e-3 * need.max())) ** power
    budget = task.target - (task.units.base_flops - costs.sum())
    weak, strong = 0.0, 1 / ratio.min()
    for _ in range(60):
        pressure = (weak + strong) / 2
        shares = 1 - np.minimum(pressure * ratio, 1 - min(task.levels))
        weak, strong = (pressure, strong) if costs @ shares > budget else (weak, pressure)
    return tuple(shares.tolist())


def _fitted_need(task: Task, shown: Sequence[Trial]) -> np.ndarray:
    """a >= 0 of loss = c + sum_u a_u (1 - share_u)^2 [units], by least squares with a weak pull to the importance."""
    prior = _importance(task)
    if len(shown) < 2:
        return prior
    missing = np.stack([(1 - _kept_shares(task, trial)) ** 2 for trial in shown])
    loss = np.array([trial.loss for trial in shown])
    missing, loss = missing - missing.mean(0), loss - loss.mean()
    spread = (missing @ prior).std()
    if not spread > 0 or not loss.std() > 0:
        return prior
    pull = 0.1 * np.sqrt((missing**2).sum(0).mean())
    rows = np.concatenate([missing, pull * np.eye(len(prior))])
    need, _ = nnls(rows, np.concatenate([loss, pull * prior * loss.std() / spread]))
    return need if need.max() > 0 else prior
