"""Loss-aware resampling of noise levels (Nichol & Dhariwal 2021, improved DDPM, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.recipe.noise import LossAwareNoise


class LossAware:
    """Draws time bins in proportion to the root of their mean squared loss, and weights the loss back to be unbiased.

    The scheduler's training time is cut into equal bins, each with its last `history` losses. Until every bin has that
    many, draws are uniform.
    """

    records = True

    def __init__(self, section: LossAwareNoise, path: GaussianPath, device: torch.device) -> None:
        self.section, self.path = section, path
        self.history: list[list[float]] = [[] for _ in range(section.bins)]
        self.staged: list[Tensor] = []  # [2, n] of bin and loss, on the device until the next refresh
        self.refreshed = 0
        self.probabilities = torch.full((section.bins,), 1 / section.bins, dtype=torch.float64, device=device)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n levels, uniform inside their bin, each with the weight 1 / (bins * probability)."""
        bins = torch.multinomial(self.probabilities, n, replacement=True, generator=generator)
        inside = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        log_sigma = self.path.at_fraction((bins + inside) / self.section.bins)
        return log_sigma, 1 / (self.section.bins * self.probabilities[bins])

    def record(self, log_sigma: Tensor, x0_error: Tensor, loss: Tensor) -> None:
        """Stage the batch's losses; nothing is read back yet."""
        bins = (self.path.fraction(log_sigma) * self.section.bins).long().clamp(0, self.section.bins - 1)
        self.staged.append(torch.stack([bins.double(), loss.double()]))

    def refresh(self, images: int) -> None:
        """Take the staged losses into the histories and rebuild the probabilities, when due (waits for the device)."""
        every = self.section.refresh_every
        if images // every == self.refreshed // every:
            return
        self.refreshed = images
        for index, loss in torch.cat(self.staged, dim=1).T.tolist() if self.staged else ():
            history = self.history[int(index)]
            history.append(loss)
            del history[: -self.section.history]
        self.staged.clear()
        if all(len(history) == self.section.history for history in self.history):
            root = torch.tensor(self.history, dtype=torch.float64).square().mean(1).sqrt()
            floor = self.section.uniform_floor
            probabilities = (1 - floor) * root / root.sum() + floor / len(root)
            self.probabilities = probabilities.to(self.probabilities.device)

    def state_dict(self) -> dict[str, Any]:
        """Histories, staged losses, probabilities and the moment of the last refresh."""
        staged = torch.cat(self.staged, dim=1) if self.staged else None
        state = {"history": self.history, "staged": staged, "refreshed": self.refreshed}
        return state | {"probabilities": self.probabilities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        device = self.probabilities.device
        self.history, self.refreshed = state["history"], state["refreshed"]
        self.staged = [] if state["staged"] is None else [state["staged"].to(device)]
        self.probabilities = state["probabilities"].to(device)
