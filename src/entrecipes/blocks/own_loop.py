"""Pruning in a training loop of one's own: try it on a pipeline, take it back, or make it so."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin

from entrecipes.blocks.scores import BlockScores
from entrecipes.blocks.selection import Selection
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError


class AppliedPruning:
    """Blocks that are skipped until `undo` or `commit`; also a context manager, which undoes at its end.

    Attributes:
        removed: Indices of the blocks, in the order in which they run.
    """

    def __init__(self, stack: BlockStack, removed: Iterable[int]) -> None:
        self.removed = sorted(removed)
        self._stack, self._skipping = stack, ExitStack()
        self._skipping.enter_context(stack.skipped(*self.removed))

    def undo(self) -> None:
        """The model is as it was before, bit for bit."""
        self._skipping.close()

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


def apply_pruning(
    pipeline: DiffusionPipeline | ModelMixin,
    remove: Collection[int] | None = None,
    *,
    scores: BlockScores | None = None,
    score: str = "loss_rise",
    ratio: float = 0.5,
    keep: Collection[int] = (0, -1),
    cap: tuple[int, int] | None = None,
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

    Raises:
        UserError: Unless one of `remove` and `scores` is given; for blocks that can't go; for too large a ratio.
    """
    if (remove is None) == (scores is None):
        raise UserError("apply_pruning: give exactly one of `remove` (block indices) and `scores` (of score_blocks)")
    model = pipeline
    if isinstance(pipeline, DiffusionPipeline):
        model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    stack = BlockStack(model)
    if scores is not None:
        if len(scores.paths) != len(stack):
            raise UserError(f"scores: of {len(scores.paths)} blocks, but the model has {len(stack)}; measure it again")
        selection = Selection(stack.blocks, keep, cap)
        values = dict(enumerate(scores.score(score).tolist()))
        remove = selection.lowest(values, selection.target(ratio))
    stack.check_removable(remove)
    return AppliedPruning(stack, remove)
