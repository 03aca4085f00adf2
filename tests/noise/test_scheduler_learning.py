"""InfoNoiseScheduler in a training loop of one's own: what it learns, whatever the network predicts, and its state."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scheduler_case import STOCK, ours, profile, stock
from torch import Tensor

from entrecipes import InfoNoiseScheduler
from entrecipes.errors import UserError
from entrecipes.information.nats import gate
from entrecipes.noise.base import RunFacts
from entrecipes.noise.infonoise import InfoNoise, gate_pivot
from entrecipes.recipe.noise import InfoNoiseSection

STD, DIMENSIONS = 0.5, 32
QUICK = {"bins": 24, "warmup": 512, "ramp": 0, "refresh_every": 512, "buffer": 100_000}


def step(scheduler: InfoNoiseScheduler, n: int, seed: int) -> tuple[Tensor, dict[str, Any] | None]:
    """One step of a loop with the exact denoiser of N(0, STD^2) data: what was drawn, and the telemetry."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = STD * torch.randn(n, DIMENSIONS, generator=generator), torch.randn(n, DIMENSIONS, generator=generator)
    timesteps = scheduler.sample_timesteps(n, generator)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    path, level = scheduler.path, scheduler.log_sigma(timesteps)
    (a, b), (p, q) = path.coefficients(level), path.target_coefficients(level)
    best = (a * STD**2 / (a**2 * STD**2 + b**2))[:, None] * noisy
    prediction = p[:, None] * best + (q / b)[:, None] * (noisy - a[:, None] * best)
    torch.testing.assert_close(
        scheduler.target(x0, noise, timesteps), (p[:, None] * x0 + q[:, None] * noise).float(), rtol=1e-4, atol=1e-4
    )
    return timesteps, scheduler.record(prediction, x0, noise, timesteps)


@pytest.mark.parametrize("name", STOCK)
def test_the_same_profile_is_learned_whatever_the_network_predicts(name: str) -> None:
    scheduler = ours(name, train_images=20_000, learning={**QUICK, "smoothing": 0})
    rows = [step(scheduler, 512, seed)[1] for seed in range(40)]
    assert all(rows) and rows[-1]["ramped"] == 1 and rows[-1]["cdf_change"] < 0.02
    learned = scheduler.profile
    exact = STD**2 / (1 + STD**2 * torch.exp(-2 * learned.log_sigma))
    torch.testing.assert_close(learned.x0_error, exact, rtol=0.15, atol=0)
    assert scheduler.settings["pivot"] == rows[-1]["pivot"]


@pytest.mark.parametrize("own", [False, True])
def test_draws_times_weight_follow_the_rate_under_full_compensation(own: bool) -> None:
    """With a published weighting, and with a weight of one's own."""
    keys = {**QUICK, "weight_compensation": "full", "pivot": 0.2, "floor": 0.0}
    scheduler = ours("edm", train_images=20_000, learning=keys, objective={"weighting": "edm", "sigma_data": STD})
    if own:
        scheduler.loss_weight = lambda log_sigma: torch.exp(-2 * log_sigma) + 4
    for seed in range(20):
        step(scheduler, 512, seed)
    learner, learned = scheduler._learner, scheduler.profile
    weight = torch.exp(-2 * learned.log_sigma) + STD**-2
    wanted = learned.rate * gate(learned.log_sigma, 0.2)
    effective = learner.learned.density * weight
    torch.testing.assert_close(effective / effective.sum(), wanted / wanted.sum())


