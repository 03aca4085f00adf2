"""Models that are needed on the device for a moment: a VAE, text encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn


@contextlib.contextmanager
def visiting(device: torch.device | str | None, *models: nn.Module) -> Iterator[None]:
    """Within, models are on the device; after it where they were, and the memory that they held there is free.

    Nothing changes for those that live on the device, nor for any when there is none.
    """
    if device is None:
        yield
        return
    device = torch.device(device)
    homes = [next((weight.device for weight in model.parameters()), device) for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)
        if any(home.type != device.type for home in homes):
            clear_device_cache()
