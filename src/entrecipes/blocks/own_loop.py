"""Pruning in a training loop of one's own: try it on a pipeline, take it back, or make it so."""

from __future__ import annotations

import atexit
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from entrecipes.blocks.scores import BlockScores, model_fingerprint
from entrecipes.blocks.selection import Selection
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError

_APPLIED: WeakSet[nn.Module] = WeakSet()
"""Models in which blocks are skipped by an `AppliedPruning`."""


class AppliedPruning:
    """Blocks that are skipped until `undo` or `commit`; also a context manager, which undoes at its end.

    Until then, models compiled by torch run uncompiled, and `save_pretrained` saves all blocks.

    Attributes:
        removed: Indices of the blocks, in the order in which they run.

    Raises:
        UserError: When blocks of the model are skipped already.
    """

    def __init__(self, stack: BlockStack, removed: Iterable[int]) -> None:
        if stack.model in _APPLIED:
            raise UserError(
                "apply_pruning: blocks of this model are skipped already; `undo()` or `commit()` that first"
            )
        _APPLIED.add(stack.model)
        self.removed = sorted(removed)
        self._stack, self._skipping = stack, ExitStack()
        self._skipping.enter_context(stack.skipped(*self.removed))
        atexit.register(self.undo)

    def __repr__(self) -> str:
        return f"AppliedPruning(removed={self.removed})"

    def undo(self) -> None:
        """The model is as it was before, bit for bit."""
        atexit.unregister(self.undo)
        self._skipping.close()
        _APPLIED.discard(self._stack.model)

    def commit(self) -> None:
        """Take the blocks out for good: smaller in memory and on disk, saved and loaded as usual.

        Build your optimizer, your averaged model and any distributed wrapper anew afterwards.
        """
        self.undo()
        self._stack.remove(self.removed)

    def __enter__(self) -> AppliedPruning:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def denoiser_of(pipeline: DiffusionPipeline | ModelMixin) -> ModelMixin:
    """The `transformer` or `unet` of a pipeline; a model itself."""
    if not isinstance(pipeline, DiffusionPipeline):
        return pipeline
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def apply_pruning(
    pipeline: DiffusionPipeline | ModelMixin,
    remove: Collection[int] | None = None,
    *,
    scores: BlockScores | None = None,
    score: str = "loss_rise",
    ratio: float = 0.5,
    keep: Collection[int] = (0, -1),
    cap: tuple[int, int] | None = None,
    trained_since: bool = False,
) -> AppliedPruning:
    """Skip blocks of a pipeline's denoiser, named or chosen by a score; weights and state-dict keys stay as they are.

    Args:
        pipeline: A diffusers pipeline with a `transformer` or `unet`, or such a model.
        remove: Blocks to skip; None: chosen by `scores`.
        scores: What `score_blocks` gave for this model.
        score: Which of them ranks, the lowest first; "ced" is EntPruner's own.
        ratio: Share of the blocks, rounded to whole ones.
        keep: Blocks that stay whatever their score.
        cap: `(size, most)`: of each group of `size` neighbours at most `most` go.
        trained_since: Take scores that were measured with other weights of this model.

    Raises:
        UserError: Unless one of `remove` and `scores` is given; for blocks that can't go; for too large a ratio.
    """
    if (remove is None) == (scores is None):
        raise UserError("apply_pruning: give exactly one of `remove` (block indices) and `scores` (of score_blocks)")
    stack = BlockStack(denoiser_of(pipeline))
    if scores is not None:
        if scores.paths != tuple(block.paths[0] for block in stack.blocks):
            raise UserError(
                f"scores: of {len(scores.paths)} other blocks than the model's {len(stack)}; measure it again"
            )
        if not trained_since and scores.origin.get("model_fingerprint") != model_fingerprint(stack.model):
            raise UserError(
                "scores: of a model with other weights; measure it again, or say trained_since=True if it is the same "
                "model trained on"
            )
        selection = Selection(stack.blocks, keep, cap)
        values = dict(enumerate(scores.score(score).tolist()))
        remove = selection.lowest(values, selection.target(ratio))
    stack.check_removable(remove)
    return AppliedPruning(stack, remove)
