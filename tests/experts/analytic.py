"""A network whose loss and cost are known in closed form, to search without training; run as a script, it searches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from entrecipes.experts.memory import Trial
from entrecipes.experts.projection import Projection
from entrecipes.experts.proxy_pruning import Measured, MemoryBank, Task, search
from entrecipes.recipe.base import build, choice
from entrecipes.recipe.experts import Search

ATOMS = 16


class Linear:
    """Units that cost the same for each atom, and what else there is; fitted to budgets as real ones are."""

    def __init__(self, costs: Sequence[float], rest: float) -> None:
        parts = [(f"unit{u}", float(cost)) for u, cost in enumerate(costs)]
        same = {"kind": "widths", "atoms": ATOMS, "parent": None}
        self.units = tuple(SimpleNamespace(path=path, flops=cost, **same) for path, cost in parts)
        self.base_flops = rest + ATOMS * float(sum(costs))
        outside, no = np.full(len(parts), -1), np.zeros(len(parts), dtype=bool)
        atoms = np.full(len(parts), ATOMS)
        self.projection = Projection(atoms, np.array(costs), outside, no, (), self.base_flops)

    def flops(self, kept: Sequence[int]) -> float:
        """FLOPs with so many atoms."""
        return self.projection.flops(np.array(kept))

    def project(self, shares: Sequence[float], target: float, tolerance: float) -> tuple[int, ...]:
        """See `Units.project`."""
        return self.projection.project(np.array(shares), target, tolerance)


class Problem:
    """loss = 0.5 + sum_u a_u (1 - share_u)^2 under a linear cost: its optimum is known by water-filling.

    Args:
        seed: Of a_u and of the costs, both spread over an order of magnitude and more.
        units: Number of units.
        ratio: Budget as a share of the whole network's FLOPs.
    """

    def __init__(self, seed: int, units: int = 10, ratio: float = 0.6) -> None:
        rng = np.random.default_rng([17, seed])
        self.a = 10 ** rng.uniform(-1.5, 0.5, units) / units
        costs = 10 ** rng.uniform(-0.5, 0.5, units)
        self.units = Linear(costs, rest=10.0)
        self.target = ratio * self.units.base_flops
        self.measured: list[tuple[int, ...]] = []

    def shares(self, kept: Sequence[int]) -> np.ndarray:
        """Atoms as shares."""
        return np.array(kept) / ATOMS

    def loss(self, kept: Sequence[int]) -> float:
        """Of a network with so many atoms."""
        return float(0.5 + self.a @ (1 - self.shares(kept)) ** 2)

    def evaluate(self, kept: tuple[int, ...]) -> Measured:
        """The loss, at one FLOP for an atom."""
        self.measured.append(kept)
        return Measured(self.loss(kept), float(sum(kept)))

    def optimum(self) -> float:
        """The least loss at the budget, with shares of any fineness."""
        costs = np.array([unit.flops * unit.atoms for unit in self.units.units])
        rest = self.units.base_flops - costs.sum()
        low, high = 0.0, 1e6
        for _ in range(200):
            pressure = (low + high) / 2
            shares = np.clip(1 - pressure * costs / self.a, 1 / ATOMS, 1)
            low, high = (pressure, high) if rest + costs @ shares > self.target else (low, pressure)
        return float(0.5 + self.a @ (1 - shares) ** 2)

    def task(self, seed: int = 0, group: int = 0) -> Task:
        """The task, with an importance that says nothing."""
        number = len(self.a)
        return Task(
            group=SimpleNamespace(number=group, log_sigma=(-1.0, 1.0)),
            units=self.units,
            importance=[1 / number] * number,
            target=self.target,
            base_loss=0.5,
            seed=seed,
        )


def section(proposer: str = "evolution", **keys: object) -> Search:
    """A search by a proposer."""
    return Search(proposer={"type": proposer}, **keys)


def run(
    problem: Problem, how: Search, path: Path | None = None, seed: int = 0, evaluate: Callable | None = None
) -> tuple[Trial, MemoryBank]:
    """Search; gives the best trial and the bank."""
    bank = MemoryBank(path)
    proposer = build("proposer", how.proposer)
    assert proposer.name == choice("proposer", how.proposer.type).name
    return search(how, problem.task(seed), evaluate or problem.evaluate, bank, proposer), bank


if __name__ == "__main__":  # analytic.py BANK PROPOSER SECONDS: a search whose trials take so many seconds

    def slow(kept: tuple[int, ...]) -> Measured:
        """The loss, late."""
        time.sleep(float(sys.argv[3]))
        return Problem(3).evaluate(kept)

    run(Problem(3), section(sys.argv[2], rounds=6), Path(sys.argv[1]), evaluate=slow)
