"""Where diffusion happens: pixels, or the latents of a frozen VAE. Turns what the data loader gives into x0."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import AutoencoderKL
from torch import Tensor


class PixelSpace:
    """x0 is the image in [-1, 1]."""

    latent = False

    def encode(self, images: Tensor, normal: Callable[..., Tensor] | None = None) -> Tensor:
        """uint8 images [n, C, H, W] -> float x0 of the same shape; `normal` is not used."""
        return images.float().div_(127.5).sub_(1.0)


class LatentSpace:
    """x0 is a sample of the VAE's posterior, drawn afresh each time from the cached mean and standard deviation."""

    latent = True

    def __init__(self, vae: AutoencoderKL) -> None:
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.shift_factor or 0.0

    def encode(self, moments: Tensor, normal: Callable[..., Tensor] | None = None) -> Tensor:
        """Cached moments [n, 2C, h, w] (mean, std) -> x0 [n, C, h, w].

        `normal(*shape)` gives standard normal rows of that shape for these samples; without it, x0 is the mean.
        """
        mean, std = moments.float().chunk(2, dim=1)
        if normal is not None:
            mean = mean + std * normal(*mean.shape[1:])
        return (mean - self.shift) * self.scale
