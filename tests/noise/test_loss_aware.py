"""Loss-aware resampling against a plain rendering of improved-diffusion's rule."""

from __future__ import annotations

import json
from collections import deque

import diffusers
import pytest
import torch
from torch import Tensor

from entrecipes.diffusion.path import GaussianPath
from entrecipes.noise.loss_aware import LossAware
from entrecipes.recipe.base import build
from entrecipes.recipe.noise import LossAwareNoise

VP = GaussianPath.from_scheduler(diffusers.DDPMScheduler())
SHIFTED = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=30.0))


def make(path: GaussianPath = VP, **keys: float) -> LossAware:
    """A sampler as the trainer makes it."""
    section = LossAwareNoise(**{"bins": 8, "history": 3, "refresh_every": 32, **keys})
    return build("noise", section, path=path, device=torch.device("cpu"))


def loss_of(log_sigma: Tensor) -> Tensor:
    """A loss that grows with noise."""
    return torch.exp(log_sigma / 3)


def train(noise: LossAware, steps: int, first: int = 0, n: int = 16) -> list[Tensor]:
    """Steps of n images with per-step generators, as the trainer does; the levels drawn."""
    drawn = []
    for step in range(first, first + steps):
        log_sigma, _ = noise.sample(n, torch.Generator().manual_seed(step))
        loss = loss_of(log_sigma).float()
        noise.record(log_sigma, loss, loss)
        noise.refresh((step + 1) * n)
        drawn.append(log_sigma)
    return drawn


def test_draws_are_uniform_and_unweighted_until_every_bin_is_full():
    noise = make(bins=4, history=50)
    log_sigma, weight = noise.sample(20_000, torch.Generator().manual_seed(0))
    assert (weight == 1).all() and log_sigma.dtype == torch.float64
    counts = torch.histc(noise.path.timestep(log_sigma), bins=10, min=0, max=999)
    torch.testing.assert_close(counts / 2000, torch.ones(10, dtype=torch.float64), rtol=0, atol=0.1)
    train(noise, 4)
    assert (noise.probabilities == 0.25).all()


def test_probabilities_follow_improved_diffusions_rule_through_ring_and_refreshes():
    noise = make(uniform_floor=0.1)
    plain = [deque(maxlen=3) for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        timestep = torch.rand(40, generator=generator, dtype=torch.float64) * 999
        loss = torch.rand(40, generator=generator)
        noise.record(VP.log_sigma(timestep), loss, loss)
        noise.refresh((step + 1) * 40)
        for t, value in zip(timestep.tolist(), loss.tolist(), strict=True):
            plain[int(t / 999 * 8)].append(value)
        if all(len(history) == 3 for history in plain):
            root = torch.tensor([list(history) for history in plain], dtype=torch.float64).square().mean(1).sqrt()
            torch.testing.assert_close(noise.probabilities, 0.9 * root / root.sum() + 0.1 / 8)
    assert noise.probabilities.std() > 0


def test_weights_make_every_average_that_of_uniform_draws():
    noise = make(uniform_floor=0.001)
    train(noise, 40)
    assert noise.probabilities.max() > 3 * noise.probabilities.min()
    log_sigma, weight = noise.sample(200_000, torch.Generator().manual_seed(1))
    time = noise.path.fraction(log_sigma)
    assert weight.mean().item() == pytest.approx(1, abs=0.02)
    for power in (1, 2, 3):
        assert (weight * time**power).mean().item() == pytest.approx(1 / (power + 1), abs=0.01)
    share = torch.histc(time, bins=8, min=0, max=1) / len(time)
    torch.testing.assert_close(share, noise.probabilities, rtol=0, atol=5e-3)


def test_levels_are_uniform_inside_a_bin():
    noise = make(bins=2)
    train(noise, 10)
    log_sigma, _ = noise.sample(40_000, torch.Generator().manual_seed(3))
    time = noise.path.fraction(log_sigma)
    inside = torch.histc(time[time < 0.5], bins=5, min=0, max=0.5)
    torch.testing.assert_close(inside / inside.mean(), torch.ones(5, dtype=torch.float64), rtol=0, atol=0.06)


def test_tables_are_rebuilt_only_when_an_interval_has_passed():
    noise = make(bins=2, history=1, refresh_every=100)
    log_sigma = VP.log_sigma(torch.tensor([100.0, 900.0]))
    loss = torch.tensor([1.0, 3.0])
    noise.record(log_sigma, loss, loss)
    noise.refresh(99)
    assert (noise.probabilities == 0.5).all()
    noise.refresh(100)
    torch.testing.assert_close(noise.probabilities, torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=0, atol=1e-3)
    noise.refresh(200)
    assert noise.probabilities[1] > 0.7


def test_a_cut_and_shifted_range_fills_every_bin():
    noise = make(SHIFTED, bins=50, history=2)
    train(noise, 60)
    assert (noise.counts >= 2).all() and noise.probabilities.std() > 0
    log_sigma, _ = noise.sample(5000, torch.Generator().manual_seed(0))
    assert len(log_sigma.unique()) == 5000  # nothing piles up at the ends


def test_broken_losses_are_left_out():
    noise = make(bins=2, history=1)
    log_sigma = VP.log_sigma(torch.tensor([100.0, 900.0, 100.0, 900.0]))
    loss = torch.tensor([1.0, 1.0, float("nan"), float("inf")])
    noise.record(log_sigma, loss, loss)
    noise.refresh(32)
    assert noise.history.flatten().tolist() == [1, 1] and noise.probabilities.tolist() == [0.5, 0.5]
    zero = torch.zeros(4)
    noise.record(log_sigma, zero, zero)
    noise.refresh(64)
    assert noise.probabilities.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("steps", [0, 5, 16, 23])
def test_resuming_goes_on_bit_for_bit(steps):
    whole, broken_off = make(), make()
    expected = train(whole, 40)[steps:]
    train(broken_off, steps)
    state = broken_off.state_dict()
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    assert json.loads(json.dumps(plain)) == plain
    broken_off.record(torch.zeros(1), torch.ones(1), torch.ones(1))  # what comes after a save does not reach it
    resumed = make()
    resumed.load_state_dict(state)
    for one, other in zip(train(resumed, 40 - steps, first=steps), expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(resumed.probabilities, whole.probabilities) and torch.equal(resumed.history, whole.history)
