"""Several networks that share the noise levels between them, as one model that diffusers' own pipelines can call.

The file imports torch and diffusers only, and is saved beside the weights (as `entrecipes.py`, with `slim.py`): where
entrecipes is not installed, diffusers loads the model from there, with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from .slim import SLIM  # diffusers finds what to copy by this form alone

INTERFACE = ("in_channels", "out_channels", "sample_size", "num_class_embeds", "num_embeds_ada_norm")
"""Config keys that all experts must agree on: what they are called with and what comes back."""


class TimestepExperts(ModelMixin, ConfigMixin):
    """N networks of one interface, each for a range of timesteps (eDiff-I, Balaji et al. 2022; TDC, arXiv 2312.13307).

    It stands where a pipeline expects one `UNet2DModel` or `DiTTransformer2DModel`. Its config holds what the experts'
    configs agree on, such as `sample_size`; each expert is saved in a folder of its own, and loads alone.

    Args:
        experts: The networks, that of the noisiest levels first.
        boundaries: N - 1 timesteps, descending, in what the networks are called with: expert i serves
            timestep >= boundaries[i], the last one the rest.

    Raises:
        ValueError: When the numbers don't fit, the boundaries don't descend, or the experts are not of one interface.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, experts: Sequence[ModelMixin], boundaries: Sequence[float]) -> None:
        super().__init__()
        experts, boundaries = list(experts), [_single(boundary) for boundary in boundaries]
        if len(experts) != len(boundaries) + 1:
            raise ValueError(f"{len(experts)} experts take {len(experts) - 1} boundaries, not {len(boundaries)}")
        if any(noisier <= cleaner for noisier, cleaner in pairwise(boundaries)):
            raise ValueError(f"boundaries {boundaries}: give timesteps that descend, from noise to data")
        configs = [_config(expert) for expert in experts]
        for key in INTERFACE:
            if any(config.get(key) != configs[0].get(key) for config in configs):
                raise ValueError(f"experts differ in {key}: {[config.get(key) for config in configs]}; make them agree")
        shared = {key: value for key, value in configs[0].items() if all(c.get(key) == value for c in configs)}
        shared.pop("_class_name", None)
        own = [{key: value for key, value in config.items() if key not in shared} for config in configs]
        self.register_to_config(**shared, boundaries=boundaries, expert_configs=own)
        self.experts = nn.ModuleList(experts)
        self.boundaries = boundaries
        self._serving: int | None = None
        self._onload: torch.device | None = None
        self._resident: int | None = None

    def expert_for(self, timestep: float) -> int:
        """The number of the expert that serves a timestep.

        Raises:
            ValueError: When the timestep is not a number.
        """
        timestep = _single(timestep)
        return next((i for i, boundary in enumerate(self.boundaries) if timestep >= boundary), len(self.boundaries))

    @contextmanager
    def serving(self, number: int | None) -> Iterator[None]:
        """Inside, this expert serves every call, whatever the timestep (which is then not read); None: as usual.

        Raises:
            ValueError: When there is no such expert.
        """
        if number is not None and number not in range(len(self.experts)):
            raise ValueError(f"expert {number}: there are experts 0 to {len(self.experts) - 1}")
        before, self._serving = self._serving, number
        try:
            yield
        finally:
            self._serving = before

    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """What the expert of the timestep gives.

        A batch of mixed timesteps is split by expert, together with all other tensors that have one row a sample.
        Timesteps on an accelerator are read, which waits for it; inside `serving` they are not.

        Args:
            sample: [n, ...], the expert's first argument.
            timestep: One number, or [n].
            args: Further arguments of the expert.
            kwargs: Such as `class_labels` [n] and `return_dict`.

        Raises:
            ValueError: When a timestep is not a number, or there is neither one nor one a sample.
        """
        numbers = self._route(timestep, len(sample))
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        used = sorted(set(numbers))
        if len(used) == 1:
            return self._ready(used[0])(sample, times, *args, **kwargs)
        outputs, order = [], []
        for number in used:
            rows = torch.tensor([row for row, other in enumerate(numbers) if other == number], device=sample.device)
            part = [_rows(value, rows, len(sample)) for value in (sample, times, *args)]
            named = {name: _rows(value, rows, len(sample)) for name, value in kwargs.items()}
            outputs.append(self._ready(number)(*part, **named))
            order.append(rows)
        return _joined(outputs, torch.cat(order).argsort())

    def enable_expert_offload(self, device: torch.device | str) -> None:
        """Keep on `device` the expert that serves alone; the others wait on the CPU, and move when a border is crossed.

        Moving the model with `to` afterwards changes the device and keeps the others where they are.
        """
        for expert in self.experts:
            expert.to("cpu")
        self._onload, self._resident = torch.device(device), None

    def disable_expert_offload(self) -> None:
        """Keep all experts on the device again."""
        device, self._onload, self._resident = self._onload, None, None
        if device is not None:
            self.to(device)

    def to(self, *args: Any, **kwargs: Any) -> TimestepExperts:
        """As `torch.nn.Module.to`; with idle experts offloaded only the device of the one that serves changes."""
        if self._onload is None:
            return super().to(*args, **kwargs)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            super().to(dtype)
        if device not in (None, self._onload):  # the hooks of `enable_model_cpu_offload` ask before every call
            self.enable_expert_offload(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the samples belong."""
        return super().device if self._onload is None else self._onload

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Save `config.json`, each expert as `expert_0`, `expert_1`, ..., and this source; options are diffusers' own.

        Raises:
            ValueError: When the folder holds experts that this model has not.
        """
        folder = Path(save_directory)
        if surplus := _surplus(folder, len(self.experts)):
            raise ValueError(f"{surplus}: of another model; delete it, or save into an empty folder")
        for number, expert in enumerate(self.experts):
            expert.save_pretrained(
                folder / f"expert_{number}",
                is_main_process=is_main_process,
                save_function=save_function,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
            )
        if is_main_process:
            self.save_config(folder)
            shutil.copyfile(__file__, folder / "entrecipes.py")
            shutil.copyfile(Path(__file__).with_name("slim.py"), folder / "slim.py")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> TimestepExperts:
        """Load what `save_pretrained` left, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: The folder, or a Hub id.
            subfolder: Folder in it.
            options: diffusers' own for each expert, such as `torch_dtype` and `variant`.

        Raises:
            ValueError: Naming the folder, when an expert is missing, is one too many, or is not the one that was saved.
            OSError: When there is no config.
        """
        source = str(pretrained_model_name_or_path)
        config = cls.load_config(source, subfolder=subfolder, **_of_hub(options))
        place = Path(source, subfolder or "")
        if not {"boundaries", "expert_configs"} <= set(config):
            raise ValueError(f"{place}: its config.json has no boundaries, so these are no experts; give their folder")
        count = len(config["expert_configs"])
        if surplus := _surplus(place, count):
            raise ValueError(f"{surplus}: one too many for the {count} experts of config.json; delete it")
        experts = []
        for number, own in enumerate(config["expert_configs"]):
            name = f"{subfolder}/expert_{number}" if subfolder else f"expert_{number}"
            if place.is_dir() and not (place / f"expert_{number}").is_dir():
                raise ValueError(f"{place / f'expert_{number}'}: missing, one of {count} experts; copy it back")
            experts.append(_load(source, name, {**config, **own}, options))
        return cls(experts, config["boundaries"]).eval()

    def _route(self, timestep: Tensor | float, count: int) -> list[int]:
        if self._serving is not None:
            return [self._serving]
        times = timestep.reshape(-1).tolist() if isinstance(timestep, Tensor) else [timestep]
        if len(times) not in (1, count):
            raise ValueError(f"{len(times)} timesteps for {count} samples: give one, or one a sample")
        return [self.expert_for(time) for time in times]

    def _ready(self, number: int) -> nn.Module:
        """The expert, on the device."""
        if self._onload is not None and number != self._resident:
            if self._resident is not None:
                self.experts[self._resident].to("cpu")
            self.experts[number].to(self._onload)
            self._resident = number
        return self.experts[number]


def _single(timestep: float) -> float:
    """In the precision that schedulers keep timesteps in, so that a boundary taken from them is met exactly."""
    if not float(timestep) == float(timestep):
        raise ValueError("timestep nan: no expert serves it; give numbers")
    return torch.tensor(float(timestep), dtype=torch.float32).item()


def _config(expert: ModelMixin) -> dict[str, Any]:
    """What is saved of it, as JSON gives it back."""
    config = {key: value for key, value in expert.config.items() if not key.startswith("_")}
    return json.loads(json.dumps({**config, "_class_name": type(expert).__name__}))


def _rows(value: Any, rows: Tensor, count: int) -> Any:
    """Rows of a tensor that has one a sample; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value


def _joined(outputs: list[Any], order: Tensor) -> Any:
    """Outputs of parts of a batch as one: tuples, or diffusers' dataclasses."""
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts)[order] for parts in zip(*outputs, strict=True))
    return type(outputs[0])(**{key: torch.cat([part[key] for part in outputs])[order] for key in outputs[0]})