def test_draws_are_functions_of_the_generator() -> None:
    one, other = (ours("vp", train_images=10_000) for _ in range(2))
    draws = [s.sample_timesteps(8, torch.Generator().manual_seed(1)) for s in (one, other)]
    assert torch.equal(*draws) and draws[0].dtype == torch.float32 and draws[0].unique().numel() == 8
    torch.manual_seed(5)
    first = one.sample_timesteps(8)
    torch.manual_seed(5)
    assert torch.equal(one.sample_timesteps(8, device="cpu"), first)
    assert not torch.equal(one.sample_timesteps(8), first)


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_loop_goes_on_bit_for_bit(name: str, stop: int, tmp_path: Path) -> None:
    keys = {"train_images": 20_000, "learning": {**QUICK, "new_weight": 0.5}}
    whole, first = ours(name, **keys), ours(name, **keys)
    expected = [step(whole, 256, seed)[0] for seed in range(12)]
    actual = [step(first, 256, seed)[0] for seed in range(stop)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = ours(name, **keys)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    actual += [step(again, 256, seed)[0] for seed in range(stop, 12)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert again.settings == whole.settings and again.settings["profile"] is not None


def test_the_config_changes_only_with_the_table() -> None:
    scheduler, seen = ours("edm", train_images=20_000, learning=QUICK), []
    for seed in range(8):  # a table every 512 images
        before = scheduler.settings
        row = step(scheduler, 256, seed)[1]
        seen.append(row is not None)
        assert (scheduler.settings is not before) == seen[-1]
    assert seen == [False, True] * 4 and scheduler.settings["pivot"] == row["pivot"]


def test_the_learner_moves_with_the_images_but_not_back() -> None:
    """`meta` stands for an accelerator: it has a device of its own, but no numbers."""
    scheduler = ours("edm", train_images=1000)
    x = torch.randn(4, 3, 4, 4)
    scheduler.record(x, x, x, scheduler.sample_timesteps(4))
    first = scheduler._learner
    assert scheduler._learner_on(torch.device("cpu")) is first
    moved = scheduler._learner_on(torch.device("meta"))
    assert moved is not first and moved.device.type == "meta" and moved.images == first.images == 4
    assert scheduler._learner_on(torch.device("cpu")) is scheduler._learner_on(torch.device("meta")) is moved


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_loop_with_images_on_a_gpu_builds_the_learner_there_once(
    device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, built = InfoNoise.__init__, []

    def counted(self: InfoNoise, *arguments: Any) -> None:
        build(self, *arguments)
        built.append(self.device)

    monkeypatch.setattr(InfoNoise, "__init__", counted)
    scheduler, x = ours("edm", train_images=1000), torch.randn(4, 3, 4, 4, device="cuda")
    for _ in range(5):
        timesteps = scheduler.sample_timesteps(4, device=device)
        scheduler.record(x, x, x, timesteps)
    assert [where.type for where in built] == ["cpu", "cuda"] and scheduler._learner.images == 20
    assert timesteps.device.type == (device or "cuda")


def test_what_was_learned_is_saved_and_makes_a_grid(tmp_path: Path) -> None:
    scheduler = ours("edm", train_images=2_000, learning=QUICK)
    scheduler.set_timesteps(5)
    before = scheduler.sigmas
    for seed in range(3):
        step(scheduler, 512, seed)
    scheduler.set_timesteps(5)
    assert not torch.equal(scheduler.sigmas, before)
    scheduler.save_pretrained(tmp_path)
    loaded = InfoNoiseScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(5)
    assert torch.equal(loaded.sigmas, scheduler.sigmas)


def test_the_gate_of_a_profile_alone_follows_the_rule() -> None:
    """A profile without a pivot has the one that the recipe would take, on data of this scale."""
    facts, section = RunFacts(data_std=1.0), InfoNoiseSection()
    rule = gate_pivot(section, ours("edm", profile=profile(1.0)).profile, facts)[0]
    pinned = ours("edm", profile=profile(1.0), pivot=rule)
    assert ours("edm", profile=profile(1.0), data_std=1.0).as_sigmas(9) == pinned.as_sigmas(9)
    discrete = ours("edm", profile=profile(1.0), learning={"data": "discrete"})
    assert discrete.as_sigmas(9) == ours("edm", profile=profile(1.0), pivot=0.2).as_sigmas(9) != pinned.as_sigmas(9)
    ungated = ours("edm", profile=profile(1.0), learning={"gate_order": 0})
    assert ungated.as_sigmas(9) == ours("edm", profile=profile(1.0), grid="entropic").as_sigmas(9)


def test_misuse_is_said() -> None:
    scheduler, x = ours("vp", train_images=1000), torch.randn(4, 3, 8, 8)
    timesteps = scheduler.sample_timesteps(4)
    loss = x.square().mean()
    wrong = [(loss, x, x, timesteps), (x, x, x, timesteps[:2]), (x.repeat(1, 2, 1, 1), x, x, timesteps)]
    wrong += [(x[:, 0, 0, 0],) * 3 + (timesteps,), (x, x, x, timesteps[0])]
    for arguments in wrong:
        with pytest.raises(UserError, match="the network's raw output"):
            scheduler.record(*arguments)
    with pytest.raises(UserError, match="train_images="):
        ours("vp").sample_timesteps(4)
    ours("vp", learning={"warmup": 100, "refresh_every": 10}).sample_timesteps(4)  # says all that shares would say
    other = ours("vp", train_images=1000, learning={"bins": 16})
    with pytest.raises(UserError, match="16.*same keys"):
        other.load_state_dict(scheduler.state_dict())


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    scheduler = ours("flow", train_images=20_000, learning=QUICK)
    images = []
    for seed in range(6):
        # the last batch of an epoch is smaller on one process: the refreshes must not wait for each other
        step(scheduler, 256 if rank == 0 or seed % 3 else 96, seed=100 * seed + rank)
        images.append(scheduler._learner.refreshed)
    torch.save({"settings": dict(scheduler.settings), "refreshed": images}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_one_table_from_both(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_one_of_two, (port, str(tmp_path)), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other and one["refreshed"] == [512 * (i + 1) for i in range(6)]
    alone = ours("flow", train_images=20_000, learning=QUICK)
    for seed in range(6):
        step(alone, 256, seed=100 * seed)
    assert alone.settings["profile"] != one["settings"]["profile"]
    learned = InfoNoiseScheduler.from_config(stock("flow").config, profile=one["settings"]["profile"]).profile
    exact = STD**2 / (1 + STD**2 * torch.exp(-2 * learned.log_sigma))
    assert (learned.x0_error / exact).log().abs().max() < math.log(1.6)
