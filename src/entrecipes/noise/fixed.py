"""Fixed noise distributions as inverse CDFs over log sigma, cut to the path's range without atoms at its ends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.recipe.noise import FixedNoise


class FixedSampler(ABC):
    """A distribution that never changes; subclasses say its CDF and the inverse."""

    records = False

    def __init__(self, section: FixedNoise, path: GaussianPath, device: torch.device) -> None:
        self.section, self.path = section, path
        ends = torch.tensor([path.log_sigma_min, path.log_sigma_max], dtype=torch.float64)
        self.low, self.high = self.cdf(ends).tolist()

    @abstractmethod
    def cdf(self, log_sigma: Tensor) -> Tensor:
        """Share of the distribution below each noise level, before it is cut to the range."""

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """The inverse of `cdf`."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n levels; stratified, each comes from its own 1/n of the distribution, in random order."""
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        if self.section.stratified:
            order = torch.rand(n, generator=generator, device=generator.device).argsort()
            u = (order + u) / n
        p = self.low + u * (self.high - self.low)
        log_sigma = self.quantile(p).clamp(self.path.log_sigma_min, self.path.log_sigma_max)
        return log_sigma, torch.ones_like(log_sigma)

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor) -> None:
        """Nothing is learned."""

    def refresh(self, images: int) -> None:
        """Nothing is rebuilt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Uniform(FixedSampler):
    """Uniform over the scheduler's own training time."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        return self.path.fraction(log_sigma)

    def quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(p)


class Cosine(FixedSampler):
    """sech(log_snr / 2) / (2 pi) over log SNR, log_snr = -2 log sigma: the cosine schedule's density."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.atan(torch.exp(log_sigma)) * (2 / math.pi)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.log(torch.tan(p * (math.pi / 2)))


class LogUniform(FixedSampler):
    """Uniform over log sigma."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        return (log_sigma - self.path.log_sigma_min) / (self.path.log_sigma_max - self.path.log_sigma_min)

    def quantile(self, p: Tensor) -> Tensor:
        return self.path.log_sigma_min + p * (self.path.log_sigma_max - self.path.log_sigma_min)


class LogNormal(FixedSampler):
    """Normal over log sigma."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.special.ndtr((log_sigma - self.section.mean) / self.section.std)

    def quantile(self, p: Tensor) -> Tensor:
        return self.section.mean + self.section.std * torch.special.ndtri(p)


class LogitNormal(FixedSampler):
    """Logit-normal over the scheduler's own training time."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(self.path.fraction(log_sigma)) - self.section.mean) / self.section.std)

    def quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(torch.sigmoid(self.section.mean + self.section.std * torch.special.ndtri(p)))


class Mode(FixedSampler):
    """SD3's mode sampling: time u' = 1 - u - s (cos^2(pi u / 2) - 1 + u) of a uniform u, decreasing in u."""

    def cdf(self, log_sigma: Tensor) -> Tensor:
        wanted = self.path.fraction(log_sigma)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):  # bisection: the map has no closed inverse
            middle = (low + high) / 2
            above = self._time(middle) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 1 - (low + high) / 2

    def quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(self._time(1 - p))

    def _time(self, u: Tensor) -> Tensor:
        return 1 - u - self.section.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
