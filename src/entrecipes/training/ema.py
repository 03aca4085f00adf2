"""The averaged model: a copy of the network whose weights follow an exponential moving average counted in images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from entrecipes.recipe.training import Ema


class EmaModel:
    """Averages every floating-point weight that may be trained, frozen at the moment or not.

    Weights that never can be (the base under an adapter) are shared with the trained model, not copied. diffusers' own
    class copies a weight the moment it is frozen, which throws its average away; here a frozen weight's average goes on
    converging to it. The average is a model of its own: it is evaluated and saved as it is, and the trained weights are
    never swapped out.

    The weight's share in the average halves every `half_life` images (Karras et al. 2022), or every
    `warmup_ratio * images seen` while that is less.
    """

    def __init__(self, section: Ema, model: nn.Module, eligible: Callable[[str], bool] = lambda name: True) -> None:
        """Args: `model` is averaged from its present weights on; `eligible` says by name which may be trained."""
        self.section = section
        shared = {id(weight): weight for name, weight in model.named_parameters() if not eligible(name)}
        self.model = copy.deepcopy(model, shared).requires_grad_(False).eval()
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average this model from now on (again, after a change of its modules). Walking a module tree takes
        milliseconds, so that it is done once here and not in every step."""
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        mine, theirs = zip(*((own, their.detach()) for own, their in pairs if own is not their), strict=True)
        self._mine, self._theirs = (mine, list(self.model.buffers())), (theirs, list(model.buffers()))

    def decay(self, images: int, batch_size: int) -> float:
        """Share of the average that stays at the step that ends at `images`."""
        half_life = min(self.section.half_life, images * self.section.warmup_ratio)
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, images: int, batch_size: int) -> None:
        """Move the average after the step that ends at `images`; buffers are copied."""
        (weights, buffers), (their_weights, their_buffers) = self._mine, self._theirs
        torch._foreach_lerp_(weights, their_weights, 1.0 - self.decay(images, batch_size))
        if buffers:
            torch._foreach_copy_(buffers, their_buffers)

    def collect(self) -> nn.Module:
        """The averaged model, up to date. All processes have to call it."""
        return self.model

    def share_out(self) -> None:
        """Go on from what was loaded into `model`."""

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and buffers by name."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.model.load_state_dict(state)
