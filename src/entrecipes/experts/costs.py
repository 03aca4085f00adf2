"""What a TDC run costs in training and in sampling, and what its budget leaves for the experts.

Costs are FLOPs of matrix products and convolutions, as torch's counter has them. Training on one image counts as 3
forward passes: one forward, two backward (input and weight gradients).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from entrecipes.diffusion.path import GaussianPath, VpPath
from entrecipes.errors import UserError
from entrecipes.experts.grouping import Group
from entrecipes.recipe.experts import TdcSection

TRAINING_PASSES = 3
"""What training on an image costs, in forward passes."""


@dataclass(frozen=True)
class Costs:
    """What a TDC run costs, in FLOPs, against one base that is trained for the whole budget.

    Args:
        base_images: Images that the base is trained on.
        images: Images that each expert is trained on, expert 0 first.
        base: Training the base.
        search: Searching the networks.
        experts: Training them.
        budget: Training a base for all of `training.images`.
        base_step: A forward pass of the base for one sample.
        expert_step: The experts' mean over sampling steps.
    """

    base_images: int
    images: tuple[int, ...]
    base: float
    search: float
    experts: float
    budget: float
    base_step: float
    expert_step: float

    @property
    def total(self) -> float:
        """All training, the search included."""
        return self.base + self.search + self.experts

    @property
    def ratio(self) -> float:
        """Sampling FLOPs as a share of the base's."""
        return self.expert_step / self.base_step

    def to_row(self) -> dict[str, dict[str, float]]:
        """As plain numbers, for plan.json and run.json."""
        training = {key: getattr(self, key) for key in ("base", "search", "experts", "total", "budget")}
        sampling = {"base": self.base_step, "experts": self.expert_step, "ratio": self.ratio}
        return {"training_flops": training, "sampling_flops": sampling}


def base_images(section: TdcSection, images: int, batch_size: int = 1) -> int:
    """Images that the base is trained on: its share of the budget in whole batches, at least one."""
    return max(1, _whole(section.base_share * images / batch_size)) * batch_size


def spend(
    section: TdcSection,
    groups: Sequence[Group],
    base_flops: float,
    flops_of_networks: Sequence[float],
    images: int,
    search_flops: float,
    batch_size: int,
) -> list[int]:
    """Images that each expert is trained on, in whole batches; what they cost is shared out by the groups' `part`.

    With `spend: flops`, base, search and experts together never cost more than a base trained for all `images`, and
    less only by the batches that would not be whole. With `spend: images` (published), the experts share the images
    that such a base would still see, and the search comes on top.

    Args:
        section: Shares of the budget.
        groups: The groups.
        base_flops: A forward pass of the base for one sample.
        flops_of_networks: The same of each expert, expert 0 first.
        images: The whole budget, `training.images`.
        search_flops: What the search has cost, or may cost.
        batch_size: Images of an optimizer step.

    Raises:
        UserError: When an expert is left less than one batch.
    """
    rest = images - base_images(section, images, batch_size)
    if section.spend == "images":
        parts = [rest * _part(group) / batch_size for group in groups]
    else:
        left = TRAINING_PASSES * base_flops * rest - search_flops
        if left <= 0:
            raise UserError(
                f"experts.search: it costs {search_flops:.3g} FLOPs, and base_share leaves "
                f"{left + search_flops:.3g} for search and experts; lower search.rounds, search.candidates, "
                "search.recovery.steps or base_share, or raise training.images"
            )
        parts = [
            left * _part(group) / (TRAINING_PASSES * flops * batch_size)
            for group, flops in zip(groups, flops_of_networks, strict=True)
        ]
    spent = [_whole(part) * batch_size for part in parts]
    if 0 in spent:
        raise UserError(
            f"experts.groups: the budget leaves expert {spent.index(0)} less than one batch of {batch_size} images; "
            "raise training.images, take fewer or wider groups, or lower base_share or the search"
        )
    return spent


def expected_costs(
    section: TdcSection,
    groups: Sequence[Group],
    base_flops: float,
    images: int,
    search_flops: float = 0.0,
    steps: Sequence[float] | None = None,
    flops_of_networks: Sequence[float] | None = None,
    batch_size: int = 1,
) -> Costs:
    """What a run costs: expected from the budgets, or exactly, of the networks that were found.

    Args:
        section: Shares of the budget.
        groups: The groups.
        base_flops: A forward pass of the base for one sample.
        images: The whole budget, `training.images`.
        search_flops: What the search costs.
        steps: How the sampling steps fall on the experts, expert 0 first, in any unit (such as `calls`); None: as the
            groups' shares of the scheduler's training time.
        flops_of_networks: A forward pass of each expert for one sample; None: their budgets.
        batch_size: Images of an optimizer step.

    Raises:
        UserError: As `spend`.
    """
    flops = [group.ratio * base_flops for group in groups] if flops_of_networks is None else flops_of_networks
    spent = spend(section, groups, base_flops, flops, images, search_flops, batch_size)
    steps = [group.steps for group in groups] if steps is None else steps
    first = base_images(section, images, batch_size)
    return Costs(
        base_images=first,
        images=tuple(spent),
        base=TRAINING_PASSES * base_flops * first,
        search=search_flops,
        experts=TRAINING_PASSES * sum(count * cost for count, cost in zip(spent, flops, strict=True)),
        budget=TRAINING_PASSES * base_flops * images,
        base_step=base_flops,
        expert_step=sum(count * cost for count, cost in zip(steps, flops, strict=True)) / sum(steps),
    )


def _part(group: Group) -> float:
    return group.steps if group.part is None else group.part


def _whole(part: float) -> int:
    """Rounded down, but not for the rounding of floats."""
    return math.floor(round(part, 9))


def lines(groups: Sequence[Group], costs: Costs, path: GaussianPath) -> list[str]:
    """What to tell before a run starts: a line for each group, then training and sampling against the base alone."""
    whole = isinstance(path, VpPath)
    ends = path.timestep(torch.tensor([group.log_sigma for group in groups], dtype=torch.float64)).tolist()
    told = []
    for group, (low, high), images in zip(groups, ends, costs.images, strict=True):
        last = math.ceil(high) - 1 if group.number else math.ceil(high)
        times = f"timesteps {math.ceil(low)} to {last}" if whole else f"timesteps {low:.4g} to {high:.4g}"
        sigma = " to ".join(f"{math.exp(level):.3g}" for level in group.log_sigma)
        told.append(
            f"expert {group.number}: sigma {sigma}, {times}, {group.steps:.1%} of the steps, "
            f"{group.ratio:.3g} of the base's FLOPs, {images:,} images"
        )
    parts = {name: getattr(costs, name) / costs.budget for name in ("base", "search", "experts", "total")}
    return [
        *told,
        f"training: base {parts['base']:.1%} ({costs.base_images:,} images), search {parts['search']:.1%}, experts "
        f"{parts['experts']:.1%}, in all {parts['total']:.1%} of the {costs.budget:.3g} FLOPs of one base trained for "
        f"the whole budget ({TRAINING_PASSES} forward passes an image)",
        f"sampling: {costs.expert_step:.3g} FLOPs a step on average, {costs.ratio:.1%} of the base's "
        f"{costs.base_step:.3g}",
    ]
