"""Where diffusion happens: pixels, the latents of a frozen VAE, or one-hot symbols.

A space turns what the data loader gives into x0, and samples into what can be looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from entrecipes.diffusion.lettering import letters

Normal = Callable[..., Tensor]


class Space(ABC):
    """What x0 is."""

    latent = False
    columns = 10
    """Pictures in a row of a grid."""

    @abstractmethod
    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """What the data set holds [n, ...] -> float x0 [n, ...].

        `normal(*shape)` gives standard normal rows of that shape for these samples, where x0 is random itself.
        """

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples as the data set holds them -> uint8 images [n, 1 or 3, H, W] to look at."""
        return samples

    def texts(self, samples: Tensor) -> list[str] | None:
        """Samples as strings; None where they are none."""
        return None


class PixelSpace(Space):
    """x0 is the image in [-1, 1]."""

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """uint8 images [n, C, H, W] -> float x0 of the same shape; `normal` is not used."""
        return batch.float().div_(127.5).sub_(1.0)


class LatentSpace(Space):
    """x0 is a sample of the VAE's posterior, drawn afresh each time from the cached mean and standard deviation."""

    latent = True

    def __init__(self, vae: AutoencoderKL) -> None:
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.shift_factor or 0.0

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """Cached moments [n, 2C, h, w] (mean, std) -> x0 [n, C, h, w]; without `normal`, x0 is the mean."""
        mean, std = batch.float().chunk(2, dim=1)
        if normal is not None:
            mean = mean + std * normal(*mean.shape[1:])
        return (mean - self.shift) * self.scale


class SymbolSpace(Space):
    """x0 is the one-hot code of each symbol: 1 in its own channel, -1 in the others.

    Args:
        alphabet: The symbols, in the order of the channels.
    """

    columns = 4

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """Symbol ids uint8 [n, L] -> float x0 [n, V, L]; `normal` is not used."""
        x0 = torch.full((len(batch), len(self.alphabet), batch.shape[1]), -1.0, device=batch.device)
        return x0.scatter_(1, batch.long()[:, None], 1.0)

    def pictures(self, samples: Tensor) -> Tensor:
        """Symbol ids uint8 [n, L] -> their letters, uint8 [n, 3, H, W]."""
        return letters(self.texts(samples), self.alphabet)

    def texts(self, samples: Tensor) -> list[str]:
        """Symbol ids uint8 [n, L] -> strings of L symbols."""
        return ["".join(self.alphabet[i] for i in row) for row in samples.tolist()]
