"""The profile against posteriors that can be computed, entropies in closed form, and a published curve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entrecipes.information.profile import (
    ErrorBuffer,
    Histogram,
    Profile,
    bin_means,
    fill_and_smooth,
    onset_pivot,
)

DIMENSIONS = 6
POINTS = torch.randn(40, DIMENSIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def posterior(x: Tensor, sigma: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n, D] and total variance [n] of x0 given x = x0 + sigma noise, x0 uniform over the points."""
    weight = torch.softmax(-torch.cdist(x, points).square() / (2 * sigma[:, None] ** 2), dim=1)
    mean = weight @ points
    return mean, (weight * torch.cdist(mean, points).square()).sum(1)


def observed(log_sigma: Tensor, points: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Squared errors [n] of the best denoiser at random points and noise, and its posterior variances [n]; sums."""
    generator = torch.Generator().manual_seed(seed)
    x0 = points[torch.randint(len(points), (len(log_sigma),), generator=generator)]
    sigma = log_sigma.exp()
    x = x0 + sigma[:, None] * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    mean, variance = posterior(x, sigma, points)
    return (mean - x0).square().sum(1), variance


def learned(points: Tensor, low: float, high: float, bins: int, samples: int, smoothing: float = 0.0) -> Profile:
    """A profile from recorded errors alone, mean over dimensions."""
    log_sigma = torch.empty(samples, dtype=torch.float64).uniform_(
        low, high, generator=torch.Generator().manual_seed(1)
    )
    buffer = ErrorBuffer(samples)
    for chunk in log_sigma.split(8192):
        buffer.add(chunk, observed(chunk, points, seed=len(chunk) + buffer.seen)[0] / points.shape[1])
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return fill_and_smooth((edges[1:] + edges[:-1]) / 2, bin_means(edges, *buffer.read()), smoothing)


def test_the_entropy_of_finite_data_is_found_within_one_percent():
    low, high = math.log(0.1), math.log(100)
    nats = DIMENSIONS * learned(POINTS, low, high, 128, 500_000).nats()
    assert nats == pytest.approx(math.log(len(POINTS)), rel=0.01)
    two = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert learned(two, low, high, 128, 400_000).nats() == pytest.approx(math.log(2), rel=0.01)


def test_recorded_errors_match_the_empirical_priors_posterior_in_every_bin():
    low, high, bins = math.log(0.4), math.log(6), 12
    profile = learned(POINTS, low, high, bins, 400_000)
    for level, error in zip(profile.log_sigma, DIMENSIONS * profile.x0_error, strict=True):
        inside = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64) * (high - low) / bins + level
        exact = observed(inside.repeat(500), POINTS, seed=7)[1].mean()  # posterior variance: far less spread
        assert error.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_scaled_data_moves_the_profile_the_pivot_and_the_density(scale):
    shift = math.log(scale)
    profile = cifar10()
    moved = Profile(profile.log_sigma + shift, profile.x0_error * scale**2)
    torch.testing.assert_close(moved.rate, profile.rate)
    pivot = onset_pivot(profile, 0.002)
    assert onset_pivot(moved, 0.002, scale) == pytest.approx(scale * pivot)
    density, other = profile.density(pivot), moved.density(scale * pivot)
    torch.testing.assert_close(other.density, density.density)
    torch.testing.assert_close(other.edges, density.edges + shift)


def cifar10() -> Profile:
    """CIFAR-10's normalised dH / dlog sigma on [0.002, 80], read off the InfoNoise authors' figure (3 %, 20 % at 1).

    Below the first reading the curve goes on as a power law, above the last one as sigma^-1.05, which gives the draws
    the quantiles that the figure shows there.
    """
    sigma = 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0
    rate = [
        0.366,
        0.314,
        0.281,
        0.25,
        0.218,
        0.196,
        0.166,
        0.128,
        0.105,
        0.084,
        0.062,
        0.05,
        0.037,
        0.024,
        0.017,
        0.013,
    ]
    x, y = torch.tensor([sigma, rate], dtype=torch.float64).log()
    first = (y[1] - y[0]) / (x[1] - x[0])
    x = torch.cat([x[:1] - 1, x, x[-1:] + 5])
    y = torch.cat([y[:1] - first, y, y[-1:] - 1.05 * 5])
    log_sigma = torch.linspace(math.log(0.002), math.log(80), 512, dtype=torch.float64)
    return Profile(x, (y + 2 * x).exp()).at(log_sigma)


def test_cifar10_gets_the_published_pivot_and_edms_hand_tuned_density():
    profile = cifar10()
    assert onset_pivot(profile, 0.002) == pytest.approx(0.151, abs=0.01)
    density = profile.density(0.15)
    share = density.cumulative.diff()
    mean = (share * density.centres).sum().item()
    std = (share * (density.centres - mean) ** 2).sum().sqrt().item()
    assert (mean, std) == (pytest.approx(-1.14, abs=0.05), pytest.approx(1.16, abs=0.05))  # EDM: -1.2, 1.2
    assert profile.density(None).quantiles()[2] < 0.015, "without a gate low noise takes all"


def test_the_onset_rule_says_nothing_where_it_would_mislead():
    log_sigma = torch.linspace(math.log(0.002), math.log(80), 256, dtype=torch.float64)
    assert onset_pivot(Profile(log_sigma, torch.exp(5 * log_sigma)), 0.002) is None  # a rate that only rises
    assert onset_pivot(Profile(log_sigma, torch.exp(2 * log_sigma)), 0.002) == pytest.approx(1.0, rel=1e-6)  # flat
    assert onset_pivot(Profile(log_sigma, torch.exp(-9 * log_sigma)), 0.002) is None  # all at the cleanest level
    assert onset_pivot(Profile(log_sigma + 7, torch.exp(2 * log_sigma)), 0.002) is None  # nothing left of the range


@pytest.mark.parametrize("first", [0.0005, 0.002, 0.02, 0.05])
def test_the_pivot_does_not_hang_on_where_the_path_begins(first):
    """In the limit of continuous data, where the rate is flat at low noise; many a path begins above EDM's 0.002."""
    log_sigma = torch.linspace(math.log(first), math.log(80), 128, dtype=torch.float64)
    gaussian = Profile(log_sigma, 0.25 / (1 + 0.25 * torch.exp(-2 * log_sigma)))  # of deviation 0.5
    assert onset_pivot(gaussian, 0.002) == pytest.approx(0.5, rel=0.01)


def test_empty_bins_are_filled_and_ends_go_on_as_theory_has_it():
    log_sigma = torch.linspace(-3, 3, 61, dtype=torch.float64)
    means = torch.exp(1.5 * log_sigma)
    means[[0, 1, 2, 10, 30, 31, 32, 59, 60]] = math.nan
    profile = fill_and_smooth(log_sigma, means, 0.0)
    torch.testing.assert_close(profile.x0_error[3:59], torch.exp(1.5 * log_sigma[3:59]))
    torch.testing.assert_close(profile.rate[:3], profile.rate[3].expand(3))
    torch.testing.assert_close(profile.x0_error[59:], profile.x0_error[58].expand(2))
    only = fill_and_smooth(log_sigma, torch.full_like(means, math.nan).index_fill(0, torch.tensor([30]), 0.5), 1.5)
    assert only.x0_error.isfinite().all() and only.x0_error[40:50] == pytest.approx([0.5] * 10)
    assert fill_and_smooth(log_sigma, torch.full_like(means, math.nan), 1.5) is None
    assert fill_and_smooth(log_sigma, torch.zeros_like(means), 1.5).rate.isfinite().all(), "an error of zero has a log"


def test_smoothing_keeps_straight_lines_and_takes_out_noise():
    log_sigma = torch.linspace(-3, 3, 61, dtype=torch.float64)
    torch.testing.assert_close(fill_and_smooth(log_sigma, torch.exp(2 * log_sigma), 2.0).rate, torch.ones(61).double())
    noise = torch.randn(61, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smoothed = fill_and_smooth(log_sigma, torch.exp(0.1 * noise), 2.0).x0_error.log()
    assert smoothed.std() < 0.05


def test_bins_leave_out_what_is_no_number_and_sum_over_processes():
    edges = torch.linspace(-1, 1, 5, dtype=torch.float64)
    log_sigma = torch.tensor([-1.0, -0.9, -0.1, 0.1, 0.1, 0.6, 5.0, math.nan])
    error = torch.tensor([1.0, 3.0, math.inf, math.nan, 2.0, 4.0, 9.0, 9.0])
    means = bin_means(edges, log_sigma, error)
    assert means.tolist()[0] == 2 and means[1].isnan() and means.tolist()[2:] == [2, 4]
    halves = [bin_means(edges, log_sigma[rows], error[rows], reduce=lambda t: t) for rows in (slice(4), slice(4, 8))]
    parts = []
    for rows in (slice(4), slice(4, 8)):
        bin_means(edges, log_sigma[rows], error[rows], reduce=lambda t: parts.append(t) or t)
    together = bin_means(edges, log_sigma[:4], error[:4], reduce=lambda t: t + parts[1])
    torch.testing.assert_close(together, means, equal_nan=True)
    assert not torch.equal(halves[0].nan_to_num(), means.nan_to_num())


def test_histograms_invert_mix_and_refuse_nonsense():
    centres = torch.linspace(-2, 2, 40, dtype=torch.float64)
    density = torch.exp(-(centres**2)) * (centres.abs() > 0.3)  # with a gap in its middle
    histogram = Histogram.around(centres, density)
    assert (histogram.density * histogram.edges.diff()).sum() == pytest.approx(1)
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = histogram.quantile(u)
    torch.testing.assert_close(histogram.cdf(level), u)
    assert not ((level > -0.25) & (level < 0.25)).any(), "nothing is drawn where the density is zero"
    flat = Histogram.around(centres, torch.ones_like(centres))
    mixed = flat.mix(histogram, 0.25)
    torch.testing.assert_close(mixed.density, 0.75 * flat.density + 0.25 * histogram.density)
    assert flat.quantile(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(flat.edges[[0, -1]].tolist())
    for bad in (torch.zeros(40), torch.full((40,), math.nan), -torch.ones(40), torch.full((40,), math.inf)):
        with pytest.raises(ValueError, match="finite"):
            Histogram.around(centres, bad.double())


def test_the_buffer_keeps_the_last_pairs_and_restores_exactly():
    buffer, seen = ErrorBuffer(10), []
    for start in range(0, 44, 4):
        batch = torch.arange(start, start + 4.0)
        buffer.add(batch, -batch)
        seen += batch.tolist()
        log_sigma, error = buffer.read()
        assert sorted(log_sigma.tolist()) == seen[-10:] and torch.equal(error, -log_sigma)
    buffer.add(torch.arange(100.0, 125.0), torch.zeros(25))
    assert sorted(buffer.read()[0].tolist()) == list(range(115, 125))
    other = ErrorBuffer(10)
    other.load_state_dict(buffer.state_dict())
    for one in (buffer, other):
        one.add(torch.tensor([1.0]), torch.tensor([1.0]))
    assert torch.equal(other.pairs, buffer.pairs)
    with pytest.raises(ValueError, match="10 errors was saved, noise.buffer is 11"):
        ErrorBuffer(11).load_state_dict(buffer.state_dict())
