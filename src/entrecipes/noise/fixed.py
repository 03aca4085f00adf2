"""Fixed noise distributions as inverse CDFs over log sigma, cut to the path's range without atoms at its ends."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.noise.base import NoiseSampler, RunFacts, evenly
from entrecipes.recipe.noise import FixedNoise

SMALLEST_SHARE = 1e-6
"""A distribution with less of itself inside the path's range is taken for a mistake."""


class FixedSampler(NoiseSampler):
    """A distribution that never changes; subclasses give its CDF and the inverse before the range is cut out.

    Raises:
        UserError: If next to nothing of the distribution lies within the path's noise levels.
    """

    def __init__(
        self,
        section: FixedNoise,
        path: GaussianPath,
        device: torch.device | str = "cpu",
        facts: RunFacts | None = None,
    ) -> None:
        self.section, self.path = section, path
        ends = torch.tensor([path.log_sigma_min, path.log_sigma_max], dtype=torch.float64)
        self._low, self._high = self._cdf(ends).tolist()
        if self._high - self._low < SMALLEST_SHARE:
            keys = ", ".join(f"{key}: {value}" for key, value in section.model_dump(exclude={"stratified"}).items())
            raise UserError(
                f"noise: {{{keys}}} draws next to nothing within the noise levels of the scheduler, log sigma "
                f"{path.log_sigma_min:.2f} to {path.log_sigma_max:.2f}; change these keys or the scheduler"
            )

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n levels; stratified, each comes from its own 1/n of the distribution, in random order."""
        if self.section.stratified:
            u = evenly(n, generator)
        else:
            u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return self.quantile(u), torch.ones_like(u)

    def cdf(self, log_sigma: Tensor) -> Tensor:
        """Share of the draws below each noise level, float64."""
        share = (self._cdf(log_sigma.double()) - self._low) / (self._high - self._low)
        return share.clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        """log sigma below which a share u of the draws lies, the inverse of `cdf`, float64."""
        log_sigma = self._quantile(self._low + u.double() * (self._high - self._low))
        return log_sigma.clamp(self.path.log_sigma_min, self.path.log_sigma_max)  # rounding only

    def density(self, log_sigma: Tensor) -> Tensor:
        """Density of the draws per unit log sigma, float64; its integral is 1, and it is 0 outside the path's range.

        Taken as the inverse slope of `quantile`, which is differentiable where `cdf` may have no closed form.
        """
        with torch.enable_grad():
            # a hair inside the ends, where the clamp that guards against rounding would have no slope
            u = self.cdf(log_sigma).clamp(1e-9, 1 - 1e-9).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.quantile(u).sum(), u)
        inside = (log_sigma >= self.path.log_sigma_min) & (log_sigma <= self.path.log_sigma_max)
        return torch.where(inside, 1 / slope, 0.0)

    @abstractmethod
    def _cdf(self, log_sigma: Tensor) -> Tensor:
        """The CDF of the uncut distribution, up to a linear map."""

    @abstractmethod
    def _quantile(self, p: Tensor) -> Tensor:
        """The inverse of `_cdf`."""


class Uniform(FixedSampler):
    """Uniform over the scheduler's own training time (Ho et al. 2020)."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        return self.path.fraction(log_sigma)

    def _quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(p)


class Cosine(FixedSampler):
    """sech(log_snr / 2) / (2 pi) over log SNR, log_snr = -2 log sigma: the cosine schedule (Nichol & Dhariwal 2021)."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.atan(torch.exp(log_sigma)) * (2 / math.pi)

    def _quantile(self, p: Tensor) -> Tensor:
        return torch.log(torch.tan(p * (math.pi / 2)))


class LogUniform(FixedSampler):
    """Uniform over log sigma."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        return log_sigma

    def _quantile(self, p: Tensor) -> Tensor:
        return p


class LogNormal(FixedSampler):
    """Normal over log sigma (Karras et al. 2022)."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.special.ndtr((log_sigma - self.section.mean) / self.section.std)

    def _quantile(self, p: Tensor) -> Tensor:
        return self.section.mean + self.section.std * torch.special.ndtri(p)


class LogitNormal(FixedSampler):
    """Logit-normal over the scheduler's own training time (Esser et al. 2024, section 3.1)."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(self.path.fraction(log_sigma)) - self.section.mean) / self.section.std)

    def _quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(torch.sigmoid(self.section.mean + self.section.std * torch.special.ndtri(p)))


class Mode(FixedSampler):
    """SD3's mode sampling (Esser et al. 2024, section 3.1): time p - s (sin^2(pi p / 2) - p) of a uniform p."""

    def _cdf(self, log_sigma: Tensor) -> Tensor:
        time = self.path.fraction(log_sigma)
        low, high = torch.zeros_like(time), torch.ones_like(time)
        for _ in range(60):  # bisection: the map has no closed inverse
            middle = (low + high) / 2
            above = self._time(middle) > time
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _quantile(self, p: Tensor) -> Tensor:
        return self.path.at_fraction(self._time(p))

    def _time(self, p: Tensor) -> Tensor:
        return p - self.section.scale * (torch.sin(math.pi / 2 * p) ** 2 - p)
