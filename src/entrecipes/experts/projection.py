"""Fit a plan to a budget: the whole numbers of atoms nearest to given shares, at given FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrecipes.errors import UserError

SMALLEST = 1e-3
"""Of the largest share: what a share of zero counts as, so that its unit can still fill up."""

FEW = 3
"""Atoms of a unit that change at once where single ones don't fit the budget."""


@dataclass(frozen=True, eq=False)
class Projection:
    """Units as plain numbers, one entry each.

    Args:
        atoms: How many there are, int.
        costs: FLOPs of an atom; of a block, of what is left of it beside its units.
        parents: The block that takes this unit with it, or -1.
        blocks: Which units are blocks, bool.
        anchors: Blocks of which at least one stays.
        base: FLOPs of the whole model.
    """

    atoms: np.ndarray
    costs: np.ndarray
    parents: np.ndarray
    blocks: np.ndarray
    anchors: tuple[int, ...]
    base: float

    def flops(self, kept: np.ndarray) -> float:
        """Of a plan."""
        return float(self.base - ((self.atoms - kept * self._alive(kept > 0)) * self.costs).sum())

    @property
    def least(self) -> float:
        """FLOPs of the smallest network."""
        one = np.ones_like(self.atoms)
        family = np.array([self.costs[(self.parents == i) | (np.arange(len(one)) == i)].sum() for i in self.anchors])
        on = ~self.blocks
        if self.anchors:
            on[self.anchors[int(family.argmin())]] = True
        return self.flops(one * on)

    def project(self, shares: np.ndarray, target: float, tolerance: float) -> tuple[int, ...]:
        """See `Units.project`."""
        if self.least > target * (1 + tolerance):
            raise UserError(
                f"experts: the smallest network that experts.search.units allows costs {self.least / self.base:.1%} of "
                f"the base's FLOPs, more than the {target / self.base:.1%} asked for; take fewer experts.groups, a "
                "larger experts.k, or more kinds of experts.search.units"
            )
        shares = np.maximum(shares / (shares.max() or 1), SMALLEST)
        on = self._blocks(shares, target, tolerance)
        want = self._wanted(shares, on, target)
        kept = np.floor(want + 0.5).astype(int)
        kept = self._rounded(kept, want, target, tolerance)
        for blocks_too in (False, True):
            kept = self._exchanged(kept, target, tolerance, blocks_too)
        reached = self.flops(kept)
        if abs(reached - target) > tolerance * target:
            raise UserError(
                f"experts: nothing within {tolerance:.1%} of {target / self.base:.1%} of the base's FLOPs was found; "
                f"the nearest has {reached / self.base:.1%}; raise experts.search.tolerance, or add finer kinds of "
                "experts.search.units"
            )
        return tuple(kept.tolist())

    def _alive(self, on: np.ndarray) -> np.ndarray:
        """Which units are there, where `on` says which blocks are."""
        there = np.where(self.blocks, on, True)
        return there & ((self.parents < 0) | there[self.parents])

    def _blocks(self, shares: np.ndarray, target: float, tolerance: float) -> np.ndarray:
        """Which units are there: blocks with enough share, and as few changes as make the budget reachable."""
        on = ~self.blocks | (shares >= 0.5)
        rising = sorted(np.flatnonzero(self.blocks).tolist(), key=lambda i: (shares[i], -i))
        if self.anchors and not on[list(self.anchors)].any():
            on[max(self.anchors, key=lambda i: (shares[i], -i))] = True
        for i in rising:
            if self.flops(self._alive(on) * 1) <= target * (1 + tolerance):
                break
            if i not in self.anchors or on[list(self.anchors)].sum() > 1:
                on[i] = False
        for i in reversed(rising):
            if self.flops(self._alive(on) * self.atoms) >= target * (1 - tolerance):
                break
            on[i] = True
        return self._alive(on)

    def _wanted(self, shares: np.ndarray, alive: np.ndarray, target: float) -> np.ndarray:
        """The atoms, not yet whole, that cost the target: all shares times one factor."""

        def at(factor: float) -> np.ndarray:
            inner = np.clip(factor * shares * self.atoms, 1, self.atoms)
            return np.where(self.blocks, 1.0, inner) * alive

        low, high = 0.0, 1 / shares.min()
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.flops(at(middle)) <= target else (low, middle)
        return at(high)

    def _rounded(self, kept: np.ndarray, want: np.ndarray, target: float, tolerance: float) -> np.ndarray:
        """Move single atoms towards the target, those first whose rounding went furthest the other way."""
        kept = kept.copy()
        while abs(gap := self.flops(kept) - target) > tolerance * target:
            step = -1 if gap > 0 else 1
            free = ~self.blocks & (kept > 0) & (kept + step >= 1) & (kept + step <= self.atoms)
            free &= np.abs(gap + step * self.costs) < abs(gap)
            if not free.any():
                break
            kept[np.where(free, np.round(step * (want - kept), 9), -np.inf).argmax()] += step
        return kept

    def _exchanged(self, kept: np.ndarray, target: float, tolerance: float, blocks_too: bool) -> np.ndarray:
        """Make two changes at once, the pair that comes nearest to the target, as long as that helps."""
        while abs(gap := self.flops(kept) - target) > tolerance * target:
            plans = [kept, *self._changes(kept, blocks_too)]
            deltas = np.array([self.flops(plan) - self.flops(kept) for plan in plans])
            families = np.array([-1, *(self._family(plan != kept) for plan in plans[1:])])
            left = np.abs(gap + deltas[:, None] + deltas[None, :])
            left[families[:, None] == families[None, :]] = np.inf
            if self.anchors:
                more = np.array([(plan - kept)[list(self.anchors)].sum() for plan in plans])
                left[kept[list(self.anchors)].sum() + more[:, None] + more[None, :] < 1] = np.inf
            i, j = np.unravel_index(left.argmin(), left.shape)
            if not left[i, j] < abs(gap) * (1 - 1e-9):
                break
            kept = plans[i] + plans[j] - kept
        return kept

    def _changes(self, kept: np.ndarray, blocks_too: bool) -> list[np.ndarray]:
        """Plans that differ in a few atoms of a unit, or in a block with what is in it."""
        plans = []
        for i in range(len(kept)):
            if not self.blocks[i]:
                steps = [n for n in range(-FEW, FEW + 1) if n and kept[i] and 1 <= kept[i] + n <= self.atoms[i]]
                plans += [kept + step * (np.arange(len(kept)) == i) for step in steps]
            elif blocks_too:
                family = (self.parents == i) | (np.arange(len(kept)) == i)
                plans += [np.where(family, n, kept) for n in ([0] if kept[i] else [1, self.atoms])]
        return plans

    def _family(self, changed: np.ndarray) -> int:
        """The block that a change touches, or else the unit."""
        first = int(changed.argmax())
        return first if self.parents[first] < 0 else int(self.parents[first])
