from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch

from entrecipes.errors import UserError
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.heldout import HeldOutBundle
from entrecipes.recipe.evaluation import HeldOut

DIMENSIONS = 12


@dataclass
class Range:
    """The part of a noise path that a bundle asks for."""

    log_sigma_min: float = math.log(0.01)
    log_sigma_max: float = math.log(30.0)


def error_of(posterior_mean):
    """The x0 error function of a denoiser given as posterior_mean(noisy, sigma)."""

    def x0_error(x0, noise, log_sigma, labels):
        sigma = log_sigma.exp().view(-1, 1, 1, 1)
        return (posterior_mean(x0 + sigma * noise, sigma) - x0).square().flatten(1).mean(1)

    return x0_error


two_points = error_of(lambda noisy, sigma: torch.tanh(noisy / sigma**2))  # of +1 and -1, equally likely
gaussian = error_of(lambda noisy, sigma: noisy / (1 + sigma**2))


def signs(n):
    return torch.randn(n, 1, 3, 4, generator=torch.Generator().manual_seed(1)).sign()


def bundle(x0, labels=None, path=None, **section):
    return HeldOutBundle(HeldOut(**section), x0, labels, path or Range())


def test_nats_of_fair_signs_are_their_entropy():
    result = bundle(signs(400), noise_levels=64, gate_pivot=None).measure(two_points)
    assert result.nats == pytest.approx(DIMENSIONS * math.log(2), rel=0.02)
    assert abs(result.nats - DIMENSIONS * math.log(2)) < 4 * result.nats_standard_error + 0.01
    assert torch.equal(result.gate, torch.ones(64).double()) and (result.rate[0], result.images) == (0, 400)


def test_gated_nats_of_gaussian_data_are_the_closed_form():
    """The integral over sigma > 0 of sigma^2 / ((1 + sigma^2) (1 + sigma^3)), by partial fractions, a dimension."""
    expected = DIMENSIONS * (2 * math.pi / (3 * math.sqrt(3)) - math.pi / 4)
    x0 = torch.randn(600, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    result = bundle(x0, noise_levels=64, gate_pivot=1.0).measure(gaussian)
    assert abs(result.nats - expected) < 4 * result.nats_standard_error + 0.02
    assert result.nats == pytest.approx(expected, rel=0.03)


def test_without_a_gate_gaussian_nats_grow_with_the_range():
    x0 = torch.randn(300, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    nats = [bundle(x0, path=Range(log_sigma_min=low), gate_pivot=None).measure(gaussian).nats for low in (-4.0, -8.0)]
    assert nats[1] - nats[0] == pytest.approx(4 * DIMENSIONS, rel=0.03)


def test_a_better_denoiser_has_fewer_nats_on_the_same_pairs():
    pairs = bundle(signs(50))
    blunt = error_of(lambda noisy, sigma: torch.tanh(0.7 * noisy / sigma**2))
    assert pairs.measure(two_points).nats < pairs.measure(blunt).nats


def test_measuring_is_deterministic_and_independent_of_the_batch_size():
    pairs = bundle(signs(37))
    first = pairs.measure(two_points, batch_size=37)
    assert pairs.measure(two_points, batch_size=37).to_row() == first.to_row()
    assert bundle(signs(37)).measure(two_points, batch_size=37).to_row() == first.to_row()
    for batch_size in (1, 10, 1000):
        other = pairs.measure(two_points, batch_size=batch_size)
        assert other.nats == pytest.approx(first.nats, rel=1e-5)
        assert torch.allclose(other.x0_error, first.x0_error, rtol=1e-4, atol=1e-9)
    assert bundle(signs(37), seed=1).measure(two_points).nats != first.nats


def test_each_image_meets_its_own_noise_and_label():
    seen = []

    def x0_error(x0, noise, log_sigma, labels):
        assert torch.equal(labels.float(), x0[:, 0, 0, 0])
        seen.append((log_sigma.clone(), noise.clone()))
        return torch.zeros(len(x0))

    x0 = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 3, 4)
    pairs = bundle(x0, torch.arange(5), noise_levels=4)
    pairs.measure(x0_error, batch_size=2)
    levels, noise = (torch.cat(part) for part in zip(*seen, strict=True))
    assert torch.allclose(levels.view(4, 5), pairs.log_sigma.float()[:, None].expand(4, 5))
    assert levels.min() == pytest.approx(math.log(0.01)) and levels.max() == pytest.approx(math.log(30))
    assert len(noise.flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_images_and_all_get_the_whole(world_size):
    pairs = bundle(signs(10))
    alone = pairs.measure(two_points)
    shares: list[torch.Tensor] = []

    def keep(tensor):
        shares.append(tensor)
        return tensor

    for rank in range(world_size):
        pairs.measure(two_points, shard=Shard(rank, world_size, keep))
    assert len({share.shape for share in shares}) == 1 and len(shares[0]) == math.ceil(10 / world_size)
    together = pairs.measure(two_points, shard=Shard(0, world_size, lambda _: torch.cat(shares)))
    assert together.nats == pytest.approx(alone.nats, rel=1e-6) and together.images == 10
    assert together.nats_standard_error == pytest.approx(alone.nats_standard_error, rel=1e-6)


def test_the_row_and_the_metric_hold_plain_numbers():
    result = bundle(signs(20), noise_levels=8, seed=3).measure(two_points)
    row = json.loads(json.dumps(result.to_row(), allow_nan=False))
    assert set(row) == {"nats", "nats_standard_error", "log_sigma", "x0_error", "rate", "gate"}
    assert [len(row[key]) for key in ("log_sigma", "x0_error", "rate", "gate")] == [8] * 4
    area = torch.trapezoid(torch.tensor(row["gate"]) * torch.tensor(row["rate"]), torch.tensor(row["log_sigma"]))
    assert row["nats"] == pytest.approx(area.item(), rel=1e-4)
    metric = result.to_metric({"split": "held_out"})
    assert (metric.name, metric.value, metric.spread) == ("heldout_nats", result.nats, result.nats_standard_error)
    assert metric.origin | {"gate_pivot": 0.2, "samples": 20, "noise_levels": 8, "seed": 3} == metric.origin


def test_nats_that_are_not_finite_are_no_metric():
    result = bundle(signs(4)).measure(lambda x0, noise, log_sigma, labels: torch.full((len(x0),), math.nan))
    with pytest.raises(UserError, match="heldout_nats.*nan"):
        result.to_metric()
