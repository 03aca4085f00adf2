"""Nats from denoising errors against entropies known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from entrecipes.information.nats import gate, integrate_nats


def two_point_mmse(log_sigma: torch.Tensor) -> torch.Tensor:
    """E (x0 - tanh(x / sigma^2))^2 of x0 = +-1 and x = x0 + sigma z, by the trapezoid rule over z."""
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    sigma = log_sigma.exp()[:, None]
    error = (1 - torch.tanh((1 + sigma * z) / sigma**2)).square()  # by symmetry x0 = 1 stands for both
    return torch.trapezoid(error * density, z)


def test_two_points_hold_ln_2_nats():
    log_sigma = torch.linspace(math.log(0.02), math.log(1000), 4001, dtype=torch.float64)
    nats = integrate_nats(log_sigma, two_point_mmse(log_sigma), torch.ones_like(log_sigma))
    assert nats.item() == pytest.approx(math.log(2), abs=1e-4)


def test_gaussian_data_loses_the_channels_information():
    variance, dimensions = 0.25, 12
    log_sigma = torch.linspace(-6, 5, 4001, dtype=torch.float64)
    error = dimensions * variance * torch.exp(2 * log_sigma) / (variance + torch.exp(2 * log_sigma))
    clean, noisy = (0.5 * math.log1p(variance * math.exp(-2 * end)) for end in (-6, 5))
    expected = dimensions * (clean - noisy)
    both = integrate_nats(log_sigma, torch.stack([error, 2 * error]), torch.ones_like(log_sigma))
    torch.testing.assert_close(both, torch.tensor([expected, 2 * expected], dtype=torch.float64), rtol=1e-5, atol=0)


def test_gated_gaussian_data_in_closed_form():
    variance, pivot = 0.25, 0.1
    log_sigma = torch.linspace(-9, 7, 8001, dtype=torch.float64)
    error = variance * torch.exp(2 * log_sigma) / (variance + torch.exp(2 * log_sigma))
    # with y = sigma^2 and order 2: half the integral of variance / ((variance + y) (pivot^2 + y)) over y
    expected = 0.5 * variance / (variance - pivot**2) * math.log(variance / pivot**2)
    assert integrate_nats(log_sigma, error, gate(log_sigma, pivot, order=2)).item() == pytest.approx(expected, rel=1e-4)


def test_the_gate_is_one_half_at_its_pivot():
    log_sigma = torch.tensor([0.02, 0.2, 2.0], dtype=torch.float64).log()
    sigma = log_sigma.exp()
    torch.testing.assert_close(gate(log_sigma, 0.2), sigma**3 / (sigma**3 + 0.2**3))
    assert gate(log_sigma, 0.2)[1].item() == pytest.approx(0.5)
    assert gate(log_sigma.float(), 0.2).dtype == torch.float32
