"""`InfoNoiseScheduler`: InfoNoise as a diffusers scheduler, for pipelines and for training loops of one's own.

Its config has every key of a stock scheduler (the *base*), which says what the noise path is, and a block of its own,
`_infonoise`. So it is made from any supported stock scheduler and turned back into one; stock schedulers keep the block
without a word (they warn of unknown keys, but not of private ones), and what was learned rides along both ways:

    scheduler = InfoNoiseScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)  # or scheduler.base
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from pydantic import ValidationError
from torch import Tensor

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError, nearest
from entrecipes.information.grids import GRIDS, sampling_grid
from entrecipes.information.profile import Profile
from entrecipes.noise.base import RunFacts
from entrecipes.noise.infonoise import gate_pivot
from entrecipes.noise.own_loop import OwnLoop
from entrecipes.noise.sampling import Sampling
from entrecipes.noise.stock import from_sigmas, init_keys, own_levels, stock_class, stock_class_of, to_sigmas, told
from entrecipes.recipe.noise import InfoNoiseSection
from entrecipes.recipe.pipeline import Objective as ObjectiveSection

DEFAULT_BASE = "DDIMScheduler"


class InfoNoiseScheduler(OwnLoop, Sampling, SchedulerMixin, ConfigMixin):
    """Learns which noise levels to train, and samples along a grid made from what it learned (Raya et al. 2026).

    Sampling is DDIM (Song et al. 2021, eq. 12) at order 1, which is Euler's method in sigma (EDM) and in time (flow);
    at order 2, DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), with a first-order last step. Samples are in the space
    of the path, x = a x0 + b noise: VP and flow begin with unit noise, EDM with sigma_max.

    Args:
        base_class: Name of the stock scheduler whose keys these are.
        profile: What was learned: `log_sigma` and `x0_error`, lists of the same length (see `Profile`).
        pivot: Sigma at which the gate of the grid `infogrid` is one half; None: by the rule of `learning`.
        grid: `infogrid`, `entropic` or `rescaled` (see `entrecipes.information.grids`), or `base`, the stock
            scheduler's own; None: `infogrid` with a profile, `base` without.
        solver_order: 1 or 2; None: the base's, which is 1 where it has none.
        train_images: Length of the training, images over all epochs and processes: what InfoNoise's own lengths are
            shares of.
        data_std: Standard deviation of x0 over all its numbers; None: the base's `sigma_data`, or 0.5.
        learning: Keys of the recipe's `noise: {type: infonoise}` that differ from their defaults.
        objective: Keys of the recipe's `objective:`, the weighting of the loss, for `weight_compensation: full`.
        **base_config: The stock scheduler's own keys.

    Raises:
        UserError: For an unknown or unsupported base, unknown keys, or a damaged profile.
    """

    def __init__(
        self,
        base_class: str = DEFAULT_BASE,
        profile: Mapping[str, Sequence[float]] | None = None,
        pivot: float | None = None,
        grid: str | None = None,
        solver_order: int | None = None,
        train_images: int | None = None,
        data_std: float | None = None,
        learning: Mapping[str, Any] | None = None,
        objective: Mapping[str, Any] | None = None,
        **base_config: Any,
    ) -> None:
        kind = stock_class(base_class)
        _refuse_unknown(base_config, kind)
        if solver_order is not None and "solver_order" in init_keys(kind):
            base_config["solver_order"] = solver_order
        self._base = kind(**base_config)
        self.path = GaussianPath.from_scheduler(self._base)
        self.learning = _validated(InfoNoiseSection, learning, "learning")
        self.objective = Objective(_validated(ObjectiveSection, objective, "objective"), self.path)
        settings = {
            "base_class": base_class,
            "profile": profile,
            "pivot": pivot,
            "grid": grid,
            "solver_order": solver_order or self._base.config.get("solver_order", 1),
            "train_images": train_images,
            "data_std": data_std or self._base.config.get("sigma_data", 0.5),
            "learning": learning,
            "objective": objective,
        }
        _check(settings)
        self.register_to_config(**{**self._base.config, "_infonoise": settings, "_class_name": type(self).__name__})
        ends = self.path.timestep(torch.tensor([self.path.log_sigma_max, self.path.log_sigma_min]))
        self._set_levels(self.path.log_sigma(torch.linspace(*ends.tolist(), len(self), dtype=torch.float64)))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The arguments of the class, without the stock scheduler's own keys."""
        return self.config["_infonoise"]

    # -- configuration ----------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from the config of a stock scheduler or of another InfoNoiseScheduler.

        Args:
            config: `scheduler.config`, or what its JSON file holds.
            return_unused_kwargs: Return keys that no one takes instead of refusing them.
            **kwargs: Keys to change.

        Raises:
            UserError: As the class itself.
        """
        defaults = config.get("_use_default_values", ())
        stock = {key: value for key, value in config.items() if key not in defaults and not key.startswith("_")}
        given = {**config.get("_infonoise", {}), **stock}
        if config.get("_class_name") not in (None, cls.__name__):
            given["base_class"] = config["_class_name"]
        elif "base_class" not in {**given, **kwargs}:  # a stock scheduler that was never saved does not say its name
            given["base_class"] = stock_class_of(config)
        base = stock_class(kwargs.get("base_class", given.get("base_class")))
        known = init_keys(base) | init_keys(cls)
        unused = {key: kwargs.pop(key) for key in [*kwargs] if key not in known} if return_unused_kwargs else {}
        scheduler = cls(**{key: value for key, value in given.items() if key in known} | kwargs)
        hidden = {key: value for key, value in given.items() if key not in known}  # of other schedulers: ride along
        scheduler.register_to_config(**hidden)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @property
    def profile(self) -> Profile | None:
        """What was learned so far, or loaded."""
        return None if self.settings["profile"] is None else _as_profile(self.settings["profile"])

    @property
    def base(self) -> SchedulerMixin:
        """A stock scheduler of the same path, with nothing of ours."""
        return type(self._base).from_config(self._base.config)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # -- levels -----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels of the next sampling.

        Args:
            num_inference_steps: Steps along the grid; it may also come with as many sigmas.
            device: Where `timesteps` shall be.
            sigmas: Levels of one's own instead, decreasing, with or without a final 0: b / a, or the time for flow.
            timesteps: The same as timesteps.
            mu: Time shift of a base scheduler with dynamic shifting, which pipelines take from the image size. On the
                grid `base` it bends the sigmas too, as the stock scheduler does. With a learned grid the ramp that
                Flux-like pipelines always pass along with it, n sigmas from 1 to 1 / n, only says n: the levels are
                the learned grid's, and other sigmas are taken as they are.

        Raises:
            UserError: When none of the three is given or several that do not fit, or levels do not fall.
        """
        if (num_inference_steps is None and sigmas is None) == (timesteps is None):
            raise UserError(
                "set_timesteps: give num_inference_steps, sigmas or timesteps, and only one of them (or as many sigmas "
                "as num_inference_steps)"
            )
        if timesteps is not None:
            levels = self.path.log_sigma(torch.as_tensor(timesteps, dtype=torch.float64).cpu())
        elif sigmas is None:
            levels = self._grid(num_inference_steps, mu)
        else:
            levels = self._given(sigmas, num_inference_steps, mu)
        if not _fall(levels):
            raise UserError("set_timesteps: sigmas and timesteps must be noise levels that fall; the noisiest is first")
        self._set_levels(levels, device)
        self.num_inference_steps = len(levels)

    def _given(self, sigmas: Sequence[float] | Tensor, n: int | None, mu: float | None) -> Tensor:
        """log sigma [n] that a caller's sigmas stand for, as `set_timesteps` describes them."""
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        sigmas = sigmas[:-1] if sigmas[-1:].eq(0).any() else sigmas
        if n not in (None, len(sigmas)):
            raise UserError(f"set_timesteps: {n} steps but {len(sigmas)} sigmas; give one of them, or as many of each")
        levels, n = from_sigmas(self.path, sigmas), len(sigmas)
        if mu is None or not _fall(levels):
            return levels
        if self._kind != "base":
            return self._grid(n) if torch.allclose(sigmas, torch.linspace(1, 1 / n, n, dtype=sigmas.dtype)) else levels
        dynamic = self._base.config.get("use_dynamic_shifting")
        return own_levels(self._base, self.path, n, mu=mu, sigmas=sigmas.numpy()) if dynamic else levels

    @property
    def _kind(self) -> str:
        """Name of the grid."""
        return self.settings["grid"] or ("base" if self.settings["profile"] is None else "infogrid")

    def _grid(self, n: int, mu: float | None = None) -> Tensor:
        """Decreasing log sigma [n] of the grid."""
        profile, kind = self.profile, self._kind
        if n < 1:
            raise UserError(f"set_timesteps: {n} steps; take at least 1")
        if kind == "base":
            return own_levels(self._base, self.path, n, mu=mu)
        keys, pivot = self.learning, self.settings["pivot"]
        if pivot is None and keys.gate_order:
            pivot = gate_pivot(keys, profile, RunFacts(data_std=self.settings["data_std"]))[0]
        ends = self.path.log_sigma_min, self.path.log_sigma_max
        return sampling_grid(kind, profile, n, *ends, pivot if keys.gate_order else None, keys.gate_order)

    def as_sigmas(self, n: int) -> list[float]:
        """The grid of n steps as decreasing sigmas (flow: times), without the final 0."""
        return to_sigmas(self.path, self._grid(n)).tolist()

    def schedule_for(self, scheduler: SchedulerMixin, n: int, mu: float | None = None) -> dict[str, Any]:
        """Arguments with which a stock scheduler samples along this grid: `{"sigmas": ...}` or `{"timesteps": ...}`.

            pipeline(..., **scheduler.schedule_for(pipeline.scheduler, 20))

        What a scheduler does to the numbers on its way (appends a 0, shifts time again, rounds) is allowed for and
        checked on a copy of it. One with dynamic shifting needs the `mu` that the pipeline will pass to it.

        Raises:
            UserError: For a scheduler that can't be told, such as EDMEulerScheduler, or one of another noise path.
        """
        theirs = GaussianPath.from_scheduler(scheduler).name
        if theirs != self.path.name:
            raise UserError(f"{type(scheduler).__name__} samples along another path: {theirs}, not {self.path.name}")
        return told(scheduler, self._grid(n), mu)


