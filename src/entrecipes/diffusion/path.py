"""Gaussian noise paths x = a x0 + b noise, told from a diffusers scheduler; one coordinate: log sigma, sigma = b / a.

Every target that a diffusers network learns is p x0 + q noise. With k = b / (p b - q a) the clean image is
x0_hat = k (prediction - q x / b), and an error of the prediction is k times as large in x0 space (last column: k^2).

| kind | `prediction_type` | a | b | network sees | timestep | target | x0 error / prediction error |
|---|---|---|---|---|---|---|---|
| VP | `epsilon` | 1 / sqrt(1 + sigma^2) | a sigma | x | index into the table | noise | sigma^2 |
| VP | `v_prediction` | the same | | | | a noise - b x0 | b^2 |
| VP | `sample` | the same | | | | x0 | 1 |
| EDM | `epsilon` | 1 | sigma | x / sqrt(sigma^2 + sd^2) | log(sigma) / 4 | (x0 - c_skip x) / c_out | c_out^2 |
| EDM | `v_prediction` | the same | | | | (c_skip x - x0) / c_out | c_out^2 |
| flow | `flow_prediction` | 1 - t | t = sigma / (1 + sigma) | x | T t | noise - x0 | t^2 |

sd is EDM's `sigma_data`, T the scheduler's `num_train_timesteps`, c_skip = sd^2 / (sigma^2 + sd^2) and
c_out = sigma sd / sqrt(sigma^2 + sd^2) (Karras et al. 2022, table 1; v: Salimans & Ho 2022; flow: Liu et al. 2023).
Model time exists only in here.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from entrecipes.errors import UserError, nearest

FLOW_TIME_LIMIT = 1e-3
"""Flow times are kept within [limit, 1 - limit], where sigma is finite and positive."""

ZERO_SNR = 2.0**-24
"""What diffusers' samplers put in the place of a final alphas_cumprod of zero, whose sigma would be infinite."""

EDM_SCHEDULERS = (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler)
FLOW_SCHEDULERS = (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler)
TELLING = ("prediction_type", "timestep_type", "invert_sigmas")
"""Settings that can put a scheduler out of what is supported."""

SUPPORTED = (
    "supported are DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler and others with "
    "alphas_cumprod, discrete timesteps and prediction_type epsilon, v_prediction or sample (or flow_prediction with "
    "use_flow_sigmas: true); EDMEulerScheduler and EDMDPMSolverMultistepScheduler with epsilon or v_prediction; "
    "FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler"
)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample numbers [n] in the shape that multiplies `like` [n, ...], in its dtype, but never below float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(dtype).reshape(-1, *[1] * (like.dim() - 1))


