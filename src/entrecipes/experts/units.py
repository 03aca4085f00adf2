"""What a denoiser can lose and still fit together: channels, heads, inner features and blocks, with what each costs.

A unit is an internal width that nothing else notices: no residual stream changes. So costs add up, and any plan that
says how many atoms of each unit stay is a network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError
from entrecipes.experts.projection import Projection
from entrecipes.information.proxies import flops_within
from entrecipes.models.slim import SLIM, narrow, slim, width_of

KINDS: dict[str, type[nn.Module]] = {"widths": ResnetBlock2D, "heads": Attention, "feed_forward": FeedForward}
"""The module behind each kind of unit; of `blocks`, these are resnet blocks, attentions or transformer blocks."""

FEATURES = 8
"""Largest number of inner features of a feed-forward layer that go together, and fewest such atoms of one."""


@dataclass(frozen=True)
class Unit:
    """One internal width of a model, or one block.

    Args:
        path: Of its module.
        kind: `widths` (atom: one group of the second norm of a resnet block, whose size stays), `heads` (one head),
            `feed_forward` (up to 8 inner features) or `blocks` (the block, for good: a transformer block with all that
            is in it, or the branch of a resnet block or of an attention with a shortcut).
        atoms: How many it has; one or more stay, unless its block goes.
        size: Channels or features of an atom; of a block 0.
        flops: Of one atom in a forward pass of one sample; of a block what its atoms leave.
        parent: Place of the unit of kind `blocks` that takes this one with it.
    """

    path: str
    kind: str
    atoms: int
    size: int
    flops: float
    parent: int | None = None

    @property
    def step(self) -> int:
        """What one atom is in the config key `widths`, which counts heads."""
        return 1 if self.kind == "heads" else self.size


@dataclass(frozen=True)
class Units:
    """The units of one stock model.

    Args:
        units: In the order down, middle, up, or of the transformer blocks; blocks before what is in them.
        base_flops: Of a forward pass of one sample of the whole model.
        model_class: The stock class.
        anchors: Units of kind `blocks` of which at least one stays; empty where a block that is no unit stays anyway.
    """

    units: tuple[Unit, ...]
    base_flops: float
    model_class: type[ModelMixin]
    anchors: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: ModelMixin, kinds: Collection[str], call: Callable[[nn.Module], Any]) -> Units:
        """Find the units of these kinds and measure them by torch's counter.

        Args:
            model: The whole network.
            kinds: Among `widths`, `heads`, `feed_forward`, `blocks`.
            call: Runs one forward pass of one sample of the model that it is given, of which it gets copies.

        Raises:
            UserError: For a model of another class, or one without units of these kinds.
        """
        if type(model) not in SLIM:
            names = " and ".join(known.__name__ for known in SLIM)
            raise UserError(f"experts: {names} can be made smaller, {type(model).__name__} can't; build one of those")
        found = _find(model, kinds)
        if not found:
            raise UserError(
                f"experts.search.units: {', '.join(kinds)}: this {type(model).__name__} has nothing of that kind to "
                "lose; add others of widths, heads, feed_forward, blocks"
            )
        total, costs = _measured(model, found, call)
        units = tuple(Unit(**{**vars(unit), "flops": cost}) for unit, cost in zip(found, costs, strict=True))
        resnets = (i for i, unit in enumerate(units) if isinstance(model.get_submodule(unit.path), ResnetBlock2D))
        return cls(units, float(total), type(model), tuple(i for i in resnets if units[i].kind == "blocks"))

    def flops(self, kept: Sequence[int]) -> float:
        """Of a forward pass of one sample when these many atoms of each unit stay (those of a lost block count 0)."""
        return self._projection.flops(np.asarray(kept))

    @property
    def least(self) -> float:
        """FLOPs of the smallest network that the units allow."""
        return self._projection.least

    def project(self, shares: Sequence[float], target: float, tolerance: float) -> tuple[int, ...]:
        """The kept atoms of each unit nearest to these shares, at given FLOPs; the same for the same arguments.

        All shares are scaled alike until the FLOPs fit, then rounded, those first whose rounding was the largest. A
        block goes where its share is below half of the largest one; more go, or come back, only where the FLOPs can't
        fit otherwise.

        Args:
            shares: Of each unit, at least 0; only their ratios matter.
            target: FLOPs of a forward pass of one sample.
            tolerance: How far from `target`, as a share of it.

        Raises:
            UserError: When no such network is found: the nearest reachable FLOPs and what to change.
        """
        return self._projection.project(np.asarray(shares, dtype=float), target, tolerance)

    @cached_property
    def _projection(self) -> Projection:
        return Projection(
            atoms=np.array([unit.atoms for unit in self.units]),
            costs=np.array([unit.flops for unit in self.units]),
            parents=np.array([-1 if unit.parent is None else unit.parent for unit in self.units]),
            blocks=np.array([unit.kind == "blocks" for unit in self.units]),
            anchors=self.anchors,
            base=self.base_flops,
        )


def cut(model: ModelMixin, units: Units, kept: Sequence[int], order: Sequence[Tensor]) -> ModelMixin:
    """A copy of the model without the atoms that are not kept, in its dtype, on its device; the model stays as it is.

    Args:
        model: What `units` was made of, trained since or not.
        units: Its units.
        kept: Atoms of each, as `Units.project` gives them.
        order: Of each unit its atoms, int64, the best first (`criteria.rankings`); those kept stay in their old order.

    Returns:
        A slim model, or where only transformer blocks are missing, a stock model.
    """
    result = copy.deepcopy(model)
    gone = {unit.path for unit, n in zip(units.units, kept, strict=True) if unit.kind == "blocks" and not n}
    renamed: dict[str, str] = {}
    if gone and isinstance(model, DiTTransformer2DModel):
        stack = BlockStack(result, trained=True)
        left = [block.paths[0] for block in stack.blocks if block.paths[0] not in gone]
        stack.remove([block.index for block in stack.blocks if block.paths[0] in gone])
        renamed = dict(zip(left, (block.paths[0] for block in stack.blocks), strict=True))
    widths, keep = {}, {}
    for unit, n, ranks in zip(units.units, kept, order, strict=True):
        if unit.kind == "blocks":
            if not n and not isinstance(model, DiTTransformer2DModel):
                widths[unit.path] = 0
        elif n < unit.atoms and (unit.parent is None or kept[unit.parent]):
            block = next((path for path in renamed if unit.path.startswith(f"{path}.")), "")
            path = renamed.get(block, "") + unit.path.removeprefix(block)
            widths[path] = n * unit.step
            atoms = ranks[:n].sort().values.cpu()
            keep[path] = (atoms[:, None] * unit.step + torch.arange(unit.step)).flatten()
    if widths:
        slim(result, widths, keep)
    return result


def _find(model: ModelMixin, kinds: Collection[str]) -> list[Unit]:
    """The units, without their FLOPs."""
    blocks: dict[str, int] = {}
    gone = _removable(model) if "blocks" in kinds else set()
    units: list[Unit] = []
    named = sorted(model.named_modules(), key=lambda entry: entry[0].partition(".")[0])  # down, mid, up: as they run
    for path, module in named:
        if path in gone:
            blocks[path] = len(units)
            units.append(Unit(path, "blocks", 1, 0, 0.0))
        kind = next((kind for kind in kinds if isinstance(module, KINDS.get(kind, ()))), None)
        atoms = _atoms(module) if kind else 1
        if atoms > 1:
            parent = next((i for block, i in blocks.items() if path == block or path.startswith(f"{block}.")), None)
            channels = module.to_q.out_features if kind == "heads" else width_of(module)
            units.append(Unit(path, kind, atoms, channels // atoms, 0.0, parent))
    return units


def _removable(model: ModelMixin) -> set[str]:
    """Paths of the blocks that can go."""
    if isinstance(model, DiTTransformer2DModel):
        return {block.paths[0] for block in BlockStack(model, trained=True).blocks if not block.pinned}
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, ResnetBlock2D) or (isinstance(module, Attention) and module.residual_connection)
    }


def _atoms(module: nn.Module) -> int:
    if isinstance(module, ResnetBlock2D):
        return module.norm2.num_groups
    width = width_of(module)
    if isinstance(module, Attention):
        return width
    sizes = [size for size in range(1, FEATURES + 1) if width % size == 0 and width >= size * FEATURES]
    return width // max(sizes, default=1)


def _measured(model: ModelMixin, units: list[Unit], call: Callable[[nn.Module], Any]) -> tuple[int, list[float]]:
    """FLOPs of the model, and of an atom of each unit: what is left when one atom is, or when the block is gone."""

    def count(widths: dict[str, int]) -> tuple[int, dict[str, int]]:
        thinned = copy.deepcopy(model)
        narrow(thinned, widths)
        return flops_within(lambda: call(thinned), {unit.path: thinned.get_submodule(unit.path) for unit in units})

    inner = [unit for unit in units if unit.kind != "blocks"]
    total, full = count({})
    _, thin = count({unit.path: unit.step for unit in inner})
    costs = [0.0 if unit.kind == "blocks" else (full[unit.path] - thin[unit.path]) / (unit.atoms - 1) for unit in units]
    branches = {unit.path: 0 for unit in units if unit.kind == "blocks" and isinstance(model, UNet2DModel)}
    _, left = count(branches) if branches else (0, dict.fromkeys(full, 0))
    for i, unit in enumerate(units):
        if unit.kind == "blocks":
            within = sum(costs[j] * other.atoms for j, other in enumerate(units) if other.parent == i)
            costs[i] = full[unit.path] - left[unit.path] - within
    return total, costs
