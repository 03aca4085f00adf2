"""Weights, gradients and optimizer state shared out over the processes (FSDP2, by Accelerate), and made whole again.

Evaluation, checkpoints and publishing work on whole weights: on a copy in the host's memory that is brought up to date
only when they are due. So a sharded run samples, resumes and publishes as any other does. What it needs beyond its
shards: room for the whole model on the device while it is measured, and in the host's memory, for each process, 8 bytes
a weight (the model's copy and the average's), and 16 more while a checkpoint is made.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.training import Ema
from entrecipes.training.ema import EmaModel


def asked_for() -> bool:
    """Whether the launcher asks for sharding."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def prepare_sharded(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Accelerate's `prepare` of both; of a model that is sharded already, of the optimizer over its shards alone.

    Again for both, Accelerate would tell weights by their addresses, and a process' empty shards have none.
    """
    if isinstance(model, FSDPModule):
        accelerator._optimizers.clear()
        return model, accelerator.prepare_optimizer(optimizer)
    _shard_by_blocks(accelerator, model)
    prepared = accelerator.prepare(model, optimizer)
    _keep_names(model)
    _lower_products(accelerator, model)
    return prepared


def _shard_by_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """Every block of the model is sharded on its own: the modules in its lists, such as `transformer_blocks`.

    Accelerate turns FSDP on for accelerators alone; torch shards over CPUs, too, and so do we.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    names = {type(block).__name__ for blocks in lists for block in blocks}
    # A DiT's head calls the embedder of block 0, whose weights are gone by then unless it is a unit of its own.
    names |= {"CombinedTimestepLabelEmbeddings"} & {type(module).__name__ for module in model.modules()}
    state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
    # Accelerate's would also round what goes in, timesteps among it, and the gradients' sums; see `_lower_products`
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def _lower_products(accelerator: Accelerator, model: nn.Module) -> None:
    """Compute as wrapped models do under the run's precision (autocast, a float32 result), once for each model."""
    if accelerator.mixed_precision == "no" or "forward" in vars(model):
        return
    forward = model.forward

    def lowered(*args: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **options)

    model.forward = convert_outputs_to_fp32(lowered)


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward pass has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keep_names(model: nn.Module) -> None:
    """Call the classes that sharding has made of the model's as those: configs, layouts and messages go by the name."""
    for kind in {type(module) for module in model.modules() if isinstance(module, FSDPModule)}:
        own = next(base for base in kind.__mro__[1:] if base is not FSDPModule)
        kind.__name__, kind.__qualname__, kind.__module__ = own.__name__, own.__qualname__, own.__module__


def check_sharded(recipe: Recipe) -> None:
    """Refuse what can't be sharded. Raises UserError."""
    optimizer, adapter = recipe.optimizer.type, recipe.blocks.adapter
    if optimizer.endswith("8bit"):
        raise UserError(f"FSDP: optimizer.type {optimizer} knows no shards; take adamw, whose state is sharded, or ddp")
    if adapter.type == "qlora" or getattr(adapter, "quantise", False):
        raise UserError("FSDP: a quantised base is not sharded; take lora (or quantise=null), or launch with ddp")
    if hasattr(recipe.blocks, "closed") and recipe.blocks.closed.quantise:
        raise UserError("FSDP: quantised closed blocks are not sharded; set blocks.closed.quantise=null, or take ddp")
    if recipe.prune.type == "entpruner":
        raise UserError("FSDP: entpruner's vote needs gradients of whole weights; take prune.type linear, or ddp")
    if getattr(recipe.prune, "distill", None):
        raise UserError("FSDP: prune.distill needs a teacher beside the shards; set it to null, or launch with ddp")
    if "taylor" in (getattr(recipe.prune, "score", ""), getattr(recipe.blocks, "score", "")):
        raise UserError("FSDP: the score taylor needs gradients of whole weights; take loss_rise, or launch with ddp")
    if recipe.experts.type == "tdc":
        raise UserError("FSDP: experts are networks of their own, each smaller than the base; launch with ddp")


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, which shares its memory; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """Nested dicts and lists with every shard gathered, on the CPU. All processes have to call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def shard_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as another of its shape is."""
    if not isinstance(sharded, DTensor):
        return tensor.to(sharded.device)
    placed = tensor.detach().to(sharded.device)
    return distribute_tensor(placed, sharded.device_mesh, sharded.placements, src_data_rank=None)


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's whole state, each moment laid out as its weight is: sharded like it, one at a time, with its
    strides, on which fused kernels rely and which checkpoints don't keep."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid_out = {
        index: {name: _as_laid_out(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": laid_out})


def _as_laid_out(value: Any, parameter: Tensor) -> Any:
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    value = shard_like(value, parameter)
    return (
        value if value.stride() == parameter.stride() else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    )


class WholeCopy:
    """A whole copy, on the CPU, of a model that is sharded."""

    def __init__(self, model: nn.Module) -> None:
        """Args: `model` is not sharded yet."""
        self.model = copy.deepcopy(model).to("cpu").requires_grad_(False).eval()

    def follow(self, model: nn.Module) -> None:
        """Be a copy of this model from now on (again, after blocks were removed from both)."""
        self._pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def collect(self) -> nn.Module:
        """Bring the copy up to date and return it. All processes have to call it."""
        for own, their in [*self._pairs, *self._buffers]:
            own.copy_(whole(their.detach()))
        return self.model

    @torch.no_grad()
    def share_out(self) -> None:
        """Give the sharded model the copy's weights."""
        for own, their in [*self._pairs, *self._buffers]:
            local(their.detach()).copy_(local(shard_like(own, their)))


class ShardedEma(EmaModel):
    """The averaged model of a sharded one: each process averages its shards; `model` is whole, and on the CPU."""

    def __init__(self, section: Ema, model: nn.Module, eligible: Callable[[str], bool] = lambda name: True) -> None:
        """Args: `model` is averaged from its present weights on; `eligible` says by name which may be trained."""
        self.section, self.eligible = section, eligible
        self.model = copy.deepcopy(model).to("cpu").requires_grad_(False).eval()
        self._averages: dict[nn.Parameter, Tensor] = {}

    def follow(self, model: nn.Module) -> None:
        pairs = zip(self.model.named_parameters(), model.parameters(), strict=True)
        pairs = [(own, their.detach()) for (name, own), their in pairs if self.eligible(name)]
        known = self._averages
        self._averages = {own: known[own] if own in known else shard_like(own, their).clone() for own, their in pairs}
        mine = [local(average) for average in self._averages.values()]
        self._mine, self._theirs = (mine, list(self.model.buffers())), ([local(t) for _, t in pairs], [])
        self._buffers = list(model.buffers())

    @torch.no_grad()
    def update(self, images: int, batch_size: int) -> None:
        torch._foreach_lerp_(self._mine[0], self._theirs[0], 1.0 - self.decay(images, batch_size))

    @torch.no_grad()
    def collect(self) -> nn.Module:
        for own, average in self._averages.items():
            own.copy_(whole(average))
        for own, their in zip(self.model.buffers(), self._buffers, strict=True):
            own.copy_(their)
        return self.model

    @torch.no_grad()
    def share_out(self) -> None:
        for own, average in self._averages.items():
            local(average).copy_(local(shard_like(own, average)))
