"""Random numbers as a pure function of (seed, images seen, what for), so that a resumed run repeats itself exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class StepRandom:
    """The random numbers of one optimizer step.

    Everything is drawn for the whole batch, on every process alike, and cut to the rows of this one. So the numbers do
    not depend on how many processes share the batch, at the price of drawing the others' rows too.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        """Args: `batch_size` rows over all processes, which `gather` puts together; this one is `rank` of
        `world_size`."""
        self.seed, self.batch_size, self.rank = seed, batch_size, rank
        share = batch_size // world_size
        self.rows = slice(rank * share, (rank + 1) * share)
        self.generator, self.all = torch.Generator(device), gather

    def begin(self, images: int) -> None:
        """Seed the step that starts at `images`: this object, and torch's global state (dropout inside the model)."""
        self.generator.manual_seed(derive_seed(self.seed, images, "step"))
        torch.manual_seed(derive_seed(self.seed, images, "model", self.rank))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal rows of this process [rows, *shape], float32."""
        size = (self.batch_size, *shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), rows of this process [rows, *shape]."""
        size = (self.batch_size, *shape)
        return torch.rand(size, generator=self.generator, device=self.generator.device)[self.rows]

    def common(self) -> Tensor:
        """One uniform number in [0, 1), the same in every process."""
        return torch.rand((), generator=self.generator, device=self.generator.device)
