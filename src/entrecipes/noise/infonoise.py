"""InfoNoise: training noise levels drawn in proportion to the information rate that the run's own losses show.

Raya et al. 2026 (arXiv 2602.18647). Only the density of the noise levels changes: objective, weighting and model stay
as they are. The run begins with a fixed distribution; from the x0 errors of its last batches the rate, x0_error /
sigma^2, is estimated, gated at low noise, normalised, and drawn from by its inverse CDF. What the published sources
leave open has a key in the recipe: see [`InfoNoiseSection`].
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.information.profile import ErrorBuffer, Histogram, Profile, bin_means, fill_and_smooth, onset_pivot
from entrecipes.noise.base import NoiseSampler, RunFacts, evenly
from entrecipes.recipe.base import build
from entrecipes.recipe.noise import InfoNoiseSection

IMAGE_DATA_STD, IMAGE_PIVOT = 0.5, 0.15
"""The largest pivot for continuous data: about what the onset rule gives on CIFAR-10, moved along with the deviation.
Of small images, which are less redundant, the rule asks for more, and training gets worse (recipes/infonoise)."""
DISCRETE_SPACING, DISCRETE_PIVOT = 2.0, 0.2
"""For discrete data: the value pinned for DNA, here for symbols at -1 and 1, moved along with their distance."""
COUNTS = ("images", "refreshed", "warmup", "ramp", "refresh_every")
"""Whole numbers of images in the state."""
FEW_VALUES = 8
"""`data: auto` takes data with at most so many distinct values for discrete: binary images, one-hot symbols."""


def data_kind(section: InfoNoiseSection, facts: RunFacts) -> str:
    """`continuous` or `discrete`, as the section says or the data shows."""
    if section.data != "auto":
        return section.data
    return "discrete" if facts.distinct_values <= FEW_VALUES else "continuous"


def gate_pivot(section: InfoNoiseSection, profile: Profile, facts: RunFacts) -> tuple[float, str]:
    """The sigma at which the gate is one half, in units of the data, and where it comes from.

    Returns:
        The pivot, and `pinned` (the section's own), `onset` (the onset rule) or `usual` (what is usual for such data).
    """
    if section.pivot is not None:
        return section.pivot, "pinned"
    scale = facts.data_std / IMAGE_DATA_STD
    if data_kind(section, facts) == "discrete":
        apart = facts.spacing > 0.25 * facts.data_std  # of many values, the distance of the two closest says nothing
        return DISCRETE_PIVOT * (facts.spacing / DISCRETE_SPACING if apart else scale), "usual"
    found, usual = onset_pivot(profile, section.onset, scale), IMAGE_PIVOT * scale
    return (found, "onset") if found and found < usual else (usual, "usual")


class InfoNoise(NoiseSampler):
    """The learned schedule. A table of K bins over the path's noise levels, rebuilt every so many images.

    Args:
        section: The recipe's keys.
        path: Gives the range of noise levels.
        device: Where draws are made and errors arrive.
        facts: Length of the run, scale of the data, and the loss's weight.

    Attributes:
        profile: The estimate behind the table, on the CPU; None before the first refresh.
        learned: The density that follows from it, floor included; None before the first refresh.
        pivot: Where its gate is one half, in units of the data.

    Raises:
        UserError: When all data has one value, so that there is no information.
    """

    records = True

    def __init__(
        self,
        section: InfoNoiseSection,
        path: GaussianPath,
        device: torch.device | str = "cpu",
        facts: RunFacts | None = None,
    ) -> None:
        facts = facts or RunFacts()
        if facts.distinct_values < 2 or not facts.data_std > 0:  # rounding gives equal numbers a tiny deviation
            raise UserError("noise: all training data has one value: there is no information to follow; check data")
        self.section, self.facts, self.device = section, facts, torch.device(device)
        self.base = build("noise", section.base, path=path, device=device)
        self.edges = torch.linspace(path.log_sigma_min, path.log_sigma_max, section.bins + 1, dtype=torch.float64)
        self.centres = (self.edges[1:] + self.edges[:-1]) / 2
        self.base_table = Histogram(self.edges, self.base.cdf(self.edges))

        self.warmup = section.warmup or max(1, facts.images // 20)
        self.ramp = self.warmup if section.ramp is None else section.ramp
        self.refresh_every = section.refresh_every or max(2000, facts.images // 100)
        self.buffer = ErrorBuffer(section.buffer or min(max(1000, facts.images // 10), 100_000), device)

        self.images, self.refreshed = 0, 0
        self.means = torch.full_like(self.centres, math.nan)
        self.profile: Profile | None = None
        self.learned: Histogram | None = None
        self.pivot: float | None = None
        self._tables: tuple[Histogram, Histogram] | None = None  # base and learned, on the device

    # -- drawing ----------------------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n levels, each from its own 1/n of the distribution; it defines the objective, so weights are 1."""
        share = self.ramped
        if self._tables is None or not share:
            return self.base.sample(n, generator)
        base, learned = self._tables
        u = evenly(n, generator)
        return (learned if share == 1 else base.mix(learned, share)).quantile(u), torch.ones_like(u)

    @property
    def ramped(self) -> float:
        """Share of the draws that the learned density has by now: 0 in the warm-up, then rising to 1."""
        after = self.images - self.warmup
        return 0.0 if after < 0 else 1.0 if after >= self.ramp else after / self.ramp

    # -- learning ---------------------------------------------------------------------------------------------------

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor | None = None) -> None:
        """Remember the batch's x0 errors (the loss, whatever its weighting, is not used)."""
        self.buffer.add(log_sigma, x0_error)

    def refresh(self, images: int) -> dict[str, Any] | None:
        """Rebuild the table where due (this waits for the device): at the end of the warm-up, then at every interval.

        Returns:
            Telemetry of a rebuilt table (see [`telemetry`]), None otherwise.
        """
        self.images = images
        every = self.refresh_every
        due = self.refreshed < self.warmup or images // every > self.refreshed // every
        if images < self.warmup or not due:
            return None
        self.refreshed = images
        before, profile = self.learned, self._estimate()
        return self.telemetry(before) if profile is not None and self._build(profile) else None

    def _estimate(self) -> Profile | None:
        """The mmse's upper bound per bin, from the buffer; errors that are no numbers are left out."""
        means = bin_means(self.edges, *self.buffer.read(), reduce=self.facts.reduce)
        share = self.section.new_weight
        if share is not None:
            means = torch.where(self.means.isfinite(), self.means.lerp(means, share), means)
            means = torch.where(means.isfinite(), means, self.means)
            self.buffer.clear()
        self.means = means
        return fill_and_smooth(self.centres, means, self.section.smoothing)

    def _build(self, profile: Profile) -> bool:
        """From a profile to the table that is drawn from; errors beyond all bounds leave the old one and give False."""
        section = self.section
        pivot = gate_pivot(section, profile, self.facts)[0] if section.gate_order else None
        weight = self._weight() if section.weight_compensation == "full" else None
        try:
            learned = profile.density(pivot, section.gate_order, section.power, weight)
        except ValueError:
            return False
        self.profile, self.pivot = profile, pivot
        # the edges of the path to the last digit, not those recomputed from the centres
        self.learned = Histogram(self.edges, learned.cumulative).mix(self.base_table, section.floor)
        self._tables = self.base_table.to(self.device), self.learned.to(self.device)
        return True

    def _weight(self) -> Tensor:
        """The loss's weight on the x0 error in each bin [K], on the CPU."""
        weight = self.facts.weight(self.centres.to(self.device)).cpu()
        if not bool((weight.isfinite() & (weight > 0)).all()):
            raise UserError(
                "noise: the loss's weight (loss_weight, or objective.weighting) must be positive and finite at every "
                f"noise level from sigma {self.edges[0].exp():.3g} to {self.edges[-1].exp():.3g}"
            )
        return weight

    def telemetry(self, before: Histogram | None = None) -> dict[str, Any]:
        """What the table looks like, as plain numbers for a log.

        Args:
            before: The table it replaced.

        Returns:
            `cdf_change` (largest difference of the CDFs), `pivot`, `quantiles` (sigma at 5, 25, 50, 75, 95 % of the
            draws), `effective_quantiles` (the same of draws times the loss's weight on the x0 error), `below_pivot`
            (share of the draws), `ramped`, and the curves `log_sigma`, `x0_error`, `density`; with the first table also
            `base_density`, which it takes over from.
        """
        learned, profile = self.learned, self.profile
        effective = Histogram.around(self.centres, learned.density * self._weight())
        change = None if before is None else (learned.cumulative - before.cumulative).abs().max().item()
        below = None if self.pivot is None else learned.cdf(torch.tensor([math.log(self.pivot)])).item()
        row = {
            "cdf_change": change,
            "pivot": self.pivot,
            "quantiles": learned.quantiles(),
            "effective_quantiles": effective.quantiles(),
            "below_pivot": below,
            "ramped": self.ramped,
            "log_sigma": [round(value, 4) for value in self.centres.tolist()],
            "x0_error": _four_digits(profile.x0_error),
            "density": _four_digits(learned.density),
        }
        return row if before is not None else row | {"base_density": _four_digits(self.base_table.density)}

    def publish(self, folder: Path, scheduler: Any) -> None:
        """Write `infonoise/`: what was learned, as an `InfoNoiseScheduler`; nothing before the first table."""
        if self.profile is None:
            return
        from entrecipes.noise.scheduler import InfoNoiseScheduler  # which learns with this very class

        learning = self.section.model_dump(mode="json")
        if self.section.pivot is None and self.section.gate_order:
            learning["data"] = data_kind(self.section, self.facts)
        InfoNoiseScheduler.from_config(
            {**scheduler.config, "_class_name": type(scheduler).__name__},
            profile={"log_sigma": self.centres.tolist(), "x0_error": self.profile.x0_error.tolist()},
            pivot=self.pivot,
            train_images=self.facts.images,
            data_std=self.facts.data_std,
            learning=learning,
        ).save_pretrained(folder / "infonoise")

    # -- keeping ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next draws and tables."""
        return {
            "buffer": self.buffer.state_dict(),
            "means": self.means.clone(),
            "x0_error": None if self.profile is None else self.profile.x0_error.clone(),
            **{name: getattr(self, name) for name in COUNTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, its lengths included: a run that is made longer does not warm up again.

        Raises:
            ValueError: For tables of another size.
        """
        if state["means"].shape != self.means.shape:
            raise ValueError(f"a table of {len(state['means'])} bins was saved, noise.bins is {len(self.means)}")
        self.buffer = ErrorBuffer(state["buffer"]["pairs"].shape[1], self.device)
        self.buffer.load_state_dict(state["buffer"])
        self.means = state["means"].cpu().clone()
        for name in COUNTS:
            setattr(self, name, state[name])
        if state["x0_error"] is not None:
            self._build(Profile(self.centres, state["x0_error"].cpu().clone()))


def _four_digits(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
