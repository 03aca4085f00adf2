"""How a run was launched: what would go wrong silently is refused before anything is loaded."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from entrecipes.errors import UserError
from entrecipes.recipe.training import Training

LONGEST_WAIT = timedelta(hours=4)
"""For the first process, which prepares and encodes what the others find; a process that dies ends all at once."""


def check_engine() -> None:
    """Refuse engines that this trainer does not work with, before Accelerate looks for them. Raises UserError."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "DeepSpeed: it takes over the optimizer's steps, which exact checkpoints and block schedules need here; "
            "launch with recipes/accelerate/fsdp.yaml (as ZeRO-3) or fsdp_zero2.yaml (as ZeRO-2)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP 1: set fsdp_version: 2, as recipes/accelerate/fsdp.yaml does")


def check_launch(training: Training, device: torch.device, world_size: int) -> None:
    """Refuse a launch that this trainer can't carry out, and a batch that can't be shared out.

    Args:
        training: The recipe's section.
        device: Of this process.
        world_size: Processes that train together.

    Raises:
        UserError: Naming what to launch or to set instead.
    """
    if training.precision == "fp16" and device.type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; on a CPU take bf16, or no")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world_size:
        raise UserError(
            f"{launched} processes were launched, but each believes to be one of {world_size}; on CPUs set "
            "ACCELERATE_USE_CPU=true, or launch with recipes/accelerate/ddp.yaml"
        )
    if training.batch_size % world_size:
        raise UserError(
            f"training.batch_size: {training.batch_size} images can't be shared by {world_size} processes; "
            f"take a multiple of {world_size}"
        )
    share = training.batch_size // world_size
    if training.micro_batch_size and share % training.micro_batch_size:
        raise UserError(
            f"training.micro_batch_size: {training.micro_batch_size} does not divide a process's share of "
            f"{share} images ({training.batch_size} over {world_size} processes)"
        )
