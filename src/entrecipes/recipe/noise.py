"""`noise:` which noise levels are trained. Every choice draws log sigma, sigma = b/a of x = a x0 + b eps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entrecipes.recipe.base import PositiveCount, Section, register, union

FIXED = "entrecipes.noise.fixed"


class FixedNoise(Section):
    stratified: bool = True
    """Spread each batch's draws evenly over the distribution (one per equal-probability stratum): less variance."""


@register("noise", implementation=f"{FIXED}:Uniform", paper="Ho et al. 2020 (DDPM)")
class UniformNoise(FixedNoise):
    """Uniform over the scheduler's own training time (timesteps; a flow scheduler's shift is applied)."""

    type: Literal["uniform"] = "uniform"


@register("noise", implementation=f"{FIXED}:Cosine", paper="Nichol & Dhariwal 2021 (improved DDPM)")
class CosineNoise(FixedNoise):
    """The cosine schedule as a density over log SNR: sech(log_snr / 2) / (2 pi)."""

    type: Literal["cosine"] = "cosine"


@register("noise", implementation=f"{FIXED}:LogUniform")
class LogUniformNoise(FixedNoise):
    """Uniform over log sigma."""

    type: Literal["log_uniform"] = "log_uniform"


@register("noise", implementation=f"{FIXED}:LogNormal", paper="Karras et al. 2022 (EDM)")
class LogNormalNoise(FixedNoise):
    """EDM's normal density over log sigma."""

    type: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    """Mean of log sigma (EDM: -1.2, EDM2: -0.4)."""
    std: float = Field(1.2, gt=0)
    """Standard deviation of log sigma (EDM: 1.2, EDM2: 1.0)."""


@register("noise", implementation=f"{FIXED}:LogitNormal", paper="Esser et al. 2024 (SD3)")
class LogitNormalNoise(FixedNoise):
    """SD3's logit-normal density over the scheduler's own training time."""

    type: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    """Mean of logit(time)."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of logit(time)."""


@register("noise", implementation=f"{FIXED}:Mode", paper="Esser et al. 2024 (SD3)")
class ModeNoise(FixedNoise):
    """SD3's mode sampling over the scheduler's own training time."""

    type: Literal["mode"] = "mode"
    scale: float = Field(1.29, ge=-1, le=1.7519383939)
    """Weight of the cosine bump; 0 is uniform. The upper bound, 2 / (pi - 2), keeps the map monotone."""


@register(
    "noise",
    implementation="entrecipes.noise.loss_aware:LossAware",
    paper="Nichol & Dhariwal 2021 (improved DDPM)",
)
class LossAwareNoise(Section):
    """Loss second-moment resampling: levels with a larger loss are drawn more often, and weighted back."""

    type: Literal["loss_aware"] = "loss_aware"
    bins: int = Field(100, ge=2)
    """Equal parts of the scheduler's training time, each with a history of its own."""
    history: int = Field(10, ge=1)
    """Losses remembered for each bin; sampling is uniform until every bin has that many."""
    uniform_floor: float = Field(0.001, ge=0, le=1)
    """Share of the draws that stays uniform."""
    refresh_every: PositiveCount = 1000
    """Images between two rebuilds of the table."""


NoiseSection = union("noise")
