"""Call any supported diffusers model as a denoiser: x0, noise and log sigma in, prediction and x0 error out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.family import Condition, Family
from entrecipes.diffusion.path import GaussianPath


@dataclass
class Denoiser:
    """A model on its noise path. `model` may be the diffusers model or a distributed wrapper of it."""

    model: Any
    family: Family
    path: GaussianPath

    def __call__(self, x0: Tensor, noise: Tensor, log_sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Predict from the noisy images.

        Args:
            x0: Clean images or latents [n, C, H, W].
            noise: Standard normal noise of the same shape.
            log_sigma: Noise levels [n].
            condition: Class labels int64 [n], condition maps float [n, C, F, H, W], what is `Asked` of clips, or None.

        Returns:
            The network's prediction and its target, both [n, C, H, W] in the network's own prediction space.
        """
        noisy = self.path.add_noise(x0, noise, log_sigma)
        timestep = self.path.timestep(log_sigma).float()
        prediction = self.family.predict(self.model, self.path.network_input(noisy, log_sigma), timestep, condition)
        return prediction, self.path.target(x0, noise, log_sigma)

    @torch.inference_mode()
    def x0_error(self, x0: Tensor, noise: Tensor, log_sigma: Tensor, condition: Condition) -> Tensor:
        """Squared error of the predicted x0, mean over dimensions [n] (put the model in eval mode first)."""
        prediction, target = self(x0, noise, log_sigma, condition)
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return error * self.path.x0_error_scale(log_sigma).to(error.dtype)
