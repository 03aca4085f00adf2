"""In which order blocks are opened: by a score, by score per cost, or as baselines do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from entrecipes.blocks.cost import CostModel

TINY = 1e-6
"""What a block of no or negative score counts as, relative to the largest, so that its density still has an order."""


def by_score(scores: Sequence[float], opened: Sequence[int] = ()) -> list[int]:
    """The highest score first (signed: Ent-Prog's rule), equal ones as they run; what is open already stays in front.

    Returns:
        All blocks, in the order in which they are opened.
    """
    closed = [index for index in range(len(scores)) if index not in opened]
    return [*opened, *sorted(closed, key=lambda index: -scores[index])]


def without_scores(order: str, count: int, seed: int) -> list[int]:
    """The baselines: `random` (by the seed), `last_first` and `first_first`."""
    if order == "random":
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return list(range(count))[:: -1 if order == "last_first" else 1]


def cost_aware(scores: Sequence[float], costs: CostModel, below: bool = False, opened: Sequence[int] = ()) -> list[int]:
    """The most score per added step cost first: our own order.

    A block costs its weight gradients, and one below the floor also the input gradients of all blocks down to it. Once
    those are paid for, the blocks above cost little, so that blocks are weighed in bundles: a new floor with the best
    closed blocks above it. Of all sets of closed blocks the one of greatest density (summed score over added cost) is
    opened next, its own blocks in the order of their densities one by one, and so on.

    Args:
        scores: One per block, higher is better.
        costs: What a step costs.
        below: Whether gradients flow through all blocks anyway; a block then costs its weight gradients alone.
        opened: Blocks that are open already; they stay in front.

    Returns:
        All blocks, in the order in which they are opened.
    """
    least = TINY * (max(map(abs, scores)) or 1.0)
    gains = [max(score, least) for score in scores]
    order = list(opened)
    while len(order) < len(gains):
        bundle = densest(gains, costs, below, order)
        while bundle:
            best = max(bundle, key=lambda block: density([block], gains, costs, below, order))
            order.append(best)
            bundle.remove(best)
    return order


def density(
    bundle: Collection[int], gains: Sequence[float], costs: CostModel, below: bool, opened: Collection[int]
) -> float:
    """Summed gain of closed blocks per step cost that opening them adds."""
    added = costs.cost({*opened, *bundle}, below).total - costs.cost(set(opened), below).total
    return sum(gains[block] for block in bundle) / added


def densest(gains: Sequence[float], costs: CostModel, below: bool, opened: Collection[int]) -> list[int]:
    """The closed blocks of the greatest density together, the smallest such set.

    For each lowest block of the set, the others are the best by gain over weight cost: as a ratio of sums, the density
    is greatest for some number of them. For blocks above the floor that is the block alone.
    """
    closed = [block for block in range(len(gains)) if block not in opened]
    bundles = []
    for lowest in closed:
        above = sorted((b for b in closed if b > lowest), key=lambda b: gains[b] / costs.trained[b], reverse=True)
        bundles += [[lowest, *above[:number]] for number in range(len(above) + 1)]
    found = {tuple(bundle): density(bundle, gains, costs, below, opened) for bundle in bundles}
    top = max(found.values())
    return list(max(found, key=lambda bundle: (round(found[bundle] / top, 9), -len(bundle))))
