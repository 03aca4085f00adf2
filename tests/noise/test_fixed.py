"""The fixed noise distributions: exact inverse CDFs within the path's range, equal to diffusers' own draws."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.noise.fixed import FixedSampler
from entrecipes.recipe.base import build, choice

PATHS = {
    "vp": GaussianPath.from_scheduler(diffusers.DDPMScheduler()),
    "edm": GaussianPath.from_scheduler(diffusers.EDMEulerScheduler()),
    "flow": GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler()),
    "shifted": GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
NAMES = ["uniform", "cosine", "log_uniform", "log_normal", "logit_normal", "mode"]
EVERY = [(name, path) for name in NAMES for path in PATHS]


def sampler(name: str, path: str, **keys: float | bool) -> FixedSampler:
    """A sampler as the trainer makes it."""
    return build("noise", choice("noise", name).section(**keys), path=PATHS[path], device=torch.device("cpu"))


def draw(noise: FixedSampler, n: int, seed: int = 0) -> Tensor:
    """n levels."""
    log_sigma, weight = noise.sample(n, torch.Generator().manual_seed(seed))
    assert log_sigma.dtype == weight.dtype == torch.float64 and log_sigma.shape == weight.shape == (n,)
    assert (weight == 1).all()
    return log_sigma


def distance(share: Tensor) -> float:
    """Kolmogorov-Smirnov distance of values in [0, 1] from the uniform distribution, times sqrt(n)."""
    n = len(share)
    steps, share = torch.arange(n + 1, dtype=torch.float64) / n, share.double().sort().values
    return max((share - steps[:-1]).max().item(), (steps[1:] - share).max().item()) * math.sqrt(n)


@pytest.mark.parametrize(("name", "path"), EVERY)
def test_quantile_inverts_cdf_from_end_to_end(name, path):
    noise = sampler(name, path)
    u = torch.linspace(0, 1, 257, dtype=torch.float64)
    log_sigma = noise.quantile(u)
    limits = torch.tensor([noise.path.log_sigma_min, noise.path.log_sigma_max], dtype=torch.float64)
    # 8 standard deviations out, a share of 1e-15, the CDF has few digits left
    torch.testing.assert_close(log_sigma[[0, -1]], limits, rtol=0, atol=5e-3)
    assert (log_sigma.diff() > 0).all()
    torch.testing.assert_close(noise.cdf(log_sigma), u, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "path"), EVERY)
def test_density_is_the_slope_of_the_cdf(name, path):
    noise = sampler(name, path)
    low, high = noise.path.log_sigma_min, noise.path.log_sigma_max
    edges = torch.linspace(low, high, 20_001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    slope = noise.cdf(edges).diff() / edges.diff()
    # between two table entries of a VP scheduler the density jumps: compare the shares of wider bins
    share = (noise.density(middle) * edges.diff()).view(-1, 100).sum(1)
    torch.testing.assert_close(share, (slope * edges.diff()).view(-1, 100).sum(1), rtol=2e-2, atol=1e-4)
    assert share.sum().item() == pytest.approx(1, abs=1e-3)
    ends = noise.density(torch.tensor([low - 0.1, low, high, high + 0.1], dtype=torch.float64))
    assert ends.isfinite().all() and ends[0] == ends[-1] == 0


@pytest.mark.parametrize(("name", "path"), EVERY)
def test_plain_draws_follow_the_cdf_and_have_no_atoms(name, path):
    noise = sampler(name, path, stratified=False)
    log_sigma = draw(noise, 20_000)
    assert log_sigma.min() >= noise.path.log_sigma_min and log_sigma.max() <= noise.path.log_sigma_max
    assert distance(noise.cdf(log_sigma)) < 1.63  # the 1 % point
    assert len(log_sigma.unique()) == len(log_sigma)


@pytest.mark.parametrize("name", NAMES)
def test_stratified_draws_fill_every_stratum_once_in_random_order(name):
    noise, n = sampler(name, "edm"), 64
    share = noise.cdf(draw(noise, n)) * n
    assert sorted(share.floor().int().tolist()) == list(range(n))
    first_half = share[: n // 2].floor()
    assert 0.3 * n < first_half.mean() < 0.7 * n and not (share.diff() > 0).all()
    assert not torch.equal(draw(noise, n, seed=0), draw(noise, n, seed=1))
    assert torch.equal(draw(noise, n, seed=2), draw(noise, n, seed=2))


@pytest.mark.parametrize(
    ("name", "keys", "diffusers_keys"),
    [
        ("logit_normal", {"mean": 0.3, "std": 0.8}, {"logit_mean": 0.3, "logit_std": 0.8}),
        ("mode", {"scale": 1.29}, {"mode_scale": 1.29}),
        ("mode", {"scale": -0.5}, {"mode_scale": -0.5}),
        ("uniform", {}, {}),
    ],
)
def test_flow_times_are_distributed_as_diffusers_draws_them(name, keys, diffusers_keys):
    time = compute_density_for_timestep_sampling(
        name, 20_000, **diffusers_keys, generator=torch.Generator().manual_seed(1)
    ).double()
    time = time[(time > 1e-3) & (time < 1 - 1e-3)]
    assert distance(sampler(name, "flow", **keys).cdf(torch.logit(time))) < 1.63


def test_uniform_is_uniform_over_vp_timesteps_and_shifted_flow_times():
    noise = sampler("uniform", "vp", stratified=False)
    assert distance(noise.path.timestep(draw(noise, 20_000)) / 999) < 1.63
    noise = sampler("uniform", "shifted", stratified=False)
    shifted = torch.sigmoid(draw(noise, 20_000))
    unshifted = shifted / (3 - 2 * shifted)
    assert distance(unshifted) < 1.63 + 1e-3 * math.sqrt(20_000)  # the range is cut at a time of 1e-3


def test_log_normal_is_normal_over_log_sigma():
    log_sigma = draw(sampler("log_normal", "edm", mean=-0.4, std=1.0), 10_000)
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=2e-3)
    assert log_sigma.std().item() == pytest.approx(1.0, abs=2e-3)


def test_logit_normal_times_are_a_normal_log_sigma_on_the_flow_path():
    grid = torch.linspace(-6, 6, 101, dtype=torch.float64)
    normal = sampler("log_normal", "flow", mean=0.5, std=0.7).cdf(grid)
    torch.testing.assert_close(sampler("logit_normal", "flow", mean=0.5, std=0.7).cdf(grid), normal)


def test_cosine_has_the_density_of_the_cosine_schedule():
    noise = sampler("cosine", "edm")
    log_sigma = torch.linspace(-4, 4, 33, dtype=torch.float64)
    log_snr = -2 * log_sigma
    expected = 2 / (2 * math.pi * torch.cosh(log_snr / 2))  # per unit log sigma: twice that per unit log SNR
    torch.testing.assert_close(noise.density(log_sigma), expected, rtol=1e-2, atol=0)  # the cut takes less than 1 %


def test_fixed_samplers_learn_and_keep_nothing():
    noise = sampler("log_normal", "edm")
    before = draw(noise, 8)
    noise.record(before, before, before)
    noise.refresh(1000)
    assert noise.state_dict() == {} and not noise.records
    noise.load_state_dict({})
    assert torch.equal(draw(noise, 8), before)


def test_a_distribution_outside_the_range_is_refused():
    with pytest.raises(UserError, match=r"noise: \{type: log_normal, mean: 40.0, .*log sigma -6.21 to 4.38"):
        sampler("log_normal", "edm", mean=40)
