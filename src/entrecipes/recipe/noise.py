"""`noise:` which noise levels are trained. Every choice draws log sigma, sigma = b/a of x = a x0 + b eps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Count, PositiveCount, Section, register, union

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


FixedNoiseSection = union("noise")
"""Any of the above: what a learned schedule may begin with."""


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


@register("noise", implementation="entrecipes.noise.infonoise:InfoNoise", paper="Raya et al. 2026 (InfoNoise)")
class InfoNoiseSection(Section):
    """Learned from the run's own losses: levels are drawn in proportion to the information rate, in nats, gated.

    Numbers that the published sources leave open (all but the gate's order and the onset) are this project's choices.
    """

    type: Literal["infonoise"] = "infonoise"
    base: FixedNoiseSection = LogUniformNoise()
    """Distribution of the warm-up, and of the share `floor` afterwards."""
    data: Literal["auto", "continuous", "discrete"] = "auto"
    """Decides where the gate's pivot comes from; auto: discrete when the data takes at most eight different values."""
    pivot: float | None = Field(None, gt=0)
    """Sigma at which the gate is one half; null: for continuous data by the onset rule, at most 0.3 deviations of the
    data; for discrete data a tenth of the distance between its values (0.2 for -1 and 1)."""
    onset: float = Field(0.002, gt=0, lt=1)
    """The pivot is the largest sigma at which the rate per unit sigma reaches this share of its maximum."""
    gate_order: int = Field(3, ge=0)
    """Steepness n of the gate sigma^n / (sigma^n + pivot^n); 0: no gate."""
    power: float = Field(1.0, gt=0)
    """Exponent of the gated rate; 0.5 draws from its root."""
    weight_compensation: Literal["none", "full"] = "none"
    """full: divide the density by the loss's weight, so that draws times weight follow the rate."""
    floor: float = Field(0.02, ge=0, lt=1)
    """Share of the draws that stays with `base`, so that every level goes on being measured."""
    warmup: PositiveCount | None = None
    """Images drawn from `base` before the first estimate; null: 5 % of the run."""
    ramp: Count | None = None
    """Images over which the learned density takes over from `base`; null: as many as the warm-up."""
    refresh_every: PositiveCount | None = None
    """Images between two rebuilds of the table; null: 1 % of the run, at least 2,000."""
    bins: int = Field(128, ge=8)
    """Bins over log sigma, from the cleanest to the noisiest level of the scheduler."""
    buffer: PositiveCount | None = None
    """Last errors that an estimate is made from; null: a tenth of the run, from 1,000 to 100,000."""
    new_weight: float | None = Field(None, gt=0, le=1)
    """Weight of the errors since the last rebuild in a running mean over rebuilds; null: the buffer's plain mean."""
    smoothing: float = Field(1.5, ge=0)
    """Standard deviation, in bins, of the Gaussian that smooths the logarithm of the error."""

    @model_validator(mode="after")
    def _no_idle_keys(self) -> InfoNoiseSection:
        # against the defaults, since a resolved recipe gives every key
        fields, keys = type(self).model_fields, ("data", "pivot", "onset")
        changed = {key for key in keys if getattr(self, key) != fields[key].default}
        problems = []
        if self.gate_order == 0:
            problems += [f"{key}: has no effect with gate_order: 0" for key in keys if key in changed]
        elif self.pivot is not None:
            problems += [f"{key}: has no effect with a pivot" for key in ("data", "onset") if key in changed]
        elif self.data == "discrete" and "onset" in changed:
            problems.append("onset: has no effect with data: discrete")
        if problems:
            raise ValueError("\n".join(problems))
        return self


NoiseSection = union("noise")
