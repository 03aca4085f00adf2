"""What every noise sampler does, whatever decides its density."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class NoiseSampler(Protocol):
    """Draws the noise levels of each batch.

    Called by the registry as `Sampler(section, path=path, device=device)`. Every process draws for the whole batch with
    equally seeded generators and records the whole batch, so that all hold the same state.
    """

    records: bool
    """Whether `record` does anything; the trainer gathers losses over processes only then."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """log sigma [n], float64 on the generator's device, and the weight of each sample's loss [n]."""

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor) -> None:
        """What the batch showed, all [n]: noise levels, x0 errors and unweighted-by-sampling losses. Must not wait for the device."""

    def refresh(self, images: int) -> None:
        """Called after every step with the images seen: the moment to rebuild a table, when it is due."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a checkpoint must hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