# Saved pipelines name this module, and diffusers looks the class up there.
InfoNoiseScheduler.__module__ = "entrecipes"


def _fall(levels: Tensor) -> bool:
    return levels.numel() > 0 and not levels.isnan().any() and bool((levels.diff() < 0).all())


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse values that would fail later. Raises UserError."""
    order, grid, profile = settings["solver_order"], settings["grid"], settings["profile"]
    if order not in (1, 2):
        raise UserError(f"solver_order: {order} is not supported; pass solver_order=2 or 1")
    if grid not in (None, "base", *GRIDS):
        raise UserError(f"grid: there is no '{grid}'{nearest(grid, GRIDS)} There are base, {', '.join(GRIDS)}")
    for name in ("pivot", "train_images", "data_std"):
        if settings[name] is not None and not settings[name] > 0:
            raise UserError(f"{name}: must be above 0, got {settings[name]}")
    if profile is not None:
        _as_profile(profile)
    elif grid not in (None, "base"):
        raise UserError(f"grid: {grid} needs a profile; train first, load one, or take grid='base'")


def _as_profile(table: Mapping[str, Sequence[float]]) -> Profile:
    """The profile of a config. Raises UserError when it is damaged."""
    try:
        profile = Profile(*(torch.tensor(table[key], dtype=torch.float64) for key in ("log_sigma", "x0_error")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"profile: must be {{log_sigma: [...], x0_error: [...]}} of numbers ({error!r})") from None
    levels, errors = profile.log_sigma, profile.x0_error
    if levels.dim() != 1 or levels.shape != errors.shape or len(levels) < 2:
        raise UserError(
            f"profile: log_sigma has {len(table['log_sigma'])} values and x0_error {len(table['x0_error'])}; both must "
            "be lists of the same length, two at least"
        )
    if not bool(levels.isfinite().all() and errors.isfinite().all() and (errors >= 0).all() and errors.sum() > 0):
        raise UserError("profile: log_sigma and x0_error must be finite, and x0_error positive; train it again")
    gaps = levels.diff()
    if not bool((gaps > 0).all()) or (gaps.max() - gaps.min()) > 1e-6 * (levels[-1] - levels[0]):
        raise UserError("profile: log_sigma must rise in even steps")
    return profile


def _refuse_unknown(keys: Mapping[str, Any], base: type) -> None:
    known = init_keys(base) | init_keys(InfoNoiseScheduler)
    if wrong := [key for key in keys if key not in known]:
        raise UserError(
            f"InfoNoiseScheduler: neither it nor {base.__name__} takes '{wrong[0]}'{nearest(wrong[0], known)} Keys of "
            "another stock scheduler need its name, base_class='...'"
        )


def _validated(section: type, keys: Mapping[str, Any] | None, name: str) -> Any:
    """A recipe section from its keys. Raises UserError with every problem."""
    try:
        return section.model_validate(dict(keys or {}))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, [name, *problem['loc']]))}: {problem['msg']}" for problem in error.errors()]
        raise UserError("\n".join(problems)) from None
