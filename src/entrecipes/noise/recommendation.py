"""From a measured profile to the noise schedule that it recommends, and where other schedules spend their effort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.information.profile import Histogram, Profile
from entrecipes.noise.base import RunFacts
from entrecipes.noise.fixed import FixedSampler
from entrecipes.noise.infonoise import data_kind, gate_pivot
from entrecipes.noise.scheduler import InfoNoiseScheduler
from entrecipes.recipe.base import Section, build
from entrecipes.recipe.noise import InfoNoiseSection, LogNormalNoise, LossAwareNoise, UniformNoise

BINS = 128
"""Bins over log sigma of every table here: as many as InfoNoise has by default, so that its tables show no steps."""
INFORMATIVE = 0.9
"""The central share of the gated profile that makes the informative window."""
SAMPLING_GRIDS = {"continuous": "rescaled", "discrete": "infogrid"}
"""By kind of data: entropic time in nats blurs continuous images, the rescaled one does not (arXiv 2504.13612, section
6.3, with first-order solvers); on discrete data nats are what counts."""


@dataclass(frozen=True)
class Recommendation:
    """What a profile says about noise schedules.

    Args:
        profile: x0 error per dimension at the centres of even bins over the whole noise path.
        pivot: Sigma at which the gate is one half, in units of the data.
        pivot_rule: `onset` (the onset rule) or `usual` (what is usual for this kind of data).
        kind: `continuous` or `discrete` data.
        informative: The gated rate, normalised.
        section: InfoNoise with these findings.
        draws: Where that draws, its floor included.
        log_normal: The fixed distribution nearest to it: mean and deviation of log sigma, rounded.
    """

    profile: Profile
    pivot: float
    pivot_rule: str
    kind: str
    informative: Histogram
    section: InfoNoiseSection
    draws: Histogram
    log_normal: LogNormalNoise

    @property
    def window(self) -> tuple[float, float]:
        """The two log sigmas between which the central [`INFORMATIVE`] of the gated profile lies."""
        outside = (1 - INFORMATIVE) / 2
        low, high = self.informative.quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
        return low, high

    def shares(self, spent: Histogram) -> dict[str, float]:
        """How much of some effort lies `outside`, `below` and `above` the informative window."""
        below, up_to = spent.cdf(torch.tensor(self.window, dtype=torch.float64)).tolist()
        return {"outside": below + 1 - up_to, "below": below, "above": 1 - up_to}


def recommend(profile: Profile, path: GaussianPath, facts: RunFacts) -> Recommendation:
    """The recommendation of a profile of any number of levels, measured on data of these facts."""
    edges = torch.linspace(path.log_sigma_min, path.log_sigma_max, BINS + 1, dtype=torch.float64)
    fine = profile.at((edges[1:] + edges[:-1]) / 2)
    plain = InfoNoiseSection()
    pivot, rule = gate_pivot(plain, profile, facts)
    kind = data_kind(plain, facts)
    informative = fine.density(pivot, plain.gate_order, plain.power)
    base = Histogram(edges, build("noise", plain.base, path=path).cdf(edges))
    mean, deviation = moments(informative)
    return Recommendation(
        fine,
        pivot,
        rule,
        kind,
        informative,
        InfoNoiseSection(data="discrete") if kind == "discrete" else InfoNoiseSection(pivot=float(f"{pivot:.3g}")),
        Histogram(edges, informative.cumulative).mix(base, plain.floor),
        LogNormalNoise(mean=round(mean, 2), std=round(deviation, 2)),
    )


def moments(density: Histogram) -> tuple[float, float]:
    """Mean and standard deviation of log sigma."""
    share, width = density.cumulative.diff(), density.edges.diff()
    mean = (share * density.centres).sum()
    variance = (share * ((density.centres - mean).square() + width.square() / 12)).sum()
    return mean.item(), variance.sqrt().item()


def draws_of(
    section: Section, path: GaussianPath, rows: Sequence[Mapping[str, Any]], recommended: Recommendation
) -> tuple[Histogram, str]:
    """Where a schedule's draws go, and what is to be said about how that is known (may be empty).

    Args:
        section: A recipe's `noise:`.
        rows: What its run logged of a learned schedule, oldest first; empty without one.

    Raises:
        UserError: For a schedule that can't be told without its run.
    """
    edges = recommended.draws.edges
    if isinstance(section, InfoNoiseSection) and rows:
        log_sigma, density = (torch.tensor(rows[-1][key], dtype=torch.float64) for key in ("log_sigma", "density"))
        learned = Histogram.around(log_sigma, density)
        return Histogram(edges, learned.cdf(edges)), f"as the run had learned it by {rows[-1]['images']:,} images"
    if isinstance(section, InfoNoiseSection):
        return recommended.draws, "as it would follow from this profile"
    note = ""
    if isinstance(section, LossAwareNoise):
        section, note = UniformNoise(), "what its weights make of its draws: uniform over the scheduler's time"
    sampler = build("noise", section, path=path)
    if not isinstance(sampler, FixedSampler):
        raise UserError(f"noise: where {section.type} draws is not known without its run; give --noise")
    return Histogram(edges, sampler.cdf(edges)), note


def weighted(draws: Histogram, factor: Tensor) -> Histogram:
    """Draws times a factor at each bin's centre [K], normalised: the effective allocation, for the loss's weight."""
    return Histogram(draws.edges, Histogram.around(draws.centres, draws.density * factor).cumulative)


def sampling_scheduler(
    scheduler: Any, profile: Profile, recommended: Recommendation, data_std: float
) -> InfoNoiseScheduler:
    """A pipeline's scheduler with the recommended sampling grid, made from the measured profile.

    Raises:
        UserError: For a scheduler that no grid can be made for.
    """
    return InfoNoiseScheduler.from_config(
        {**scheduler.config, "_class_name": type(scheduler).__name__},
        profile={"log_sigma": profile.log_sigma.tolist(), "x0_error": profile.x0_error.tolist()},
        pivot=recommended.pivot,
        grid=SAMPLING_GRIDS[recommended.kind],
        data_std=data_std,
    )


def sampling_steps(learned: InfoNoiseScheduler, scheduler: Any, n: int) -> dict[str, Any]:
    """The grid of n steps: its `sigmas` (flow: times), and as `set_timesteps` what makes the stock scheduler take them.

    The latter is None for a scheduler that can't be told.
    """
    try:
        told = {key: values.tolist() for key, values in learned.schedule_for(scheduler, n).items()}
    except UserError:
        told = None
    return {"sigmas": learned.as_sigmas(n), "set_timesteps": told}
