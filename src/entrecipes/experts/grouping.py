"""Which noise levels each expert serves, and how large it may be.

TDC Training (Li et al., arXiv 2312.13307) cuts the timesteps into groups by their SNR, 10 log10(abar / (1 - abar)) =
-20 log10(sigma) dB, and gives group i of N, counted along the denoising direction, (i/N + (N-i)/N k) F of the base's
FLOPs F. How many groups, where the borders lie and which end i = 1 is are not published: here i = 1 is the noisiest
unless `big_end` says otherwise, and the borders are of equal time, of equal range of SNR, or (our own) of equal
information. Groups and experts are numbered from 0, the noisiest. Pure maths: no model runs here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath, VpPath
from entrecipes.errors import UserError
from entrecipes.information.nats import gate
from entrecipes.information.profile import Histogram, Profile
from entrecipes.recipe.experts import TdcSection

SNR_LIMIT = 2 * math.log(10)
"""|log sigma| at 40 dB; `by: snr` leaves what lies beyond to the outer groups."""

DEFAULT_K = 0.5
"""Not published; with 5 groups it gives a mean of exactly 0.8, the paper's share of the compute."""

FINE = 8192
"""Bins in which the borders of equal information are looked up."""

ROUNDING = 1e-6
"""Of times and of their range: what float32 samplers may be off."""


@dataclass(frozen=True)
class Group:
    """The noise levels of one expert: log_sigma[0] <= log sigma < log_sigma[1], the noisiest group's end included.

    Args:
        number: 0 for the noisiest.
        log_sigma: Lowest and highest level that it serves.
        train: The same with its overlap: what it is trained on.
        ratio: Its budget, as a share of the base's FLOPs.
        steps: Its share of the scheduler's training time: the share of sampling steps to expect.
        part: Its share of what the experts' training may cost; None: as `steps`.
    """

    number: int
    log_sigma: tuple[float, float]
    train: tuple[float, float]
    ratio: float
    steps: float
    part: float | None = None


def make_groups(
    section: TdcSection,
    path: GaussianPath,
    profile: Profile | None = None,
    pivot: float | None = None,
    data_std: float = 0.5,
) -> tuple[Group, ...]:
    """The groups, the noisiest first.

    A VP scheduler has whole timesteps only, and each group must hold one: where the rule leaves a group none (narrow
    groups of equal SNR at low noise), its upper border moves up just beyond the next timestep, and a border within half
    a timestep of the noisiest end moves down. A run that has trained its base should not end on a border.

    Args:
        section: Number and kind of groups, budgets, overlap.
        path: Gives the range of noise levels and the scheduler's training time.
        profile: Measured x0 errors, for `by: information`; None: those of Gaussian data.
        pivot: Sigma at which the gate on the profile is one half (InfoNoise's usual one); None: no gate.
        data_std: Standard deviation of that Gaussian data.

    Raises:
        UserError: For more groups than timesteps, groups without width, a profile without information, or a mean
            budget that no k gives.
    """
    count = section.groups
    ends = torch.tensor([path.log_sigma_min, path.log_sigma_max], dtype=torch.float64)
    borders = _borders(section, path, profile, pivot, data_std)
    borders = _on_timesteps(borders, path) if isinstance(path, VpPath) else borders
    edges = torch.cat([ends[:1], borders, ends[1:]])
    if not bool((edges.diff() > ROUNDING).all()):
        raise UserError(
            f"experts.groups: {count} groups by {section.by} leave some of them no noise levels on this scheduler; "
            "take fewer groups or another `by`"
        )
    shares = torch.cat([torch.zeros(1), path.fraction(borders), torch.ones(1)]).diff().flip(0).tolist()
    ratios = _ratios(section, shares)
    margin = section.overlap * edges.diff()
    lower, upper = (edges[:-1] - margin).clamp(min=edges[0]), (edges[1:] + margin).clamp(max=edges[-1])
    edges, trained = edges.tolist(), list(zip(lower.tolist(), upper.tolist(), strict=True))
    groups = [Group(i, (edges[-i - 2], edges[-i - 1]), trained[-i - 1], ratios[i], shares[i]) for i in range(count)]
    if section.split == "information":
        nats = group_nats(groups, profile or _gaussian(path, data_std), pivot=pivot)
        shares = [part / sum(nats) for part in nats]
    elif section.split == "equal":
        shares = [1 / count] * count
    return tuple(replace(group, part=part) for group, part in zip(groups, shares, strict=True))


def _borders(
    section: TdcSection, path: GaussianPath, profile: Profile | None, pivot: float | None, data_std: float
) -> Tensor:
    """log sigma of the N - 1 inner borders, increasing."""
    shares = torch.arange(1, section.groups, dtype=torch.float64) / section.groups
    low, high = path.log_sigma_min, path.log_sigma_max
    if section.by == "timestep":
        return path.at_fraction(shares)
    if section.by == "snr":
        low, high = max(low, -SNR_LIMIT), min(high, SNR_LIMIT)
        return low + (high - low) * shares
    edges = torch.linspace(low, high, FINE + 1, dtype=torch.float64)
    profile = profile or _gaussian(path, data_std)
    below = _nats_below(profile.log_sigma, profile.rate * gate(profile.log_sigma, pivot), edges)
    total = below[-1] - below[0]
    if not (bool(total.isfinite()) and total > 0):
        raise UserError("experts.by: the measured profile holds no information to share out; use by: timestep")
    return Histogram(edges, (below - below[0]) / total).quantile(shares)


