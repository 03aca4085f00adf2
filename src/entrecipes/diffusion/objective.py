"""The loss: one residual gives the weighted training loss and the unweighted x0 error."""

from __future__ import annotations

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.recipe.pipeline import Objective as Section


class Objective:
    """Mean squared error, weighted over noise levels.

    Weights are written in x0 space, loss = weight * x0 error, where each published weighting is one formula for every
    path and prediction type (snr = sigma^-2):

    | weighting | weight | published as |
    |---|---|---|
    | none | 1 / x0_error_scale | 1 on the network's own prediction |
    | edm | (sigma^2 + sd^2) / (sigma sd)^2 | Karras et al. 2022, table 1 |
    | min_snr | min(snr, gamma) | min(snr, gamma) / snr on epsilon, / (snr + 1) on v (Hang et al. 2023) |
    | p2 | snr (k + snr)^-gamma | (k + snr)^-gamma on epsilon (Choi et al. 2022) |
    | sigma_sqrt, cosmap | w(t) / t^2 | w(t) on the flow velocity, t = sigma / (1 + sigma) (Esser et al. 2024) |

    What a weighting means for another prediction is weight * x0_error_scale: min_snr, for instance, is
    min((1 - t)^2, gamma t^2) on the flow velocity and min(snr, gamma) c_out^2 on EDM's network.
    """

    def __init__(self, section: Section, path: GaussianPath) -> None:
        self.section, self.path = section, path

    def weight(self, log_sigma: Tensor) -> Tensor:
        """Weight of the x0 error at each noise level [n], float64."""
        section, log_sigma = self.section, log_sigma.double()
        snr = torch.exp(-2 * log_sigma)
        if section.weighting == "none":
            return 1 / self.path.x0_error_scale(log_sigma)
        if section.weighting == "edm":
            return snr + section.sigma_data**-2
        if section.weighting == "min_snr":
            return snr.clamp(max=section.min_snr_gamma)
        if section.weighting == "p2":
            return snr * (section.p2_k + snr) ** -section.p2_gamma
        time = torch.sigmoid(log_sigma)
        return compute_loss_weighting_for_sd3(section.weighting, time) / time.square()

    def __call__(
        self, prediction: Tensor, target: Tensor, log_sigma: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare a prediction with its target.

        Args:
            prediction: Network output [n, ...], of any floating dtype.
            target: What it should be, same shape.
            log_sigma: Noise levels [n].
            counted: Of clips [n, C, F, ...]: which frames count, bool [n, F]; None: all.

        Returns:
            The weighted loss and the x0 error (detached), both mean over the dimensions that count [n], float32.
        """
        square = (prediction.float() - target.float()).square()
        if counted is None:
            error = square.flatten(1).mean(1)
        else:
            by_frame = square.mean(dim=(1, *range(3, square.ndim)))
            error = (by_frame * counted).sum(1) / counted.sum(1)
        scale = self.path.x0_error_scale(log_sigma.double())
        return error * (self.weight(log_sigma) * scale).float(), error.detach() * scale.float()
