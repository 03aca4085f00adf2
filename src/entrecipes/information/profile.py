"""The information profile: how many nats a denoiser's errors show at each noise level, and the densities made from it.

dH[x0 | x_sigma] / dlog sigma = mmse(sigma) / sigma^2 (Guo, Shamai & Verdu 2005, I-MMSE, with snr = sigma^-2). The
squared x0 error of a denoiser is never below the mmse, so that what losses tell is an upper bound of the rate.
InfoNoise (Raya et al. 2026, arXiv 2602.18647) draws training noise in proportion to it, gated at low noise, where
continuous data has an unbounded amount of it. All densities here are per unit log sigma.

Tensors only: no model, no recipe. Tables are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrecipes.information.nats import gate, integrate_nats

SMALLEST_ERROR = 1e-30
"""A mean squared error of zero has no logarithm: discrete data at low noise may come down to it."""


@dataclass(frozen=True)
class Profile:
    """x0 error over evenly spaced noise levels.

    Args:
        log_sigma: Increasing, evenly spaced levels [K], float64.
        x0_error: Squared x0 error, mean over dimensions [K], positive, float64.
    """

    log_sigma: Tensor
    x0_error: Tensor

    @property
    def rate(self) -> Tensor:
        """Nats per dimension and unit log sigma, x0_error / sigma^2 [K], not gated."""
        return self.x0_error * torch.exp(-2 * self.log_sigma)

    def at(self, log_sigma: Tensor) -> Profile:
        """The same curve at other levels: linear in log x0_error over log sigma, and held beyond the ends."""
        log_error = self.x0_error.clamp(min=SMALLEST_ERROR).log()
        return Profile(log_sigma, _interpolate(log_sigma, self.log_sigma, log_error).exp())

    def nats(self, pivot: float | None = None, order: int = 3) -> float:
        """Its integral: nats per dimension, gated if a pivot is given."""
        closed = gate(self.log_sigma, pivot, order)
        return integrate_nats(self.log_sigma, self.x0_error, closed).item()

    def density(
        self, pivot: float | None, order: int = 3, power: float = 1.0, weight: Tensor | None = None
    ) -> Histogram:
        """Where training should spend its draws: (gate * rate)^power / weight, normalised.

        Args:
            pivot: Sigma at which the gate is one half, in units of the data; None: no gate.
            order: Steepness n of the gate sigma^n / (sigma^n + pivot^n).
            power: 1 is the rate itself; 1/2 its root.
            weight: The loss's weight on the x0 error at each level [K], to divide by; None: leave it in place.

        Raises:
            ValueError: When nothing is left to normalise.
        """
        wanted = self.rate * gate(self.log_sigma, pivot, order)
        wanted = wanted**power
        return Histogram.around(self.log_sigma, wanted if weight is None else wanted / weight)


@dataclass(frozen=True)
class Histogram:
    """A density over log sigma that is constant within each of K even bins.

    Args:
        edges: Increasing bin edges [K + 1], float64.
        cumulative: CDF at the edges [K + 1], from 0 to 1, float64.
    """

    edges: Tensor
    cumulative: Tensor

    @staticmethod
    def around(centres: Tensor, density: Tensor) -> Histogram:
        """From densities [K] at evenly spaced bin centres [K]; they need not be normalised.

        Raises:
            ValueError: When they are not finite, negative anywhere or zero everywhere.
        """
        total = density.sum()
        if not (bool(density.isfinite().all()) and bool((density >= 0).all()) and total > 0):
            raise ValueError("a density must be finite, nowhere negative and somewhere positive")
        width = (centres[-1] - centres[0]) / (len(centres) - 1)
        edges = torch.cat([centres[:1] - width / 2, centres + width / 2])
        cumulative = torch.cat([density.new_zeros(1), density.cumsum(0)]) / total
        cumulative[-1] = 1.0
        return Histogram(edges, cumulative)

    @property
    def centres(self) -> Tensor:
        """Bin centres [K]."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def density(self) -> Tensor:
        """Density in each bin [K], per unit log sigma."""
        return self.cumulative.diff() / self.edges.diff()

    def cdf(self, log_sigma: Tensor) -> Tensor:
        """Share below each noise level."""
        return _interpolate(log_sigma.double(), self.edges, self.cumulative)

    def quantile(self, u: Tensor) -> Tensor:
        """log sigma below which a share u lies, the inverse of `cdf`."""
        return _interpolate(u.double(), self.cumulative, self.edges)

    def mix(self, other: Histogram, share: float) -> Histogram:
        """This one with a share of another of the same bins."""
        return Histogram(self.edges, self.cumulative.lerp(other.cumulative, share))

    def to(self, device: torch.device) -> Histogram:
        """The same on another device."""
        return Histogram(self.edges.to(device), self.cumulative.to(device))

    def quantiles(self, shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
        """Sigma (not its logarithm) at some shares."""
        return self.quantile(torch.tensor(shares, device=self.edges.device)).exp().tolist()


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear y(x) for a non-decreasing x [K + 1]; a step of x has zero width, and gives its left end."""
    lower = (torch.searchsorted(x, at.contiguous()) - 1).clamp(0, len(x) - 2)
    width = x[lower + 1] - x[lower]
    share = torch.where(width > 0, (at - x[lower]) / width, 0.0)
    return y[lower] + share.clamp(0, 1) * (y[lower + 1] - y[lower])


def bin_means(
    edges: Tensor, log_sigma: Tensor, x0_error: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean x0 error in each bin, NaN where a bin is empty; pairs that are not finite or out of range are left out.

    Args:
        edges: Bin edges [K + 1].
        log_sigma: Noise levels [N].
        x0_error: Their errors [N].
        reduce: Sums a tensor over processes, so that all of them get the same table.

    Returns:
        Means [K], float64.
    """
    count = len(edges) - 1
    usable = log_sigma.isfinite() & x0_error.isfinite() & (log_sigma >= edges[0]) & (log_sigma <= edges[-1])
    bins = (torch.bucketize(log_sigma[usable].double(), edges) - 1).clamp(0, count - 1)
    error = x0_error[usable].double()
    sums = (
        torch.stack([error, torch.ones_like(error)])
        .new_zeros(2, count)
        .index_add_(1, bins, torch.stack([error, torch.ones_like(error)]))
    )
    sums = sums if reduce is None else reduce(sums)
    return sums[0] / sums[1]


def fill_and_smooth(log_sigma: Tensor, x0_error: Tensor, smoothing: float) -> Profile | None:
    """A whole profile from the means of the bins that were seen.

    Empty bins are interpolated in log x0_error over log sigma. Beyond the seen ones, the rate is held at low noise (the
    limit of continuous data, and more than discrete data has) and the error at high noise (where it is the variance of
    the data). Then log x0_error is smoothed with a Gaussian, without bending straight lines at the ends.

    Args:
        log_sigma: Bin centres [K], evenly spaced.
        x0_error: Means [K], NaN where nothing is known.
        smoothing: Standard deviation of the Gaussian, in bins; 0: none.

    Returns:
        The profile; None when no bin has a value.
    """
    known = x0_error.isfinite()
    if not bool(known.any()):
        return None
    log_error = x0_error[known].clamp(min=SMALLEST_ERROR).log()
    filled = (
        _interpolate(log_sigma, log_sigma[known], log_error) if len(log_error) > 1 else log_error.repeat(len(known))
    )
    below = log_sigma < log_sigma[known][0]
    filled = torch.where(below, log_error[0] + 2 * (log_sigma - log_sigma[known][0]), filled)
    return Profile(log_sigma, _smooth(filled, smoothing).exp())


def _smooth(values: Tensor, std: float) -> Tensor:
    """Gaussian mean along [K]; the ends are continued by point reflection, which keeps straight lines straight."""
    reach = min(math.ceil(3 * std), len(values) - 1)
    if reach == 0:
        return values
    left = 2 * values[0] - values[1 : reach + 1].flip(0)
    right = 2 * values[-1] - values[-reach - 1 : -1].flip(0)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=values.dtype) / std) ** 2)
    padded = torch.cat([left, values, right])
    return torch.nn.functional.conv1d(padded[None, None], (kernel / kernel.sum())[None, None])[0, 0]


