"""Where diffusion happens: pixels, the latents of a frozen VAE, one-hot symbols, or clips with their condition.

A space turns what the data loader gives into x0, and samples into what can be looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from entrecipes.diffusion.lettering import letters
from entrecipes.models.pose_video import latent_scale

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

    def condition(self, batch: Tensor) -> Tensor | None:
        """What the data set holds [n, ...] -> the maps that the model is conditioned on; None: labels are all."""
        return None

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples as the data set holds them -> uint8 images [n, 1 or 3, H, W] to look at."""
        return samples

    def texts(self, samples: Tensor) -> list[str] | None:
        """Samples as strings; None where they are none."""
        return None


class PixelSpace(Space):
    """x0 is the image in [-1, 1]."""

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """uint8 images [n, C, H, W], or clips of them, -> float x0 of the same shape; `normal` is not used."""
        return _signed(batch)


class LatentSpace(Space):
    """x0 is a sample of the VAE's posterior, drawn afresh each time from the cached mean and standard deviation."""

    latent = True

    def __init__(self, vae: AutoencoderKL) -> None:
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.shift_factor or 0.0

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """Cached moments [n, 2C, ..., h, w] (mean, std) -> x0 [n, C, ..., h, w]; without `normal`, x0 is the mean."""
        mean, std = batch.float().chunk(2, dim=1)
        if normal is not None:
            mean = mean + std * normal(*mean.shape[1:])
        return (mean - self.shift) * self.scale


def clip_parts(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of clips as a data set holds them [n, 3, 2F + 1, H, W].

    Returns:
        Frames and pose maps, [n, 3, F, H, W] each, and the reference [n, 3, H, W].
    """
    frames = batch.shape[2] // 2
    return batch[:, :, :frames], batch[:, :, frames:-1], batch[:, :, -1]


class ClipSpace(Space):
    """x0 is a clip of pixels in [-1, 1]; the condition are its pose maps and a reference image of the person.

    A data set holds all three as uint8 [n, 3, 2F + 1, H, W]: F frames, F pose maps and the reference.
    """

    columns = 1

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """uint8 [n, 3, 2F + 1, H, W] -> x0 [n, 3, F, H, W]; `normal` is not used."""
        return _signed(clip_parts(batch)[0])

    def condition(self, batch: Tensor) -> Tensor:
        """uint8 [n, 3, 2F + 1, H, W] -> pose maps and, on every frame, the reference: [n, 6, F, H, W] in [-1, 1]."""
        _, poses, reference = clip_parts(batch)
        return _signed(torch.cat([poses, reference[:, :, None].expand_as(poses)], dim=1))

    def pictures(self, samples: Tensor) -> Tensor:
        """Clips uint8 [n, 3, F, H, W] -> film strips [n, 3, H, F * W], one frame beside the other."""
        return film_strips(samples)


class LatentClipSpace(ClipSpace):
    """x0 is a clip in the normalised latents of a video VAE, drawn afresh each time; so is its condition, not drawn."""

    latent = True

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.mean, self.std = latent_scale(vae)

    def encode(self, batch: Tensor, normal: Normal | None = None) -> Tensor:
        """Cached latents [n, 4C, F', h, w] (see `cache_latents`) -> x0 [n, C, F', h, w]; without `normal`, the mean."""
        mean, std, _, _ = batch.float().chunk(4, dim=1)
        if normal is not None:
            mean = mean + std * normal(*mean.shape[1:])
        return self._normalised(mean)

    def condition(self, batch: Tensor) -> Tensor:
        """Cached latents [n, 4C, F', h, w] -> those of the pose maps and of the reference [n, 2C, F', h, w]."""
        return torch.cat([self._normalised(part) for part in batch.float().chunk(4, dim=1)[2:]], dim=1)

    def _normalised(self, latents: Tensor) -> Tensor:
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)


def film_strips(clips: Tensor) -> Tensor:
    """Clips [n, 3, F, H, W] -> their frames side by side, [n, 3, H, F * W]."""
    return clips.permute(0, 1, 3, 2, 4).flatten(3)


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


def _signed(pixels: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
