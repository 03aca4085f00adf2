"""Optimizers by name, the learning rate as a function of images, and the change of the trained set in mid-run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from entrecipes.errors import UserError, nearest
from entrecipes.recipe import training as sections
from entrecipes.recipe.base import build


def adamw(section: sections.AdamWOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """torch's AdamW, fused: one kernel for all weights, on CPU and CUDA alike."""
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


def bitsandbytes(section: sections.Optimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """bitsandbytes' 8-bit optimizers; they step on the CPU too (tensors below 4,096 elements keep 32-bit state)."""
    import bitsandbytes

    classes = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}
    cls = getattr(bitsandbytes.optim, classes[section.type])
    return cls(parameters, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay)


def from_torch(section: sections.TorchOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Any class of `torch.optim`.

    Raises:
        UserError: For an unknown class or an argument that it refuses.
    """
    names = [name for name, item in vars(torch.optim).items() if isinstance(item, type) and issubclass(item, Optimizer)]
    if section.name not in names:
        raise UserError(f"optimizer.name: torch.optim has no '{section.name}'{nearest(section.name, names)}")
    options = {"lr": section.learning_rate, "weight_decay": section.weight_decay} | section.options
    try:
        return getattr(torch.optim, section.name)(parameters, **options)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"optimizer.options: torch.optim.{section.name} refuses them: {error}") from error


def build_optimizer(section: sections.Optimizer, model: nn.Module, previous: Optimizer | None = None) -> Optimizer:
    """An optimizer over the trainable weights of `model`.

    Args:
        section: The recipe's `optimizer:`.
        model: Its parameters with `requires_grad` are trained.
        previous: When the trained set has changed: the optimizer so far. Weights that stay trainable keep their state;
            the state of frozen ones is dropped, which is where freezing saves memory.

    Raises:
        UserError: When nothing is trainable.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError("no weight is trainable; check the recipe's `blocks:` section")
    optimizer = build("optimizer", section, parameters=parameters)
    if previous:
        set_learning_rate(optimizer, previous.param_groups[0]["lr"])  # the log may ask before the next step
        for parameter in parameters:
            if parameter in previous.state:
                optimizer.state[parameter] = previous.state[parameter]
    return optimizer


def learning_rate(section: sections.Optimizer, images: int, total_images: int) -> float:
    """The learning rate of the step that starts at `images`."""
    schedule, peak = section.schedule, section.learning_rate
    warmup = min(1.0, (images + 1) / schedule.warmup) if schedule.warmup else 1.0
    if schedule.decay == "constant":
        return peak * warmup
    if schedule.decay == "inverse_sqrt":
        return peak * warmup / math.sqrt(max(1.0, images / max(1, schedule.decay_start)))
    start = max(schedule.warmup, schedule.decay_start)
    progress = min(1.0, max(0.0, (images - start) / max(1, total_images - start)))
    progress = schedule.span[0] + (schedule.span[1] - schedule.span[0]) * progress
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1 - progress
    return peak * warmup * (schedule.final + (1 - schedule.final) * shape)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Give every group of the optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
