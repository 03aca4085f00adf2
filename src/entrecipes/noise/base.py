"""What every noise sampler does, whatever decides its density."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunFacts:
    """What a noise sampler may know of the run that it serves."""

    images: int = 0
    """Length of the run: what a sampler's own lengths of time are shares of, where the recipe leaves them open."""
    data_std: float = 0.5
    """Standard deviation of x0 over all its numbers."""
    distinct_values: int = 256
    """Different values among the numbers of x0, as far as looked at: few in discrete data."""
    spacing: float = 2.0
    """Smallest distance between two of them: what it takes to tell the values of discrete data apart."""
    weight: Callable[[Tensor], Tensor] = torch.ones_like
    """The loss's weight on the x0 error at log sigma [n], as `Objective.weight`."""
    reduce: Callable[[Tensor], Tensor] | None = None
    """Sums a CPU tensor over processes that each record a part; None where every one records the whole batch."""


class NoiseSampler(Protocol):
    """Draws the noise levels of each batch.

    Called by the registry as `Sampler(section, path=path, device=device, facts=RunFacts(...))`. Every process draws for
    the whole batch with equally seeded generators and records the whole batch, so that all hold the same state. What is
    not overridden here does nothing: a fixed distribution only draws.
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

    def refresh(self, images: int) -> dict[str, Any] | None:
        """Rebuild what the draws follow, if that is due after this many images; called after every step.

        Returns:
            What to log of a rebuilt table, as plain numbers and lists; None when there is nothing to say.
        """

    def publish(self, folder: Path, scheduler: Any) -> None:
        """Write what is worth loading beside the pipeline into the run folder.

        Args:
            folder: The run folder.
            scheduler: The pipeline's own scheduler.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a checkpoint must hold for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def evenly(n: int, generator: torch.Generator) -> Tensor:
    """Shares u [n] of a distribution, one from each of its n equal parts, in random order; float64."""
    u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    order = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64).argsort()
    return (order + u) / n