def _surplus(folder: Path, count: int) -> Path | None:
    """A folder of an expert above the last."""
    found = sorted(folder.glob("expert_*"))
    return next((path for path in found if path.name not in {f"expert_{number}" for number in range(count)}), None)


def _of_hub(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say where on the Hub to look, and how."""
    return {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}


def _load(source: str, subfolder: str, wanted: dict[str, Any], options: dict[str, Any]) -> ModelMixin:
    """One expert, when it is the one that the config of all describes."""
    place, name = Path(source, subfolder), wanted["_class_name"]
    found = {cls.__name__: cls for cls in SLIM.values()}.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"{place}: no model class {name}; update diffusers, or save the experts again")
    try:
        expert, info = found.from_pretrained(source, subfolder=subfolder, output_loading_info=True, **options)
        config = found.load_config(source, subfolder=subfolder, **_of_hub(options))
        said = _config(expert) | {"_class_name": config["_class_name"]}
    except Exception as error:  # of many kinds, by what the file looks like
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{place}: this expert can't be loaded ({first_line}); copy its folder back") from error
    differing = [key for key in ("_class_name", *said) if key in wanted and wanted[key] != said[key]]
    if differing:
        raise ValueError(
            f"{place}: another model's expert ({differing[0]} is {said[differing[0]]}, not {wanted[differing[0]]}); "
            "copy the right folder back, or save the experts together again"
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        keys = [*info["missing_keys"], *info["unexpected_keys"]]
        raise ValueError(f"{place}: its weights are another model's ({keys[0]}); copy the right folder back")
    for parameter in expert.parameters():
        if parameter.device.type == "cpu":  # out of the mapped file, where lack of alignment changes the last bits
            parameter.data = parameter.data.clone()
    return expert


# diffusers writes the module that a class says it lives in into model_index.json, and looks it up there by name.
TimestepExperts.__module__ = "entrecipes"