class GaussianPath(ABC):
    """One noise path with one kind of prediction.

    Noise levels are float tensors [n] of log sigma on the device of the images; numbers per level are float64 [n],
    images keep their dtype. No method waits for the device.

    Attributes:
        name: `vp`, `edm` or `flow`.
        prediction_type: As diffusers names it.
        log_sigma_min: The cleanest level of training and sampling.
        log_sigma_max: The noisiest.
    """

    name: ClassVar[str]
    prediction_type: str
    log_sigma_min: float
    log_sigma_max: float

    @staticmethod
    def from_scheduler(scheduler: Any) -> GaussianPath:
        """The path that a diffusers scheduler samples along.

        Args:
            scheduler: A diffusers scheduler, or what its `scheduler_config.json` holds (a mapping with `_class_name`).

        Raises:
            UserError: For a scheduler of another kind, or one whose settings contradict each other.
        """
        if isinstance(scheduler, Mapping):
            scheduler = _from_config(scheduler)
        kind, config = type(scheduler).__name__, scheduler.config
        prediction = config.get("prediction_type")
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift"))
        if isinstance(scheduler, FLOW_SCHEDULERS) and not config.get("invert_sigmas"):
            return FlowPath(config.num_train_timesteps, shift)
        if isinstance(scheduler, EDM_SCHEDULERS) and prediction in EdmPath.SIGNS:
            return EdmPath(config)
        if hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type") != "continuous":
            flow = bool(config.get("use_flow_sigmas"))
            if flow != (prediction == "flow_prediction"):
                raise UserError(
                    f"{kind}: prediction_type {prediction} does not go with use_flow_sigmas {str(flow).lower()}; for "
                    "flow matching write prediction_type: flow_prediction and use_flow_sigmas: true, otherwise neither"
                )
            if flow:
                return FlowPath(config.num_train_timesteps, shift)
            if prediction in VpPath.TARGETS:
                return VpPath(scheduler.alphas_cumprod, prediction)
        settings = ", ".join(f"{key} {config[key]}" for key in TELLING if key in config)
        raise UserError(f"{kind}{f' with {settings}' if settings else ''} is not supported; {SUPPORTED}")

    def within(self, low: float, high: float) -> GaussianPath:
        """The same path, of whose noise levels only those from `low` to `high` are trained on and measured.

        Raises:
            UserError: When next to nothing of the path lies there.
        """
        cut = copy.copy(self)
        cut.log_sigma_min, cut.log_sigma_max = max(low, self.log_sigma_min), min(high, self.log_sigma_max)
        if not cut.log_sigma_max - cut.log_sigma_min > 1e-6:
            raise UserError(
                f"noise levels log sigma {low:.3f} to {high:.3f} leave nothing of the scheduler's, "
                f"{self.log_sigma_min:.3f} to {self.log_sigma_max:.3f}"
            )
        return cut

    @abstractmethod
    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b [n]."""

    @abstractmethod
    def target_coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """p and q [n] of the network's target, p x0 + q noise."""

    @abstractmethod
    def timestep(self, log_sigma: Tensor) -> Tensor:
        """What the network is told [n]."""

    @abstractmethod
    def log_sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""

    @abstractmethod
    def at_fraction(self, u: Tensor) -> Tensor:
        """log sigma at a fraction u in [0, 1] of the scheduler's own training time, 0 the clean end.

        Where the range is cut (flow), the fractions beyond it give its ends.
        """

    @abstractmethod
    def fraction(self, log_sigma: Tensor) -> Tensor:
        """The inverse of `at_fraction` within the range."""

    def network_input(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        """What the network sees of x; x itself except under EDM."""
        return x

    def add_noise(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """x = a x0 + b noise."""
        a, b = self.coefficients(log_sigma)
        return (expand(a, x0) * x0 + expand(b, x0) * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """What the network should predict: p x0 + q noise, in the shape of x0."""
        p, q = self.target_coefficients(log_sigma)
        return (expand(p, x0) * x0 + expand(q, x0) * noise).to(x0.dtype)

    def x0_from_prediction(self, prediction: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
        """The clean image [n, ...] that a prediction at x (before `network_input`) stands for."""
        b, q, k = self.coefficients(log_sigma)[1], self.target_coefficients(log_sigma)[1], self._x0_scale(log_sigma)
        return (expand(-q / b * k, x) * x + expand(k, x) * prediction).to(x.dtype)

    def x0_error_scale(self, log_sigma: Tensor) -> Tensor:
        """The factor k^2 [n] with ||x0_hat - x0||^2 = factor * ||prediction - target||^2."""
        return self._x0_scale(log_sigma).square()

    def _x0_scale(self, log_sigma: Tensor) -> Tensor:
        (a, b), (p, q) = self.coefficients(log_sigma), self.target_coefficients(log_sigma)
        return b / (p * b - q * a)


class VpPath(GaussianPath):
    """Variance preserving, with the table of a DDPM-type scheduler; log sigma is linear in time between its entries."""

    name = "vp"
    TARGETS = {
        "epsilon": lambda a, b: (torch.zeros_like(a), torch.ones_like(a)),
        "v_prediction": lambda a, b: (-b, a),
        "sample": lambda a, b: (torch.ones_like(a), torch.zeros_like(a)),
    }

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        alphas = alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        if not 0 < alphas[-1] < alphas[-2]:
            # zero terminal SNR; under linear betas 2^-24 is more signal than the timestep before has
            alphas[-1] = ZERO_SNR if alphas[-2] > ZERO_SNR else alphas[-2] / 2
        table = 0.5 * torch.log((1 - alphas) / alphas)
        if not bool((table.diff() > 0).all() and table.isfinite().all()):
            raise UserError("scheduler: alphas_cumprod must fall strictly from below 1; change its betas")
        self.prediction_type = prediction_type
        self._ends = self.log_sigma_min, self.log_sigma_max = table[0].item(), table[-1].item()
        self.last = len(table) - 1
        self._tables = {table.device: table}

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = -2 * log_sigma.double()
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def target_coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.TARGETS[self.prediction_type](*self.coefficients(log_sigma))

    def timestep(self, log_sigma: Tensor) -> Tensor:
        table = self._table(log_sigma.device)
        level = log_sigma.double().clamp(*self._ends)
        lower = (torch.searchsorted(table, level, right=True) - 1).clamp(0, self.last - 1)
        return lower + (level - table[lower]) / (table[lower + 1] - table[lower])

    def log_sigma(self, timestep: Tensor) -> Tensor:
        table = self._table(timestep.device)
        position = timestep.double().clamp(0, self.last)
        lower = position.detach().long().clamp(max=self.last - 1)
        return torch.lerp(table[lower], table[lower + 1], position - lower)

    def at_fraction(self, u: Tensor) -> Tensor:
        return self.log_sigma(u.double() * self.last)

    def fraction(self, log_sigma: Tensor) -> Tensor:
        return self.timestep(log_sigma) / self.last

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            with torch.inference_mode(False):  # an evaluation may come first, and gradients may pass through later
                self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


class EdmPath(GaussianPath):
    """Variance exploding with EDM's preconditioning (Karras et al. 2022, table 1); time is its rho or log ramp."""

    name = "edm"
    SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}

    def __init__(self, config: Any) -> None:
        self.prediction_type, self.sigma_data = config.prediction_type, config.sigma_data
        self.log_sigma_min, self.log_sigma_max = math.log(config.sigma_min), math.log(config.sigma_max)
        self.rho = None if config.sigma_schedule == "exponential" else config.rho
        self._ends = self.log_sigma_min, self.log_sigma_max  # time is a ramp between these, whatever range is cut out

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(log_sigma.double())
        return torch.ones_like(sigma), sigma

    def target_coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        # (x0 - c_skip x) / c_out with x written out: no difference of two nearly equal images at low noise
        sigma, sign = torch.exp(log_sigma.double()), self.SIGNS[self.prediction_type]
        c_in = self._c_in(log_sigma)
        return sign * sigma / self.sigma_data * c_in, -sign * self.sigma_data * c_in

    def network_input(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        return (expand(self._c_in(log_sigma), x) * x).to(x.dtype)

    def timestep(self, log_sigma: Tensor) -> Tensor:
        return log_sigma.double() / 4

    def log_sigma(self, timestep: Tensor) -> Tensor:
        return timestep.double() * 4

    def at_fraction(self, u: Tensor) -> Tensor:
        low, high = self._ramp_ends()
        ramp = low + u.double() * (high - low)
        return ramp if self.rho is None else self.rho * torch.log(ramp)

    def fraction(self, log_sigma: Tensor) -> Tensor:
        low, high = self._ramp_ends()
        ramp = log_sigma.double() if self.rho is None else torch.exp(log_sigma.double() / self.rho)
        return (ramp - low) / (high - low)

    def _ramp_ends(self) -> tuple[float, float]:
        low, high = self._ends
        return self._ends if self.rho is None else (math.exp(low / self.rho), math.exp(high / self.rho))

    def _c_in(self, log_sigma: Tensor) -> Tensor:
        return (torch.exp(2 * log_sigma.double()) + self.sigma_data**2).rsqrt()


class FlowPath(GaussianPath):
    """Rectified flow, x = (1 - t) x0 + t noise, so that log sigma is the logit of t.

    `shift` bends the scheduler's own time, t' = s t / (1 + (s - 1) t), which multiplies sigma by s (Esser et al. 2024).
    A scheduler with dynamic shifting takes its shift from the image size when sampling: its training time has none.
    """

    name = "flow"
    prediction_type = "flow_prediction"

    def __init__(self, num_train_timesteps: int, shift: float) -> None:
        self.num_train_timesteps, self.log_shift = num_train_timesteps, math.log(shift)
        self.log_sigma_max = math.log((1 - FLOW_TIME_LIMIT) / FLOW_TIME_LIMIT)
        self.log_sigma_min = -self.log_sigma_max

    def coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-log_sigma.double()), torch.sigmoid(log_sigma.double())

    def target_coefficients(self, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(log_sigma, dtype=torch.float64)
        return -ones, ones

    def timestep(self, log_sigma: Tensor) -> Tensor:
        return torch.sigmoid(log_sigma.double()) * self.num_train_timesteps

    def log_sigma(self, timestep: Tensor) -> Tensor:
        return torch.logit(timestep.double() / self.num_train_timesteps)

    def at_fraction(self, u: Tensor) -> Tensor:
        return (torch.logit(u.double()) + self.log_shift).clamp(self.log_sigma_min, self.log_sigma_max)

    def fraction(self, log_sigma: Tensor) -> Tensor:
        return torch.sigmoid(log_sigma.double() - self.log_shift)


def _from_config(config: Mapping[str, Any]) -> Any:
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        known = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        hint = nearest(name, known) or f"; {SUPPORTED}"
        raise UserError(f"scheduler: _class_name '{name}' is no diffusers scheduler{hint}")
    return kind.from_config(dict(config))
