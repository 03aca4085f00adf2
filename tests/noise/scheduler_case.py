"""What tests of the scheduler share: a stock scheduler of every path, a profile, and a network to step with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from entrecipes import InfoNoiseScheduler

STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "vp": ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}),
    "vp_epsilon": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "edm": ("EDMEulerScheduler", {"sigma_data": 0.7}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow_vp": ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}


def stock(name: str, **changes: Any) -> Any:
    """A stock scheduler."""
    class_name, config = STOCK[name]
    return getattr(diffusers, class_name)(**config, **changes)


def profile(std: float = 0.5, bins: int = 64, low: float = -6.0, high: float = 6.0) -> dict[str, list[float]]:
    """The exact profile of N(0, std^2) data, as the config holds it."""
    log_sigma = torch.linspace(low, high, bins, dtype=torch.float64)
    error = std**2 / (1 + std**2 * torch.exp(-2 * log_sigma))
    return {"log_sigma": log_sigma.tolist(), "x0_error": error.tolist()}


def ours(name: str, **keys: Any) -> InfoNoiseScheduler:
    """The same as an InfoNoiseScheduler."""
    return InfoNoiseScheduler.from_config(stock(name).config, **keys)


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """Any smooth function of an image [n, C, H, W] and the timestep."""
    return torch.tanh(0.7 * x + 0.1 * torch.sin(timestep.float().mean() / 100)) + 0.1 * x.roll(1, -1)


def sample(scheduler: Any, steps: int, noise: Tensor, at: Any = None, **keys: Any) -> Tensor:
    """Run the loop of a plain pipeline; `at` is a scheduler whose timesteps the network is told instead."""
    scheduler.set_timesteps(steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep, told in zip(scheduler.timesteps, (at or scheduler).timesteps, strict=True):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, told), timestep, x, **keys).prev_sample
    return x
