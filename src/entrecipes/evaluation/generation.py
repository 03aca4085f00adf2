"""Generate images with a stock pipeline, each from its own seed: batch size and process count change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from entrecipes.diffusion.family import Family
from entrecipes.errors import UserError


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Shard:
    """One process among those that share a measurement; without arguments, the only one."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = _unchanged
    """Concatenates equally sized tensors of all processes along the first dimension, in rank order."""
    sum: Callable[[Tensor], Tensor] = _unchanged
    """Adds up tensors of all processes."""
    device: torch.device | None = None
    """Where tensors must be for both; None: anywhere."""

    @classmethod
    def here(cls) -> Shard:
        """This process among those that a launcher has started; accelerate's state must know of them already."""
        state = PartialState()
        total = partial(reduce, reduction="sum")
        return cls(state.process_index, state.num_processes, gather, total, state.device)

    def rows(self, count: int) -> Tensor:
        """This process's share of `count` items, int64 [share].

        All shares are equally long, as gathering wants it: the last ones repeat the last item.
        """
        share = -(-count // self.world_size)
        return torch.arange(self.rank * share, (self.rank + 1) * share).clamp(max=count - 1)

    def of(self, items: Tensor) -> Tensor:
        """This process's share of items [count, ...], along the first dimension."""
        return items if self.world_size == 1 else items[self.rows(len(items)).to(items.device)]

    def own(self, count: int) -> int:
        """How many of those are not repeated; they come first."""
        share = -(-count // self.world_size)
        return min(max(count - self.rank * share, 0), share)

    def join(self, part: Tensor, count: int) -> Tensor:
        """The shares [share, ...] of all processes as one [count, ...], without what was repeated."""
        return self.gather(part.to(self.device))[:count]

    def total(self, part: Tensor) -> Tensor:
        """The sum over processes, where the part is."""
        return self.sum(part.to(self.device)).to(part.device)


def offload(pipeline: DiffusionPipeline, how: str, device: torch.device, folder: Path | None = None) -> None:
    """Leave a pipeline's weights in the host's memory, and bring to the device what computes, while it does.

    Args:
        how: `model`: one model at a time, of experts one expert; nearly as fast as all on the device. `group`: one
            layer at a time, on CUDA the next one copied while one computes; as slow as the copying, and weights hardly
            count any more. Layers, not blocks, since models reach into blocks (DiT's head into the first one).
        device: Where it computes.
        folder: With `group`, keep the layers in files there in place of the host's memory.

    Raises:
        UserError: For single layers of a base in 4 bits, whose statistics diffusers leaves behind.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if how == "model":
        pipeline.enable_model_cpu_offload(device=device)
        for part in parts.values():
            if hasattr(part, "enable_expert_offload"):
                part.enable_expert_offload(device)
        return
    if any(hasattr(weight, "quant_state") for part in parts.values() for weight in part.parameters()):
        raise UserError("--offload group: can't take layers in 4 bits apart; take --offload model")
    streams = device.type == "cuda"
    for name, part in parts.items():
        for number, model in enumerate(getattr(part, "experts", [part])):  # each has its own order of layers
            apply_group_offloading(
                model,
                device,
                offload_type="leaf_level",
                use_stream=streams,
                record_stream=streams,
                offload_to_disk_path=folder and str(folder / f"{name}-{number}"),
            )


def balanced_labels(count: int, num_classes: int) -> list[int]:
    """`count` labels that go round all classes: 0, 1, ..., 0, 1, ..."""
    return [i % num_classes for i in range(count)]


@torch.inference_mode()
def generate(
    pipeline: DiffusionPipeline,
    family: Family,
    condition: Sequence[Any] | None,
    count: int,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
    **options: Any,
) -> Tensor:
    """Sample `count` images; image i starts from the seed `seed + i` whatever the batch or the process.

    Args:
        condition: One label or condition map [C, F, H, W] an image, or None for an unconditional model.
        shard: Processes that share the work; every one gets all images.
        options: Whatever else the pipeline is called with.

    Returns:
        uint8 [count, C, H, W] (sequences: symbol ids [count, L]; clips: [count, 3, F, H, W]) on the CPU.
    """
    images = []
    for indices in map(Tensor.tolist, shard.rows(count).split(batch_size)):
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in indices]
        wanted = [condition[i] for i in indices] if condition is not None else None
        images.append(family.generate(pipeline, wanted, len(indices), steps, guidance_scale, generators, **options))
    return shard.join(torch.cat(images), count).cpu()
