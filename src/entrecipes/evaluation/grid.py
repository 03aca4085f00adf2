"""The grid of samples to look at: images class by class, clips beside what they were asked for with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers import ModelMixin
from torch import Tensor

from entrecipes.diffusion.space import clip_parts
from entrecipes.evaluation.generation import balanced_labels
from entrecipes.evaluation.side_by_side import beside, hide, moving, strips, under

if TYPE_CHECKING:
    from entrecipes.evaluation.evaluator import Evaluator

GRID_COLUMNS = 10
SEEN_PIXELS = 96
"""Side to which the frames of clips are enlarged at most."""


@dataclass(frozen=True)
class SampleGrid:
    """Samples to look at."""

    pictures: Tensor
    """uint8 [n, 1 or 3, H, W], row by row."""
    columns: int
    texts: list[str] | None = None
    """Samples that are texts, as such."""
    moving: Tensor | None = None
    """Clips: one picture a frame, uint8 [F, 3, H, W]."""
    scale: int | None = None
    """Whole factor to enlarge pictures by; None: what makes them easy to see."""


def draw_grid(evaluator: Evaluator, model: ModelMixin) -> SampleGrid:
    """Sample as the evaluator's section says: one column a class, at most ten; clips beside what was asked for."""
    space, rows = evaluator.data.space, evaluator.section.grid
    if evaluator.components.family.kind == "clips":
        clips, condition = evaluator.clips(rows)
        samples = evaluator.samples(model, rows, condition)
        scale = max(1, SEEN_PIXELS // samples.shape[-1])
        real, poses, reference = clip_parts(clips)
        shown = (reference, poses, real, samples)
        return SampleGrid(strips(*shown), 1, moving=moving(*shown), scale=scale)
    if evaluator.components.family.kind == "stickers":
        clips, condition, captions = evaluator.captioned(rows)
        samples = evaluator.samples(model, rows, condition)
        shown = (hide(clips, condition.given.cpu()), clips, samples)
        scale = max(1, SEEN_PIXELS // samples.shape[-1])
        return SampleGrid(under(*shown), 1, texts=captions, moving=beside(*shown), scale=scale)
    columns = min(evaluator.data.num_classes or space.columns, GRID_COLUMNS)
    labels = balanced_labels(columns * rows, columns) if evaluator.data.num_classes else None
    samples = evaluator.samples(model, columns * rows, labels)
    return SampleGrid(space.pictures(samples), columns, texts=space.texts(samples))
