"""`blocks:` which weights are trained, and from when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from entrecipes.recipe.adapters import AdapterSection, NoAdapterSection, Quantised
from entrecipes.recipe.base import Count, Section, check_starts, register, union
from entrecipes.recipe.prune import Draws, MeasuredScore


class BlocksKeys(Section):
    """What every section of the wing has."""

    adapter: AdapterSection = NoAdapterSection()
    """Which weights may be trained at all."""


@register("blocks", implementation="entrecipes.blocks.schedule:AllBlocks")
class AllBlocksSection(BlocksKeys):
    """Train every weight from the first image to the last."""

    type: Literal["all"] = "all"


class Closed(Section):
    """How blocks are held that were not opened yet."""

    quantise: Quantised = None
    """Hold their linear layers in 4 bits (nf4) or 8 (int8) on the device, and what they are in the host's memory until
    they open: less memory while training, for a loss on rounded neighbours. Null: in full precision, as others."""


class ClosableKeys(BlocksKeys):
    """What sections have in which blocks are closed."""

    closed: Closed = Closed()
    """How blocks are held that were not opened yet."""

    @model_validator(mode="after")
    def _of_whole_models(self) -> ClosableKeys:
        if self.closed.quantise and self.adapter.type != "none":
            raise ValueError(
                f"closed.quantise: goes with adapter: none alone; of a base beside {self.adapter.type}, see its own "
                "quantise"
            )
        return self


class Stage(Section):
    """From when on which modules are trained."""

    from_images: Count = 0
    """Images seen when the stage begins."""
    train: tuple[str, ...] = Field(min_length=1)
    """Patterns over parameter names (`*` matches anything), such as `up_blocks.*`; all other weights are frozen."""


@register("blocks", implementation="entrecipes.blocks.schedule:StagedBlocks")
class StagedBlocksSection(ClosableKeys):
    """Train the modules that a written schedule names; the baseline of every learned schedule."""

    type: Literal["staged"] = "staged"
    stages: tuple[Stage, ...] = Field(min_length=1)
    """In the order of `from_images`, the first from 0."""

    @model_validator(mode="after")
    def _in_order(self) -> StagedBlocksSection:
        check_starts([stage.from_images for stage in self.stages], "stages")
        return self


UNMEASURED = ("random", "last_first", "first_first")
"""Orders that measure nothing: by chance (the run's seed), from the last block down, from the first block up."""


class HoldOut(Section):
    """What the loss is measured on to compare candidates: held-out images, each with one fixed noise per noise level.

    One measurement is as many forward passes as images x noise levels, and there is one after every burst.
    """

    images: int = Field(16, ge=1)
    """Held-out images."""
    noise_levels: int = Field(4, ge=2)
    """Noise levels, even in log sigma, weighted as training draws them."""
    seed: int = Field(0, ge=0)
    """Seed of the images and the noise."""


@register(
    "blocks",
    implementation="entrecipes.blocks.entprog:ProgressiveBlocks",
    paper="Ent-Prog (CVPR 2026)",
)
class EntProgSection(ClosableKeys):
    """Open blocks in stages, the most important first; measured efficiency decides how many (and baselines).

    The network always runs whole; closed blocks get no gradient. What stands behind the blocks (the head) is always
    trained.
    """

    type: Literal["entprog"] = "entprog"
    order: Literal[MeasuredScore, "cost_aware", "random", "last_first", "first_first"] = "cei"
    """Which blocks open first: those of the highest score (`cei` is the published one), `cost_aware` (the most score
    per added step cost: our own), or a baseline that measures nothing."""
    score: MeasuredScore = "information"
    """The score that `cost_aware` weighs."""
    growth: Literal["adaptive", "linear", "none"] = "adaptive"
    """At each stage the number of blocks of the best measured efficiency (published), the same number more, or as many
    as `largest` allows from the start."""
    stages: int = Field(4, ge=1)
    """Stages of equal length."""
    step: float = Field(0.25, gt=0, le=1)
    """Share of the blocks by which candidates differ."""
    candidates: int = Field(3, ge=2)
    """Numbers of open blocks that a stage compares, at most: as now, one step more, two steps more..."""
    largest: float = Field(1.0, gt=0, le=1)
    """Greatest share of the blocks that is ever open."""
    final: Literal["all", "search"] = "all"
    """The last stage opens all that `largest` allows, or compares candidates as the others do."""
    supernet: float = Field(0.25, gt=0, lt=1)
    """Share of a stage in which candidates are compared; its training counts like any other."""
    mode: Literal["supernet", "snapshot"] = "supernet"
    """Candidates take turns on the same weights, each credited with what the loss fell in its turns; or each starts
    from the same weights and the best one's are kept (the images of the others count as seen)."""
    burst: int = Field(8, ge=1)
    """Steps of a turn."""
    clock: Literal["predicted", "measured"] = "predicted"
    """What a step costs when candidates are compared: predicted from the open blocks, so that a run repeats exactly, or
    measured in seconds (published). Both are logged."""
    inputs: Literal["always", "never"] = "always"
    """Whether weights that blocks depend on (patch, time and condition embedders) are trained. They take gradients
    through all blocks, so that closed ones save no input gradients."""
    rerank: bool = False
    """Measure the score again at every stage; blocks that are open stay so."""
    draws: Draws = Draws()
    """What the score is measured on."""
    holdout: HoldOut = HoldOut()
    """What candidates are compared on."""

    @property
    def measured(self) -> str | None:
        """The score that decides the order, if any does."""
        if self.order in UNMEASURED:
            return None
        return self.score if self.order == "cost_aware" else self.order

    @property
    def searches(self) -> bool:
        """Whether candidates are compared at any stage."""
        return self.growth == "adaptive" and (self.stages > 1 or self.final == "search")

    @model_validator(mode="after")
    def _grows(self) -> EntProgSection:
        if self.stages == 1 and self.growth != "none" and not self.searches:
            raise ValueError("stages: 1 leaves nothing to grow; take more, or growth: none")
        return self


BlocksSection = union("blocks")
