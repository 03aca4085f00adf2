"""`blocks:` which weights are trained, and from when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from entrecipes.recipe.adapters import AdapterSection, NoAdapterSection
from entrecipes.recipe.base import Count, Section, register, union


class BlocksKeys(Section):
    """What every section of the wing has."""

    adapter: AdapterSection = NoAdapterSection()
    """Which weights may be trained at all."""


@register("blocks", implementation="entrecipes.blocks.schedule:AllBlocks")
class AllBlocksSection(BlocksKeys):
    """Train every weight from the first image to the last."""

    type: Literal["all"] = "all"


class Stage(Section):
    """From when on which modules are trained."""

    from_images: Count = 0
    """Images seen when the stage begins."""
    train: tuple[str, ...] = Field(min_length=1)
    """Patterns over parameter names (`*` matches anything), such as `up_blocks.*`; all other weights are frozen."""


@register("blocks", implementation="entrecipes.blocks.schedule:StagedBlocks")
class StagedBlocksSection(BlocksKeys):
    """Train the modules that a written schedule names; the baseline of every learned schedule."""

    type: Literal["staged"] = "staged"
    stages: tuple[Stage, ...] = Field(min_length=1)
    """In the order of `from_images`, the first from 0."""

    @model_validator(mode="after")
    def _in_order(self) -> StagedBlocksSection:
        starts = [stage.from_images for stage in self.stages]
        if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"stages must start at 0 and increase in from_images, got {starts}")
        return self


BlocksSection = union("blocks")