def onset_pivot(profile: Profile, threshold: float, scale: float = 1.0) -> float | None:
    """The sigma at which information sets in, coming down from high noise.

    r = x0_error / sigma^3, the rate per unit sigma, over its maximum; the pivot is the largest sigma at which it
    reaches the threshold (Raya et al. 2026, appendix B.6 as its readers give it; about 0.15 on CIFAR-10). The maximum
    depends on where the levels begin: those beyond EDM's range, 0.002 to 80 times the scale, are not looked at, and a
    profile that begins later is continued down to it with the rate held, the limit of continuous data.

    Args:
        threshold: Share p of the maximum (0.002).
        scale: Standard deviation of the data over EDM's 0.5.

    Returns:
        The pivot; None when the rule says nothing: it lands in the lowest twentieth or the upper quarter of EDM's
        range, as a rate without a rise towards low noise makes it do.
    """
    low, high = math.log(0.002 * scale), math.log(80 * scale)
    inside = (profile.log_sigma >= low - 1e-9) & (profile.log_sigma <= high + 1e-9)
    log_sigma, log_rate = profile.log_sigma[inside], profile.rate[inside].log()
    if len(log_sigma) < 2:
        return None
    per_sigma = log_rate - log_sigma
    excess = per_sigma - torch.maximum(per_sigma.max(), log_rate[0] - low) - math.log(threshold)
    if not bool((excess >= 0).any()):
        return None
    last = int((excess >= 0).nonzero().max())
    pivot = log_sigma[last]
    if last + 1 < len(log_sigma):  # where the line to the next level crosses the threshold
        share = excess[last] / (excess[last] - excess[last + 1])
        pivot = torch.lerp(log_sigma[last], log_sigma[last + 1], share)
    share = (pivot.item() - low) / (high - low)
    return math.exp(pivot) if 0.05 <= share <= 0.75 else None


