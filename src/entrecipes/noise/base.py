"""What every noise sampler does, whatever decides its density."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class NoiseSampler(Protocol):
    """Draws the noise levels of each batch.

    Called by the registry as `Sampler(section, path=path, device=device)`. Every process draws for the whole batch with
    equally seeded generators and records the whole batch, so that all hold the same state. What is not overridden here
    does nothing: a fixed distribution only draws.
    """

    records: ClassVar[bool] = False
    """Whether `record` does anything; the trainer gathers losses over processes only then."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw without waiting for the device.

        Returns:
            log sigma [n], and the factor of each sample's loss [n] (1 where the draw defines the objective); float64 on
            the generator's device, in an order that says nothing about the level.
        """

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor) -> None:
        """Take note of a batch without waiting for the device.

        Args:
            log_sigma: Noise levels [n] of the whole batch, over all processes.
            x0_error: Squared x0 errors, mean over dimensions [n].
            loss: Losses of the objective [n], before the factor that `sample` gave.
        """

    def refresh(self, images: int) -> None:
        """Rebuild what the draws follow, if that is due after this many images; called after every step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a checkpoint must hold for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
