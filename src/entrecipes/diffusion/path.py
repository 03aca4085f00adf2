"""Gaussian noise paths x = a x0 + b noise, told from a diffusers scheduler, in one coordinate: log sigma, sigma = b / a.

| kind | a | b | network input | timestep | prediction | x0 error / squared prediction error |
|---|---|---|---|---|---|---|
| VP | 1 / sqrt(1 + sigma^2) | a sigma | x | index into the scheduler's table | `epsilon`: noise | sigma^2 |
| | | | | | `v_prediction`: a noise - b x0 | b^2 |
| | | | | | `sample`: x0 | 1 |
| EDM | 1 | sigma | x / sqrt(sigma^2 + sd^2) | log(sigma) / 4 | (x0 - c_skip x) / c_out | c_out^2 |
| flow | 1 / (1 + sigma) | a sigma | x | 1000 b | noise - x0 | b^2 |

The last column turns any unweighted prediction loss into the error in x0 space (Karras et al. 2022; reference: I-MMSE, Guo,
Shamai & Verdu 2005). Model time exists only in here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from entrecipes.errors import UserError

FLOW_TIME_LIMIT = 1e-3
"""Flow times are kept within [limit, 1 - limit], where sigma is finite and positive."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample numbers [n] in the shape and dtype that multiplies `like` [n, ...]."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


