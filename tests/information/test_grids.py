"""Sampling grids: exact for Gaussian data, strictly decreasing for any profile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from entrecipes.information.grids import GRIDS, sampling_grid
from entrecipes.information.nats import gate
from entrecipes.information.profile import Profile

LOW, HIGH = math.log(0.002), math.log(80)


def gaussian(std: float, levels: int = 4096, low: float = LOW, high: float = HIGH) -> Profile:
    """The exact profile of N(0, std^2) data."""
    log_sigma = torch.linspace(low, high, levels, dtype=torch.float64)
    variance = torch.exp(2 * log_sigma)
    return Profile(log_sigma, std**2 * variance / (std**2 + variance))


@pytest.mark.parametrize("std", [0.5, 3.0])
@pytest.mark.parametrize("n", [2, 5, 40])
def test_the_rescaled_grid_of_gaussian_data_is_the_tangent_of_an_even_angle(std: float, n: int) -> None:
    sigma = sampling_grid("rescaled", gaussian(std), n, LOW, HIGH).exp()
    angle = torch.linspace(math.atan(80 / std), math.atan(0.002 / std), n, dtype=torch.float64)
    torch.testing.assert_close(sigma, std * torch.tan(angle), rtol=1e-4, atol=0)


def test_the_entropic_grid_of_gaussian_data_is_even_in_its_entropy() -> None:
    """H[x0 | x_sigma] of N(0, 1) is -log(1 + sigma^-2) / 2 up to a constant."""
    levels = sampling_grid("entropic", gaussian(1.0), 9, LOW, HIGH)
    entropy = -0.5 * torch.log1p(torch.exp(-2 * levels))
    steps = entropy.diff()
    torch.testing.assert_close(steps, steps.mean().expand(8), rtol=1e-3, atol=0)


def test_infogrid_is_even_in_gated_nats() -> None:
    profile, n = gaussian(1.0), 6
    levels = sampling_grid("infogrid", profile, n, LOW, HIGH, pivot=0.2, gate_order=3)
    gated = profile.rate * gate(profile.log_sigma, 0.2, 3)
    pairs = itertools.pairwise(levels)
    nats = [gated[(profile.log_sigma <= top) & (profile.log_sigma > low)].sum() for top, low in pairs]
    assert max(nats) / min(nats) < 1.02
    ungated = sampling_grid("infogrid", profile, n, LOW, HIGH)
    torch.testing.assert_close(ungated, sampling_grid("entropic", profile, n, LOW, HIGH))


def odd_profiles() -> dict[str, Profile]:
    """Profiles that leave large parts of the range without density, or do not cover it."""
    log_sigma = torch.linspace(LOW, HIGH, 128, dtype=torch.float64)
    peak = torch.full_like(log_sigma, 1e-30)
    peak[64] = 1.0
    return {
        "one bin": Profile(log_sigma, peak),
        "one bin at the top": Profile(log_sigma, peak.roll(63)),
        "narrow": gaussian(0.5, 16, -1.0, 0.0),
        "wide": gaussian(0.5, 64, LOW - 5, HIGH + 5),
        "elsewhere": gaussian(0.5, 16, HIGH + 1, HIGH + 2),
        "vanishing": Profile(log_sigma, torch.exp(-torch.exp(-4 * log_sigma)).clamp(min=1e-300)),
    }


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", odd_profiles())
@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_any_profile_gives_strictly_decreasing_levels_between_the_ends(kind: str, name: str, n: int) -> None:
    levels = sampling_grid(kind, odd_profiles()[name], n, LOW, HIGH, pivot=0.2)
    assert levels.shape == (n,) and levels.dtype == torch.float64
    assert levels[0] == HIGH and (n == 1 or levels[-1] == LOW)
    assert bool((levels.float().diff() < 0).all())


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="no grid 'karras'"):
        sampling_grid("karras", gaussian(1.0), 5, LOW, HIGH)
