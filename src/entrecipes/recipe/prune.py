"""`prune:` which blocks are removed, when, and what decides it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Count, Section, register, union
from entrecipes.recipe.evaluation import HeldOut

PRUNING, ENTPRUNER = "entrecipes.blocks.pruning", "entrecipes.blocks.entpruner"
PAPER = "EntPruner (arXiv 2511.21122)"

MeasuredScore = Literal[
    "information",
    "loss_rise",
    "output_distance",
    "mean_shift",
    "bi",
    "cei",
    "cei_timestep",
    "cei_sample",
    "ced",
    "ced_timestep",
    "ced_sample",
    "taylor",
    "magnitude",
]
ScoreName = Literal[MeasuredScore, "random", "spread"]
UNMEASURED = ("random", "spread")
"""Rankings that measure nothing: by chance (the run's seed), and evenly spaced (BK-SDM's "oracle" pattern)."""


class Draws(HeldOut):
    """What blocks are scored on: training images, each with one fixed noise per noise level."""

    images: int = Field(64, ge=2)
    """Training images."""
    noise_levels: int = Field(16, ge=4)
    """Noise levels, even in log sigma, each applied to every image: 64 x 16 draws are about the 1,000 of the papers."""


class Distillation(Section):
    """Learn from the dense model too: the mean squared distance to its prediction is added to the loss."""

    weight: float = Field(1.0, gt=0)
    """Factor of the distance, in the units of the loss."""
    teacher: str | None = None
    """Run folder, pipeline folder or Hub id of the dense model; null: the model as it is when the first block goes."""


@register("prune", implementation=f"{PRUNING}:NoPruning")
class NoPruningSection(Section):
    """Keep every block."""

    type: Literal["none"] = "none"


class PruneKeys(Section):
    """Keys of every way to prune."""

    rewarmup: Count | None = None
    """Images over which the learning rate rises again after each removal; null: a hundredth of the run's. Multiplied
    with the optimizer's own warm-up."""
    distill: Distillation | None = None
    """Learn from the dense model (TinyFusion: the largest gain at 50 %)."""


@register("prune", implementation=f"{PRUNING}:WrittenPruning")
class WrittenPruningSection(PruneKeys):
    """Remove the blocks that the recipe names, before the first step."""

    type: Literal["written"] = "written"
    remove: tuple[Count, ...] = Field(min_length=1)
    """Indices of the blocks, in the order in which they run."""


class RankedKeys(PruneKeys):
    """Keys of pruning by a score."""

    score: ScoreName = "loss_rise"
    """What ranks the blocks; the lowest go first. `ced` is EntPruner's own."""
    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the blocks to remove, rounded to whole blocks; always met."""
    keep: tuple[int, ...] = (0, -1)
    """Blocks that stay whatever their score; negative ones count from the end."""
    cap: tuple[int, int] | None = None
    """`[size, most]`: of each group of `size` neighbouring blocks at most `most` go. Null: no cap."""
    draws: Draws = Draws()
    """What the score is measured on."""
    scores: str | None = None
    """A `scores.json` of `entrecipes score`, for the first ranking; null: measured when it is due."""

    @model_validator(mode="after")
    def _capped(self) -> RankedKeys:
        if self.cap and not 1 <= self.cap[1] <= self.cap[0]:
            raise ValueError(
                f"cap: of {self.cap[0]} blocks at most {self.cap[1]} go; take [size, most], 1 <= most <= size"
            )
        if self.scores and self.score in UNMEASURED:
            raise ValueError(f"scores: has no effect with score: {self.score}, which measures nothing")
        return self


@register("prune", implementation=f"{ENTPRUNER}:StagedPruning")
class OneShotSection(RankedKeys):
    """Remove all at once."""

    type: Literal["one_shot"] = "one_shot"
    at: float = Field(0.0, ge=0, lt=1)
    """Share of the run's images after which it happens."""


class StagedKeys(RankedKeys):
    """Keys of pruning in stages."""

    stages: int = Field(4, ge=1)
    """Stages; stage k comes after `until` * k / `stages` of the run's images."""
    until: float = Field(0.2, gt=0, lt=1)
    """Share of the run's images after which the target is met."""
    rerank: Literal["block", "stage", "never"] = "stage"
    """Measure the score again after every removed block, before every stage, or only once."""


@register("prune", implementation=f"{ENTPRUNER}:StagedPruning")
class LinearPruningSection(StagedKeys):
    """Remove the same number of blocks at every stage."""

    type: Literal["linear"] = "linear"


class Vote(Section):
    """How the candidates of a stage are compared: by the sum of their weighted ranks.

    Neither proxy is neutral: of a network that has just lost blocks ZiCo is higher and the NTK's condition number is
    worse, so that with these weights cost often decides.
    """

    cost: float = Field(1.0, ge=0)
    """Weight of the rank by cost, the cheapest first."""
    ntk: float = Field(0.5, ge=0)
    """Weight of the rank by the condition number of the neural tangent kernel, the smallest first."""
    zico: float = Field(0.5, ge=0)
    """Weight of the rank by ZiCo, the largest first."""
    measure: Literal["flops", "seconds"] = "flops"
    """What cost means: operations of a forward pass (the same every time), or measured seconds of a training step."""
    samples: int = Field(16, ge=2)
    """Samples of the kernel."""
    batches: int = Field(4, ge=2)
    """Batches whose gradients ZiCo compares."""
    batch_size: int = Field(16, ge=1)
    """Images in each of them."""


@register("prune", implementation=f"{ENTPRUNER}:StagedPruning", paper=PAPER)
class EntPrunerSection(StagedKeys):
    """Remove blocks in stages; a vote of cost and zero-shot proxies decides how many each time, possibly none."""

    type: Literal["entpruner"] = "entpruner"
    vote: Vote = Vote()
    """What decides between no more, one step more and two steps more."""


PruneSection = union("prune")