class GaussianPath(ABC):
    """One noise path with one kind of prediction. Noise levels are float tensors [n] of log sigma."""

    name: ClassVar[str]
    prediction_type: str
    log_sigma_min: float
    log_sigma_max: float

    @staticmethod
    def from_scheduler(scheduler: Any) -> GaussianPath:
        """The path that a diffusers scheduler samples along.

        Raises:
            UserError: For a scheduler of another kind, or one whose settings contradict each other.
        """
        kind, config = type(scheduler).__name__, scheduler.config
        if hasattr(scheduler, "precondition_outputs"):
            return EdmPath(config)
        prediction = config.get("prediction_type", "epsilon")
        if kind.startswith("FlowMatch"):
            return FlowPath(config.num_train_timesteps, 1.0 if config.get("use_dynamic_shifting") else config.shift)
        if config.get("use_flow_sigmas"):
            if prediction != "flow_prediction":
                raise UserError(f"{kind}: use_flow_sigmas needs prediction_type: flow_prediction, not {prediction}")
            return FlowPath(config.num_train_timesteps, config.flow_shift)
        if hasattr(scheduler, "alphas_cumprod") and prediction in VpPath.PREDICTIONS:
            return VpPath(scheduler.alphas_cumprod, prediction)
        if prediction == "flow_prediction":
            raise UserError(f"{kind}: prediction_type flow_prediction needs use_flow_sigmas: true")
        raise UserError(
            f"{kind} with prediction_type {prediction} is not supported: take a VP scheduler (such as DDIMScheduler) with "
            f"{', '.join(VpPath.PREDICTIONS)}, EDMEulerScheduler, or a flow-matching scheduler"
        )

    @abstractmethod
    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b [n]."""

    @abstractmethod
    def timestep(self, log_sigma: Tensor) -> Tensor:
        """What the network is told [n]."""

    @abstractmethod
    def log_sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""

    @abstractmethod
    def at_fraction(self, u: Tensor) -> Tensor:
        """log sigma at a fraction u in [0, 1] of the scheduler's own training time, 0 the clean end."""

    @abstractmethod
    def fraction(self, log_sigma: Tensor) -> Tensor:
        """The inverse of `at_fraction`."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """What the network should predict, in the shape of x0."""

    @abstractmethod
    def x0_from_prediction(self, prediction: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
        """The clean image that a prediction at x stands for."""

    @abstractmethod
    def x0_error_scale(self, log_sigma: Tensor) -> Tensor:
        """The factor [n] with ||x0_hat - x0||^2 = factor * ||prediction - target||^2."""

    def add_noise(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """x = a x0 + b noise."""
        a, b = self.coefficients(log_sigma)
        return expand(a, x0) * x0 + expand(b, x0) * noise

    def network_input(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        """What the network sees of x; x itself except under EDM."""
        return x


class VpPath(GaussianPath):
    """Variance preserving, with the table of a DDPM-type scheduler; log sigma is interpolated linearly between timesteps."""

    name = "vp"
    PREDICTIONS = ("epsilon", "v_prediction", "sample")

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        # 2^-24 stands for zero terminal SNR, as in diffusers' Euler scheduler
        alphas = alphas_cumprod.double().clamp(min=2**-24)
        self.table = 0.5 * torch.log((1 - alphas) / alphas)
        self.prediction_type = prediction_type
        self.log_sigma_min, self.log_sigma_max = self.table[0].item(), self.table[-1].item()

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-2 * log_sigma).sqrt(), torch.sigmoid(2 * log_sigma).sqrt()

    def timestep(self, log_sigma: Tensor) -> Tensor:
        table = self._table(log_sigma)
        levels = log_sigma.to(table.dtype).clamp(self.log_sigma_min, self.log_sigma_max)
        upper = torch.searchsorted(table, levels).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        return upper - 1 + (levels - low) / (high - low)

    def log_sigma(self, timestep: Tensor) -> Tensor:
        table = self._table(timestep)
        position = timestep.to(table.dtype).clamp(0, len(table) - 1)
        lower = position.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[lower], table[lower + 1], position - lower)

    def at_fraction(self, u: Tensor) -> Tensor:
        return self.log_sigma(u.double() * (len(self.table) - 1))

    def fraction(self, log_sigma: Tensor) -> Tensor:
        return self.timestep(log_sigma) / (len(self.table) - 1)

    def target(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, b = (expand(c, x0) for c in self.coefficients(log_sigma))
        return a * noise - b * x0

    def x0_from_prediction(self, prediction: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
        a, b = (expand(c, x) for c in self.coefficients(log_sigma))
        if self.prediction_type == "epsilon":
            return (x - b * prediction) / a
        return prediction if self.prediction_type == "sample" else a * x - b * prediction

    def x0_error_scale(self, log_sigma: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return torch.exp(2 * log_sigma)
        return torch.ones_like(log_sigma) if self.prediction_type == "sample" else torch.sigmoid(2 * log_sigma)

    def _table(self, like: Tensor) -> Tensor:
        if self.table.device != like.device:
            self.table = self.table.to(like.device)
        return self.table


class EdmPath(GaussianPath):
    """Variance exploding with EDM's preconditioning (Karras et al. 2022, table 1)."""

    name = "edm"

    def __init__(self, config: Any) -> None:
        self.sigma_data, self.rho = config.sigma_data, config.rho
        self.schedule, self.prediction_type = config.sigma_schedule, config.prediction_type
        self.sign = -1.0 if self.prediction_type == "v_prediction" else 1.0
        self.log_sigma_min, self.log_sigma_max = math.log(config.sigma_min), math.log(config.sigma_max)

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_sigma), torch.exp(log_sigma)

    def timestep(self, log_sigma: Tensor) -> Tensor:
        return log_sigma / 4

    def log_sigma(self, timestep: Tensor) -> Tensor:
        return timestep * 4

    def at_fraction(self, u: Tensor) -> Tensor:
        u = u.double()
        if self.schedule == "exponential":
            return self.log_sigma_min + u * (self.log_sigma_max - self.log_sigma_min)
        low, high = (math.exp(limit / self.rho) for limit in (self.log_sigma_min, self.log_sigma_max))
        return self.rho * torch.log(low + u * (high - low))

    def fraction(self, log_sigma: Tensor) -> Tensor:
        if self.schedule == "exponential":
            return (log_sigma - self.log_sigma_min) / (self.log_sigma_max - self.log_sigma_min)
        low, high = (math.exp(limit / self.rho) for limit in (self.log_sigma_min, self.log_sigma_max))
        return (torch.exp(log_sigma / self.rho) - low) / (high - low)

    def network_input(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        return x * expand((torch.exp(2 * log_sigma) + self.sigma_data**2).rsqrt(), x)

    def target(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        skip, out = (expand(c, x0) for c in self._skip_and_out(log_sigma))
        return (x0 - skip * self.add_noise(x0, noise, log_sigma)) / out

    def x0_from_prediction(self, prediction: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
        skip, out = (expand(c, x) for c in self._skip_and_out(log_sigma))
        return skip * x + out * prediction

    def x0_error_scale(self, log_sigma: Tensor) -> Tensor:
        return self._skip_and_out(log_sigma)[1].square()

    def _skip_and_out(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        sigma, data = torch.exp(log_sigma), self.sigma_data
        total = sigma.square() + data**2
        return data**2 / total, self.sign * sigma * data * total.rsqrt()


class FlowPath(GaussianPath):
    """Rectified flow, x = (1 - t) x0 + t noise, so that log sigma is the logit of t; `shift` bends the scheduler's time only."""

    name = "flow"
    prediction_type = "flow_prediction"

    def __init__(self, num_train_timesteps: int, shift: float) -> None:
        self.num_train_timesteps, self.shift = num_train_timesteps, shift
        limit = math.log((1 - FLOW_TIME_LIMIT) / FLOW_TIME_LIMIT)
        self.log_sigma_min, self.log_sigma_max = -limit, limit

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-log_sigma), torch.sigmoid(log_sigma)

    def timestep(self, log_sigma: Tensor) -> Tensor:
        return torch.sigmoid(log_sigma) * self.num_train_timesteps

    def log_sigma(self, timestep: Tensor) -> Tensor:
        return torch.logit(timestep / self.num_train_timesteps)

    def at_fraction(self, u: Tensor) -> Tensor:
        # shifting t by s, t' = s t / (1 + (s - 1) t), multiplies sigma by s
        shifted = torch.logit(u.double()) + math.log(self.shift)
        return shifted.clamp(self.log_sigma_min, self.log_sigma_max)

    def fraction(self, log_sigma: Tensor) -> Tensor:
        return torch.sigmoid(log_sigma - math.log(self.shift))

    def target(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        return noise - x0

    def x0_from_prediction(self, prediction: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
        return x - expand(torch.sigmoid(log_sigma), x) * prediction

    def x0_error_scale(self, log_sigma: Tensor) -> Tensor:
        return torch.sigmoid(log_sigma).square()
