"""DDIM and DPM-Solver++(2M) along any noise path, with the attributes that diffusers' pipelines look for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath, expand
from entrecipes.errors import UserError
from entrecipes.noise.stock import to_sigmas


class Sampling:
    """The sampling side of [`InfoNoiseScheduler`].

    Attributes:
        path: The noise path.
        timesteps: What the network is told at each step, float32 [n].
        sigmas: Noise levels before each step and a final 0 [n + 1]: b / a, or the time for flow, on the CPU.
        num_inference_steps: n; None before `set_timesteps`.
    """

    order = 1  # network calls per step

    path: GaussianPath
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None = None
    settings: Mapping[str, Any]
    _base: SchedulerMixin

    def _set_levels(self, levels: Tensor, device: torch.device | str | None = None) -> None:
        final = levels.new_full((1,), -math.inf)
        self._levels = torch.cat([levels, final])
        self.timesteps = self.path.timestep(levels).float().to(device)
        self.sigmas = torch.cat([to_sigmas(self.path, levels), torch.zeros_like(final)]).float()
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling begins with."""
        return math.hypot(math.exp(self.path.log_sigma_max), 1) if self.path.name == "edm" else 1.0

    @property
    def step_index(self) -> int | None:
        """Steps done; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step (image to image)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None) -> int:
        """Index of the level nearest to a timestep (the first of a batch of equal ones).

        Raises:
            UserError: For whole numbers where timesteps are none (EDM, flow): they look like indices.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        timestep = torch.as_tensor(timestep, device=schedule.device).reshape(-1)[0]
        if self.path.name != "vp" and not timestep.is_floating_point():
            raise UserError(f"timestep {timestep}: give one of scheduler.timesteps, not an index")
        return int((schedule.double() - timestep).abs().argmin())

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """What the network sees of samples [n, ...] at timesteps [n] or one for all; only EDM scales them."""
        if self.path.name != "edm":
            return sample
        level = torch.as_tensor(timestep, device=sample.device).double().reshape(-1)
        return self.path.network_input(sample, self.path.log_sigma(level))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the next level.

        Args:
            model_output: The network's prediction [n, ...].
            timestep: The current one of `timesteps`; looked at in the first step only.
            sample: x [n, ...] at this level, not scaled.
            eta: Share of fresh noise, from 0 (none) to 1 (ancestral sampling; SDE-DPM-Solver++ at order 2).
            generator: Source of that noise.
            return_dict: Whether to return an output object or a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`, both [n, ...] in the dtype of `sample`.

        Raises:
            UserError: Before `set_timesteps`, or after the last step.
        """
        if self.num_inference_steps is None:
            raise UserError("step: call set_timesteps first")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(self.timesteps):
            raise UserError(f"step: all {len(self.timesteps)} steps are done; call set_timesteps again")
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))  # never below float32 within a step
        self._levels = self._levels.to(x.device)
        here, there = self._levels[self._step_index].reshape(1), self._levels[self._step_index + 1].reshape(1)

        x0 = self._bounded(self.path.x0_from_prediction(model_output.to(x.dtype), x, here))
        towards = self._extrapolated(x0, here, there)
        (a, b), (a_next, b_next) = self.path.coefficients(here), self.path.coefficients(there)
        fresh = eta * (1 - torch.exp(2 * (there - here))).sqrt()  # share of the next level's noise
        kept = b_next / b * (1 - fresh**2).sqrt()
        prev = expand(kept, x) * x + expand(a_next - a * kept, x) * towards
        if eta > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            prev = prev + expand(b_next * fresh, x) * noise
        self._step_index += 1
        prev, x0 = prev.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _bounded(self, x0: Tensor) -> Tensor:
        """x0 within the range that the base's `thresholding` or `clip_sample` asks for.

        The noise follows from it, as with DDIM's `use_clipped_model_output` and in DDPM.
        """
        config = self._base.config
        if config.get("thresholding"):
            return self._base._threshold_sample(x0)
        return x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.get("clip_sample") else x0

    def _extrapolated(self, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """x0 at the middle of the step in log sigma, along the line through the last two; x0 itself at order 1."""
        last, self._last = self._last, (x0, here)
        if self.settings["solver_order"] == 1 or last is None or self._step_index == len(self.timesteps) - 1:
            return x0
        return x0 + expand((here - there) / (last[1] - here) / 2, x0) * (x0 - last[0])
