"""Noise levels in the words of stock diffusers schedulers: their `sigmas`, their grids, and what they can be told.

`sigmas` means b / a for VP and EDM schedulers, but the flow time t = b for flow matching; every one has its own way of
taking custom levels. What is spelled here is always read back from the scheduler before it is believed.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from entrecipes.diffusion.path import SUPPORTED, GaussianPath
from entrecipes.errors import UserError, nearest

READ_BACK = 1e-3
"""Largest difference in log sigma between what a scheduler was told and what it does (it computes in float32)."""

REFUSALS = (ValueError, TypeError, AttributeError, AssertionError)
"""What schedulers raise for levels that they can't take."""


def stock_class(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler of that name. Raises UserError when there is none."""
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        known = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        raise UserError(f"base_class: '{name}' is no diffusers scheduler{nearest(name, known) or f'; {SUPPORTED}'}")
    return kind


def init_keys(kind: type) -> set[str]:
    """Names that a scheduler class takes, without `self` and catch-alls."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}


def stock_class_of(config: Mapping[str, Any]) -> str:
    """Name of the supported diffusers scheduler with exactly these keys. Raises UserError when none has."""
    keys = {key for key in config if not key.startswith("_")}
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and "Flax" not in name]
    for name in sorted(names, key=len):  # DDIMScheduler before DDIMParallelScheduler
        if init_keys(getattr(diffusers, name)) == keys and _is_supported({**config, "_class_name": name}):
            return name
    raise UserError("this config does not say whose it is: add the stock scheduler's name, base_class='...'")


def _is_supported(config: Mapping[str, Any]) -> bool:
    try:
        GaussianPath.from_scheduler(config)
    except UserError:
        return False
    return True


def to_sigmas(path: GaussianPath, log_sigma: Tensor) -> Tensor:
    """log sigma, sigma = b / a -> what schedulers of this path call sigma."""
    return path.coefficients(log_sigma)[1] if path.name == "flow" else torch.exp(log_sigma.double())


def from_sigmas(path: GaussianPath, sigmas: Tensor) -> Tensor:
    """The inverse of `to_sigmas`."""
    return torch.logit(sigmas.double()) if path.name == "flow" else torch.log(sigmas.double())


def levels_of(scheduler: Any, path: GaussianPath) -> Tensor:
    """Decreasing log sigma [n] at which a scheduler, after `set_timesteps`, calls the network; float64 on the CPU.

    The final level, 0 or the scheduler's smallest, is left out. A flow scheduler may begin at t = 1: infinity.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return path.log_sigma(scheduler.timesteps.cpu().unique()).flip(0)
    return from_sigmas(path, sigmas[:-1].cpu().unique()).flip(0)


def own_levels(scheduler: Any, path: GaussianPath, n: int, **keys: Any) -> Tensor:
    """The levels of a scheduler's own grid for n steps, as `levels_of`. Sets its timesteps.

    `keys` are what else its `set_timesteps` shall be given, such as `mu`; those that are None are left out.

    Raises:
        UserError: When it makes no grid of n levels without being told more, or visits other levels in between.
    """
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(n, **{key: value for key, value in keys.items() if value is not None})
    except REFUSALS as error:
        raise UserError(f"grid base: {name} makes no grid of {n} steps ({error}); take another grid") from error
    levels = levels_of(scheduler, path)
    if len(levels) != n:
        raise UserError(f"grid base: {name} visits {len(levels)} levels in {n} steps; take another base_class or grid")
    return levels


def told(scheduler: Any, levels: Tensor, mu: float | None = None) -> dict[str, np.ndarray]:
    """Arguments with which a stock scheduler samples at given levels.

    Args:
        scheduler: A stock scheduler; it is not changed.
        levels: Decreasing log sigma [n].
        mu: Time shift that it will be given along with them, where it shifts dynamically.

    Returns:
        `{"sigmas": ...}` or `{"timesteps": ...}` for its `set_timesteps`, and for pipelines that pass these on (`mu` is
        not among them: pipelines take it from the image size). With timesteps that must be whole numbers, each level is
        moved to the nearest one that is free.

    Raises:
        UserError: When there is no way to tell it.
    """
    path = GaussianPath.from_scheduler(scheduler)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    shift = {} if mu is None else {"mu": mu}
    for argument, values, meant in _spellings(path, scheduler.config, levels, mu):
        if argument not in accepted:
            continue
        probe = copy.deepcopy(scheduler)
        try:
            probe.set_timesteps(**{argument: values}, **shift)
            read = levels_of(probe, path)
        except REFUSALS:
            continue
        if read.shape == meant.shape and bool(((read - meant).abs() < READ_BACK).all()):
            return {argument: values}
    raise UserError(
        f"{type(scheduler).__name__} can't be told its noise levels (it refuses them, or bends them on its way; where "
        "it shifts time dynamically, pass the pipeline's mu); sample with the InfoNoiseScheduler itself, "
        "EulerDiscreteScheduler (VP) or FlowMatchEulerDiscreteScheduler"
    )


def _spellings(
    path: GaussianPath, config: Any, levels: Tensor, mu: float | None
) -> Iterator[tuple[str, np.ndarray, Tensor]]:
    """Ways to spell levels: the argument, its values, and the levels that they mean."""
    sigmas = to_sigmas(path, levels).numpy()
    yield "sigmas", sigmas, levels
    yield "sigmas", np.append(sigmas, 0.0), levels
    if path.name == "flow":  # the scheduler will bend time: t = s t' / (1 + (s - 1) t')
        shift = config.get("flow_shift", config.get("shift", 1.0))
        if mu is not None and config.get("use_dynamic_shifting"):
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        yield "sigmas", sigmas / (shift - (shift - 1) * sigmas), levels
    if path.name == "vp":
        whole = _distinct_integers(path.timestep(levels).flip(0).numpy(), config.num_train_timesteps)[::-1].copy()
        yield "timesteps", whole, path.log_sigma(torch.from_numpy(whole))


def _distinct_integers(values: np.ndarray, limit: int) -> np.ndarray:
    """Increasing values [n] rounded to different whole numbers below `limit`."""
    if len(values) > limit:
        raise UserError(f"{len(values)} steps: the scheduler has only {limit} timesteps; take fewer")
    places = np.arange(len(values))
    apart = np.maximum.accumulate(np.round(values).astype(np.int64) - places) + places
    return np.minimum(apart, limit - len(values) + places)
