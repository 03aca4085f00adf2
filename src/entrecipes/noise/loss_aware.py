"""Loss-aware resampling of noise levels (Nichol & Dhariwal 2021, improved DDPM, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.noise.base import NoiseSampler, RunFacts
from entrecipes.recipe.noise import LossAwareNoise


class LossAware(NoiseSampler):
    """Draws time bins in proportion to the root of their mean squared loss, and weights the loss back to be unbiased.

    The scheduler's training time is cut into K equal bins, each with its last `history` losses. Until every bin has
    that many, draws are uniform over time. `uniform_floor` of the draws stays uniform, so that every bin goes on being
    measured. Losses that are not finite are left out.
    """

    records = True

    def __init__(
        self,
        section: LossAwareNoise,
        path: GaussianPath,
        device: torch.device | str = "cpu",
        facts: RunFacts | None = None,
    ) -> None:
        self.section, self.path = section, path
        self.history = torch.zeros(section.bins, section.history, dtype=torch.float64)
        self.counts = torch.zeros(section.bins, dtype=torch.int64)  # losses ever seen: the next slot, and whether full
        self.staged: list[Tensor] = []  # [2, n] of bin and loss, on the device until the next refresh
        self.refreshed = 0
        ends = torch.tensor([path.log_sigma_min, path.log_sigma_max], dtype=torch.float64)
        self._start, self._stop = path.fraction(ends).tolist()
        self.probabilities = self._probabilities().to(device)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n levels, uniform inside their bin, each with the weight 1 / (K * probability of its bin)."""
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        above = self.probabilities.cumsum(0)
        bins = torch.searchsorted(above, u, right=True).clamp(max=self.section.bins - 1)
        probability = self.probabilities[bins]
        inside = (1 - (above[bins] - u) / probability).clamp(0, 1)  # what is left of u is uniform within the bin
        time = (bins + inside) / self.section.bins
        log_sigma = self.path.at_fraction(self._start + time * (self._stop - self._start))
        return log_sigma, 1 / (self.section.bins * probability)

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor) -> None:
        """Stage the batch's losses; nothing is read back yet."""
        time = (self.path.fraction(log_sigma) - self._start) / (self._stop - self._start)
        bins = (time * self.section.bins).floor().clamp(0, self.section.bins - 1)
        self.staged.append(torch.stack([bins, loss.detach().double()]))

    def refresh(self, images: int) -> None:
        """Take the staged losses into the histories and rebuild the probabilities, when due (waits for the device)."""
        every = self.section.refresh_every
        if images // every == self.refreshed // every:
            return
        self.refreshed = images
        if not self.staged:
            return
        bins, loss = torch.cat(self.staged, dim=1).cpu()
        self.staged.clear()
        self._append(bins[loss.isfinite()].long(), loss[loss.isfinite()])
        self.probabilities = self._probabilities().to(self.probabilities.device)

    def _append(self, bins: Tensor, loss: Tensor) -> None:
        """First in, first out, for all bins at once: the i-th new loss of a bin goes i slots on, around the ring."""
        bins, order = bins.sort(stable=True)
        new = bins.bincount(minlength=self.section.bins)
        rank = torch.arange(len(bins)) - (new.cumsum(0) - new)[bins]
        kept = rank >= new[bins] - self.section.history
        slot = (self.counts[bins] + rank) % self.section.history
        self.history[bins[kept], slot[kept]] = loss[order][kept]
        self.counts += new

    def _probabilities(self) -> Tensor:
        root = self.history.square().mean(1).sqrt()
        if bool((self.counts < self.section.history).any()) or not bool(root.sum() > 0):
            return torch.full_like(root, 1 / len(root))
        return (1 - self.section.uniform_floor) * root / root.sum() + self.section.uniform_floor / len(root)

    def state_dict(self) -> dict[str, Any]:
        """Histories, counts, staged losses and the moment of the last refresh; the probabilities follow from them."""
        staged = torch.cat(self.staged, dim=1).cpu() if self.staged else torch.zeros(2, 0, dtype=torch.float64)
        return {
            "history": self.history.clone(),
            "counts": self.counts.clone(),
            "staged": staged,
            "refreshed": self.refreshed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        device = self.probabilities.device
        self.history, self.counts = state["history"].cpu().clone(), state["counts"].cpu().clone()
        self.staged = [state["staged"].to(device)] if state["staged"].numel() else []
        self.refreshed = state["refreshed"]
        self.probabilities = self._probabilities().to(device)
