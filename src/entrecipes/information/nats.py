"""Information from denoising errors: dH[x0 | x] / dlog sigma = mmse / sigma^2, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate(log_sigma: Tensor, pivot: float | None, order: int = 3) -> Tensor:
    """sigma^n / (sigma^n + pivot^n): fades out the low noise levels, where continuous data holds unbounded information.

    Args:
        log_sigma: Noise levels [...].
        pivot: The sigma at which the gate is one half, in units of the data; None: no gate, 1 everywhere.
        order: Steepness n.
    """
    return torch.ones_like(log_sigma) if pivot is None else torch.sigmoid(order * (log_sigma - math.log(pivot)))


def integrate_nats(log_sigma: Tensor, x0_error: Tensor, gate: Tensor) -> Tensor:
    """Gated information in nats: the integral over log sigma of gate * x0_error / sigma^2 (trapezoid rule).

    Exactly the entropy of discrete data when the error is the minimal one and the gate is 1 (Guo, Shamai & Verdu 2005,
    I-MMSE, with snr = sigma^-2); an upper bound of it for any other denoiser.

    Args:
        log_sigma: Increasing grid [L].
        x0_error: Squared x0 error at each level [..., L], summed over dimensions.
        gate: Gate at each level [L]; ones for none.

    Returns:
        Nats about the whole of x0 [...]; take them in float64, since sigma^-2 spans many orders of magnitude.
    """
    return torch.trapezoid(gate * x0_error * torch.exp(-2 * log_sigma), log_sigma)