def _gaussian(path: GaussianPath, data_std: float) -> Profile:
    """The profile of Gaussian data over the path's range."""
    levels = torch.linspace(path.log_sigma_min, path.log_sigma_max, FINE + 1, dtype=torch.float64)
    variance = torch.exp(2 * levels)
    return Profile(levels, variance * data_std**2 / (variance + data_std**2))


def _on_timesteps(borders: Tensor, path: VpPath) -> Tensor:
    """Borders that leave each group a whole timestep, and lie on the table where they lie within rounding of it."""
    count = len(borders) + 1
    if count > path.last + 1:
        raise UserError(f"experts.groups: {count} groups for {path.last + 1} timesteps; take fewer groups")
    times, first = [], 0  # first timestep of the group below the border
    for index, time in enumerate(path.timestep(borders).tolist(), start=1):
        time = round(time) if abs(time - round(time)) < ROUNDING else time
        times.append(min(max(time, first + 0.5), path.last - (count - index) + 0.5))
        first = math.ceil(times[-1])
    return path.log_sigma(torch.tensor(times, dtype=torch.float64))


def _ratios(section: TdcSection, shares: Sequence[float]) -> list[float]:
    """Each group's share of the base's FLOPs, the noisiest first."""
    if section.ratios is not None:
        return list(section.ratios)
    count = section.groups
    weights = [(i + 1) / count for i in range(count)]
    weights = weights if section.big_end == "low_noise" else weights[::-1]
    k = DEFAULT_K if section.k is None else section.k
    if section.mean is not None:
        least = sum(share * weight for share, weight in zip(shares, weights, strict=True))
        if section.mean != 1 and section.mean <= least:
            raise UserError(
                f"experts.mean: {section.mean:g} is out of reach: with {count} groups by {section.by}, k makes it more "
                f"than {least:.3g}, up to 1; raise it, take more groups, or write `ratios`"
            )
        k = 1.0 if section.mean == 1 else (section.mean - least) / (1 - least)
    return [weight + (1 - weight) * k for weight in weights]


def boundaries(groups: Sequence[Group], path: GaussianPath) -> list[float]:
    """Model timesteps of the N - 1 inner borders, descending: expert i serves timestep >= boundaries[i].

    A timestep exactly at a border is the noisier expert's. Off VP, where samplers' times are not whole numbers, a
    border is a millionth of the time range lower, so that rounding in float32 does not decide.
    """
    times = path.timestep(
        torch.tensor([path.log_sigma_max, *(group.log_sigma[0] for group in groups)], dtype=torch.float64)
    )
    margin = 0.0 if isinstance(path, VpPath) else ROUNDING * (times[0] - times[-1])
    return (times[1:-1] - margin).tolist()


def calls(boundaries: Sequence[float], timesteps: Tensor | Sequence[float]) -> list[int]:
    """How many of a sampler's model calls each expert gets [N], given the timestep of each call (Heun calls twice)."""
    times = torch.as_tensor(timesteps).double()
    experts = (times[:, None] < torch.tensor(list(boundaries), dtype=torch.float64)).sum(1)
    return torch.bincount(experts, minlength=len(boundaries) + 1).tolist()


# -- nats -----------------------------------------------------------------------------------------------------------


def group_nats(
    groups: Sequence[Group], profile: Profile, dimensions: int = 1, pivot: float | None = None
) -> list[float]:
    """Nats of a measured profile inside each group; their sum is the trapezoid rule over all its levels.

    Args:
        groups: The groups.
        profile: x0 errors, mean over dimensions.
        dimensions: How many there are.
        pivot: Sigma at which the gate is one half; None: no gate.
    """
    return _nats_within(groups, profile.log_sigma, profile.rate * gate(profile.log_sigma, pivot) * dimensions)


def row_nats(groups: Sequence[Group], row: Mapping[str, Any]) -> list[float]:
    """The same of a `held_out` row of any run's metrics.jsonl, with its own gate; the sum is the row's `nats`."""
    log_sigma, rate, opened = (torch.tensor(row[key], dtype=torch.float64) for key in ("log_sigma", "rate", "gate"))
    return _nats_within(groups, log_sigma, rate * opened)


def _nats_within(groups: Sequence[Group], log_sigma: Tensor, rate: Tensor) -> list[float]:
    """The outer groups also take what levels lie beyond the path's ends (by the rounding of a written number)."""
    inner = torch.tensor([group.log_sigma[0] for group in groups[:-1]], dtype=torch.float64)
    edges = torch.cat([log_sigma[-1:], inner, log_sigma[:1]])
    return (-_nats_below(log_sigma, rate, edges).diff()).tolist()


def _nats_below(log_sigma: Tensor, rate: Tensor, at: Tensor) -> Tensor:
    """Integral of the rate, linear between its levels [L], from the first of them to each `at`; nothing beyond."""
    whole = torch.cat([rate.new_zeros(1), torch.cumulative_trapezoid(rate, log_sigma)])
    at = at.clamp(log_sigma[0], log_sigma[-1])
    lower = (torch.searchsorted(log_sigma, at.contiguous(), right=True) - 1).clamp(0, len(log_sigma) - 2)
    step, slope = at - log_sigma[lower], rate.diff() / log_sigma.diff()
    return whole[lower] + step * (rate[lower] + slope[lower] * step / 2)
