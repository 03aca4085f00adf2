"""Held-out nats: the denoising error on a fixed bundle of images, noise and noise levels, as information.

Every measurement sees the same pairs, so that differences between models or moments are differences of the models: a
cheap, low-variance quality number. The gate must be pinned in comparisons: without it the sum is ruled by the lowest
noise levels, where sigma^-2 multiplies the network's own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entrecipes.evaluation.result import Metric
from entrecipes.information.nats import gate, integrate_nats
from entrecipes.recipe.evaluation import HeldOut

if TYPE_CHECKING:
    from entrecipes.diffusion.path import GaussianPath
    from entrecipes.evaluation.generation import Shard

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""x0 [n, ...], noise [n, ...], log_sigma [n], condition [n, ...] or None: what a denoiser is called with."""
X0Error = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""The same -> squared x0 error, mean over dimensions [n]."""


@dataclass(frozen=True)
class HeldOutResult:
    """One measurement of one bundle.

    Args:
        log_sigma: Noise levels [L].
        x0_error: Squared x0 error per level [L], summed over dimensions, mean over images.
        gate: Gate per level [L], 1 everywhere without a gate.
        nats: Integral over log sigma of gate * x0_error / sigma^2 (Guo, Shamai & Verdu 2005: dH/dlog sigma).
        nats_standard_error: Its standard error over the bundle's images. Two measurements of the same bundle share
            their images and noise, so their difference is known far better than this.
    """

    log_sigma: Tensor
    x0_error: Tensor
    gate: Tensor
    nats: float
    nats_standard_error: float
    images: int
    section: HeldOut

    @property
    def rate(self) -> Tensor:
        """Nats per unit log sigma, not gated: x0_error / sigma^2 [L]."""
        return self.x0_error * torch.exp(-2 * self.log_sigma)

    def to_row(self) -> dict[str, Any]:
        """The measurement as plain numbers and lists, for a log."""
        curves = {name: getattr(self, name).tolist() for name in ("log_sigma", "x0_error", "rate", "gate")}
        return {"nats": self.nats, "nats_standard_error": self.nats_standard_error, **curves}

    def to_metric(self, origin: Mapping[str, str | int | float | None] | None = None) -> Metric:
        """The nats with their origin.

        Args:
            origin: What the caller knows (data, split, ema).

        Raises:
            UserError: If the nats are not finite.
        """
        about = {
            **(origin or {}),
            "samples": self.images,
            "noise_levels": len(self.log_sigma),
            "log_sigma_min": round(self.log_sigma[0].item(), 4),
            "log_sigma_max": round(self.log_sigma[-1].item(), 4),
            "gate_pivot": self.section.gate_pivot,
            "seed": self.section.seed,
            "spread": "standard error over images",
        }
        return Metric("heldout_nats", self.nats, self.nats_standard_error, about, higher_is_better=False)


def nats_per_image(log_sigma: Tensor, x0_error: Tensor, gate_pivot: float | None) -> tuple[Tensor, Tensor]:
    """Gated integral of each image's error over the noise levels.

    Args:
        log_sigma: Increasing grid [L].
        x0_error: Squared x0 errors [N, L], summed over dimensions.
        gate_pivot: Sigma at which the gate is one half; None: no gate.

    Returns:
        Nats of each image [N] and the gate [L], float64.
    """
    log_sigma, x0_error = log_sigma.double(), x0_error.double()
    open_gate = gate(log_sigma, gate_pivot)
    return integrate_nats(log_sigma, x0_error, open_gate), open_gate


class HeldOutBundle:
    """Images, each with one fixed noise per noise level; the levels are even in log sigma over the path's range.

    Args:
        section: Number of levels, gate and seed (`images` is the caller's to cut).
        x0: Clean images or latents, float [N, ...], on the device where the model is.
        condition: Class labels int64 [N], condition maps float [N, C, F, H, W], or None.
        path: Gives the range, `log_sigma_min` and `log_sigma_max`.
    """

    def __init__(self, section: HeldOut, x0: Tensor, condition: Tensor | None, path: GaussianPath) -> None:
        self.section, self.x0, self.condition = section, x0, condition
        self.log_sigma = torch.linspace(
            float(path.log_sigma_min), float(path.log_sigma_max), section.noise_levels, dtype=torch.float64
        )

    def noise(self, level: int) -> Tensor:
        """The noise of all images at one level, like `x0`; drawn anew each time, since keeping it takes L times x0.

        Drawn on the CPU from (seed, level), so that it is the same on any device.
        """
        generator = torch.Generator().manual_seed(self.section.seed * 100_003 + level)
        return torch.randn(self.x0.shape, generator=generator).to(self.x0)

    def batches(self, batch_size: int, images: Tensor | None = None) -> Iterator[tuple[int, Batch]]:
        """Every pair of image and noise level in mini-batches, level after level: the level's index, and the batch.

        Args:
            batch_size: Pairs in a batch, at most.
            images: Indices of the images [n]; None: all.
        """
        images = torch.arange(len(self.x0), device=self.x0.device) if images is None else images
        for level, log_sigma in enumerate(self.log_sigma.tolist()):
            noise = self.noise(level)
            for batch in images.chunk(math.ceil(len(images) / batch_size)):
                levels = torch.full((len(batch),), log_sigma, device=self.x0.device, dtype=torch.float32)
                yield (
                    level,
                    (self.x0[batch], noise[batch], levels, None if self.condition is None else self.condition[batch]),
                )

    @torch.inference_mode()
    def measure(self, x0_error: X0Error, batch_size: int = 250, shard: Shard | None = None) -> HeldOutResult:
        """Measure a denoiser, in eval mode, on every pair of image and noise level.

        Args:
            x0_error: The denoiser's mean squared x0 error.
            batch_size: Pairs evaluated at a time; the result depends on it only by rounding.
            shard: Processes that share the images; every one gets the whole result.
        """
        errors = self.each(lambda *batch: x0_error(*batch).float(), batch_size, shard)
        return self._result(errors.cpu().double() * self.x0[0].numel())

    def each(self, value: X0Error, batch_size: int, shard: Shard | None = None) -> Tensor:
        """One value of every pair of image and noise level [N, L], on the device; arguments as for `measure`."""
        mine = shard.rows(len(self.x0)).to(self.x0.device) if shard else None
        values: list[list[Tensor]] = [[] for _ in self.log_sigma]
        for level, batch in self.batches(batch_size, mine):
            values[level].append(value(*batch))
        stacked = torch.stack([torch.cat(parts) for parts in values], dim=1)
        return shard.join(stacked, len(self.x0)) if shard else stacked

    def _result(self, errors: Tensor) -> HeldOutResult:
        """From the errors of all pairs [N, L], summed over dimensions."""
        nats, open_gate = nats_per_image(self.log_sigma, errors, self.section.gate_pivot)
        return HeldOutResult(
            log_sigma=self.log_sigma,
            x0_error=errors.mean(0),
            gate=open_gate,
            nats=nats.mean().item(),
            nats_standard_error=(nats.std() / math.sqrt(len(nats))).item() if len(nats) > 1 else 0.0,
            images=len(errors),
            section=self.section,
        )