class ErrorBuffer:
    """The last pairs of noise level and x0 error, written on the device without waiting for it.

    Args:
        size: Pairs remembered; the oldest are overwritten.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.pairs = torch.full((2, size), math.nan, device=device)
        self.seen = 0

    def add(self, log_sigma: Tensor, x0_error: Tensor) -> None:
        """Take a batch [n]; of more than `size` pairs the last are kept."""
        size = self.pairs.shape[1]
        new = torch.stack([log_sigma.detach().float(), x0_error.detach().float()])[:, -size:]
        start = (self.seen + len(log_sigma) - new.shape[1]) % size
        room = min(size - start, new.shape[1])
        self.pairs[:, start : start + room] = new[:, :room]
        self.pairs[:, : new.shape[1] - room] = new[:, room:]
        self.seen += len(log_sigma)

    def read(self) -> tuple[Tensor, Tensor]:
        """log sigma and x0 error [at most size] on the CPU, oldest not first (this waits for the device)."""
        log_sigma, x0_error = self.pairs[:, : min(self.seen, self.pairs.shape[1])].cpu()
        return log_sigma, x0_error

    def clear(self) -> None:
        """Forget all pairs."""
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, for an exact resume."""
        return {"pairs": self.pairs.clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError when it was of another size."""
        if state["pairs"].shape != self.pairs.shape:
            raise ValueError(
                f"a buffer of {state['pairs'].shape[1]} errors was saved, noise.buffer is {self.pairs.shape[1]}"
            )
        self.pairs.copy_(state["pairs"])
        self.seen = state["seen"]
