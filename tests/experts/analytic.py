"""A network whose loss and cost are known in closed form, to search without training; run as a script, it searches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from entrecipes.errors import UserError
from entrecipes.experts.proxy_pruning import Measured, MemoryBank, Task, search
from entrecipes.recipe.base import build, choice
from entrecipes.recipe.experts import Search


@dataclass(frozen=True)
class Unit:
    """A unit with a linear cost."""

    path: str
    flops: float
    atoms: int = 16
    kind: str = "widths"


@dataclass(frozen=True)
class Linear:
    """Units with a linear cost, exact; what else the network does costs `rest`."""

    units: tuple[Unit, ...]
    rest: float

    @property
    def base_flops(self) -> float:
        """FLOPs of the whole network."""
        return self.flops([unit.atoms for unit in self.units])

    @property
    def least(self) -> float:
        """FLOPs with one atom in each unit."""
        return self.flops([1] * len(self.units))

    def flops(self, kept: Sequence[int]) -> float:
        """FLOPs with so many atoms."""
        return self.rest + sum(unit.flops * number for unit, number in zip(self.units, kept, strict=True))

    def project(self, shares: Sequence[float], target: float, tolerance: float) -> tuple[int, ...]:
        """Shift all shares by the same amount until the cost is right, then round."""
        if self.least > target * (1 + tolerance):
            raise UserError(f"units: the least is {self.least}")
        atoms = np.array([unit.atoms for unit in self.units])
        low, high = -1.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            kept = np.clip(np.round((np.array(shares) + middle) * atoms), 1, atoms).astype(int)
            low, high = (low, middle) if self.flops(kept) > target else (middle, high)
        kept = np.clip(np.round((np.array(shares) + low) * atoms), 1, atoms).astype(int).tolist()
        for unit in sorted(range(len(kept)), key=lambda unit: self.units[unit].flops):
            if kept[unit] < atoms[unit] and abs(self.flops(kept) / target - 1) > tolerance:
                kept[unit] += 1
        assert abs(self.flops(kept) / target - 1) <= tolerance
        return tuple(kept)


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
        self.units = Linear(tuple(Unit(f"unit{u}", float(cost)) for u, cost in enumerate(costs)), rest=10.0)
        self.target = ratio * self.units.base_flops
        self.measured: list[tuple[int, ...]] = []

    def shares(self, kept: Sequence[int]) -> np.ndarray:
        """Atoms as shares."""
        return np.array(kept) / [unit.atoms for unit in self.units.units]

    def loss(self, kept: Sequence[int]) -> float:
        """Of a network with so many atoms."""
        return float(0.5 + self.a @ (1 - self.shares(kept)) ** 2)

    def evaluate(self, kept: tuple[int, ...]) -> Measured:
        """The loss, at one FLOP for an atom."""
        self.measured.append(kept)
        return Measured(self.loss(kept), float(sum(kept)))

    def optimum(self, least: float = 1 / 16) -> float:
        """The least loss at the budget, with shares of any fineness."""
        costs = np.array([unit.flops * unit.atoms for unit in self.units.units])
        low, high = 0.0, 1e6
        for _ in range(200):
            pressure = (low + high) / 2
            shares = np.clip(1 - pressure * costs / self.a, least, 1)
            low, high = (pressure, high) if self.units.rest + costs @ shares > self.target else (low, pressure)
        return float(0.5 + self.a @ (1 - shares) ** 2)

    def task(self, seed: int = 0, group: int = 0) -> Task:
        """The task, with an importance that says nothing."""
        number = len(self.a)
        return Task(
            group=SimpleNamespace(number=group),
            units=self.units,
            importance=[1 / number] * number,
            target=self.target,
            base_loss=0.5,
            seed=seed,
        )


def section(proposer: str = "evolution", **keys: object) -> Search:
    """A search by a proposer."""
    return Search(proposer={"type": proposer}, **keys)


def run(problem: Problem, how: Search, path: Path | None = None, seed: int = 0, evaluate: Callable | None = None):
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
