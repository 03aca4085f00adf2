"""InfoNoise learns one density whatever the network predicts, and keeps to its schedule, its bounds and its state."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.noise.base import RunFacts
from entrecipes.noise.infonoise import InfoNoise
from entrecipes.recipe.base import build
from entrecipes.recipe.noise import InfoNoiseSection
from entrecipes.recipe.pipeline import Objective as ObjectiveSection

PATHS = {
    "epsilon": diffusers.DDPMScheduler(),
    "v": diffusers.DDPMScheduler(prediction_type="v_prediction"),
    "x0": diffusers.DDPMScheduler(prediction_type="sample"),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}
VP = GaussianPath.from_scheduler(PATHS["epsilon"])
EDM = GaussianPath.from_scheduler(PATHS["edm"])
POINTS = torch.randn(30, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SHORT = {"warmup": 64, "ramp": 64, "refresh_every": 32, "buffer": 512}


def make(path: GaussianPath = EDM, facts: RunFacts | None = None, **keys) -> InfoNoise:
    """A sampler as the trainer makes it."""
    return build("noise", InfoNoiseSection(**keys), path=path, device=torch.device("cpu"), facts=facts or RunFacts())


def error_at(log_sigma: Tensor) -> Tensor:
    """What a good denoiser of unit Gaussian data leaves."""
    return 1 / (1 + torch.exp(-2 * log_sigma))


def train(noise: InfoNoise, steps: int, first: int = 0, n: int = 16, error=error_at) -> list[Tensor]:
    """Steps of n images with per-step generators, as the trainer does; the levels drawn."""
    drawn = []
    for step in range(first, first + steps):
        log_sigma, weight = noise.sample(n, torch.Generator().manual_seed(step))
        assert torch.equal(weight, torch.ones(n, dtype=torch.float64))
        noise.record(log_sigma, error(log_sigma), torch.full((n,), math.nan))  # whatever the loss is, it isn't used
        noise.refresh((step + 1) * n)
        drawn.append(log_sigma)
    return drawn


def test_the_density_does_not_depend_on_what_the_network_predicts():
    """The exact denoiser of thirty points, as an epsilon, v, x0, EDM and flow network, through the objective."""
    learned = {}
    for name, scheduler in PATHS.items():
        path = GaussianPath.from_scheduler(scheduler)
        objective = Objective(ObjectiveSection(weighting="min_snr" if name == "v" else "none"), path)
        keys = {"data": "discrete", "warmup": 20_000, "ramp": 0, "refresh_every": 60_000, "buffer": 60_000}
        noise = make(path, RunFacts(weight=objective.weight), **keys, smoothing=0.5)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            log_sigma, _ = noise.sample(6000, generator)
            x0 = POINTS[torch.randint(len(POINTS), (6000,), generator=generator)]
            eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
            x, (a, b) = path.add_noise(x0, eps, log_sigma), path.coefficients(log_sigma)
            distance = torch.cdist(x / a[:, None], POINTS).square()
            guess = torch.softmax(-distance / (2 * log_sigma.exp()[:, None] ** 2), dim=1) @ POINTS
            prediction = path.target(guess, (x - a[:, None] * guess) / b[:, None], log_sigma)
            loss, x0_error = objective(prediction, path.target(x0, eps, log_sigma), log_sigma)
            noise.record(log_sigma, x0_error, loss)
            noise.refresh((step + 1) * 6000)
        learned[name] = noise
    levels = torch.linspace(-3, 3, 200, dtype=torch.float64)
    cdfs = {name: noise.learned.mix(noise.base_table, -0.02 / 0.98).cdf(levels) for name, noise in learned.items()}
    for name, cdf in cdfs.items():
        assert (cdf - cdfs["edm"]).abs().max() < 0.02, name
        nats = 8 * learned[name].profile.nats()
        assert nats == pytest.approx(math.log(len(POINTS)), rel=0.05), name


def test_warm_up_ramp_and_refresh_are_functions_of_the_images_seen():
    noise, moments = make(base={"type": "log_normal"}, **SHORT), {}
    for images in range(8, 265, 8):
        noise.record(torch.linspace(-5, 4, 8), error_at(torch.linspace(-5, 4, 8)))
        row = noise.refresh(images)
        if row is not None:
            moments[images] = row["ramped"]
    assert moments == {64: 0.0, 96: 0.5, 128: 1.0, 160: 1.0, 192: 1.0, 224: 1.0, 256: 1.0}
    defaults = make(facts=RunFacts(images=400_000))
    assert (defaults.warmup, defaults.ramp, defaults.refresh_every) == (20_000, 20_000, 4000)
    assert defaults.buffer.pairs.shape[1] == 40_000


def test_the_warm_up_draws_the_base_exactly_and_the_ramp_mixes():
    noise = make(base={"type": "log_normal"}, **SHORT, floor=0.1)
    fixed = noise.base.sample(16, torch.Generator().manual_seed(0))[0]
    assert torch.equal(train(noise, 4)[0], fixed)
    assert noise.learned is not None and noise.ramped == 0
    train(noise, 2, first=4)
    assert noise.ramped == 0.5
    half = noise.sample(20_000, torch.Generator().manual_seed(1))[0]
    levels = torch.linspace(-6, 4, 50, dtype=torch.float64)
    expected = (noise.base_table.cdf(levels) + noise.learned.cdf(levels)) / 2
    share = (half[:, None] <= levels).double().mean(0)
    assert (share - expected).abs().max() < 2e-3, "stratified draws follow the mixture closely"
    train(noise, 20, first=6)
    profile = noise.profile.density(noise.pivot)
    torch.testing.assert_close(noise.learned.density, 0.9 * profile.density + 0.1 * noise.base_table.density)


def test_power_weight_compensation_and_the_gate_shape_the_density():
    weight = lambda log_sigma: torch.exp(-2 * log_sigma) + 4  # noqa: E731 (EDM's)
    shared = {**SHORT, "warmup": 4096, "floor": 0.0, "data": "discrete", "smoothing": 0.0, "bins": 64, "buffer": 4096}
    made = {}
    for name, keys in {
        "rate": {},
        "full": {"weight_compensation": "full"},
        "root": {"power": 0.5},
        "open": {"gate_order": 0, "data": "auto"},
    }.items():
        noise = made[name] = make(facts=RunFacts(weight=weight), **{**shared, **keys})
        train(noise, 256)
    rate, x = made["rate"].learned, made["rate"].centres
    gated = torch.exp(-2 * x) * error_at(x) * torch.sigmoid(3 * (x - math.log(0.2)))
    torch.testing.assert_close(rate.density, gated / gated.sum() / (x[1] - x[0]), rtol=0.04, atol=1e-6)

    def assert_shape(name: str, wanted: Tensor) -> None:
        torch.testing.assert_close(
            made[name].learned.density, wanted / wanted.sum() / (x[1] - x[0]), rtol=0.05, atol=1e-6
        )

    assert_shape("full", rate.density / weight(x))
    assert_shape("root", rate.density.sqrt())
    assert_shape("open", torch.exp(-2 * x) * error_at(x))
    assert made["open"].pivot is None and made["open"].telemetry()["below_pivot"] is None


def test_the_pivot_comes_from_the_data_or_the_recipe():
    def pivot(facts: RunFacts, **keys) -> float:
        noise = make(facts=facts, **{**SHORT, "warmup": 512, **keys})
        train(noise, 64)
        return noise.pivot

    gray, binary = RunFacts(data_std=1.0), RunFacts(data_std=1.0, distinct_values=2)
    assert pivot(binary) == pytest.approx(0.2), "values at -1 and 1"
    assert pivot(RunFacts(distinct_values=4, spacing=0.5)) == pytest.approx(0.05)
    assert pivot(RunFacts(data_std=1.0, spacing=1e-7), data="discrete") == pytest.approx(0.4), "not what rounding left"
    assert pivot(binary, data="continuous") == pivot(gray) == pytest.approx(0.3), "the onset rule asks for more"
    assert pivot(gray, onset=0.02) == pytest.approx(0.19, rel=0.05), "r = 1 / (sigma + sigma^3), 250 at 0.004"
    assert pivot(gray, pivot=0.07) == 0.07
    falling = lambda log_sigma: torch.exp(5 * log_sigma)  # noqa: E731
    noise = make(facts=gray, **SHORT)
    train(noise, 8, error=falling)
    assert noise.pivot == pytest.approx(0.3), "where the onset rule says nothing, 0.15 in units of the data"


def test_scaled_data_moves_everything_along():
    moved = {}
    for scale in (1.0, 4.0):
        shift = math.log(scale)
        path = GaussianPath.from_scheduler(
            diffusers.EDMEulerScheduler(sigma_min=0.002 * scale, sigma_max=80 * scale, sigma_data=0.5 * scale)
        )
        noise = make(path, RunFacts(data_std=0.5 * scale), **{**SHORT, "warmup": 512})
        train(noise, 64, error=lambda level, s=shift, k=scale: k**2 * error_at(level - s))
        moved[scale] = noise
    torch.testing.assert_close(moved[4.0].learned.density, moved[1.0].learned.density, rtol=1e-3, atol=1e-6)
    assert moved[4.0].pivot == pytest.approx(4 * moved[1.0].pivot, rel=1e-3)


@pytest.mark.parametrize("new_weight", [None, 0.5])
@pytest.mark.parametrize("steps", [2, 5, 6, 9], ids=["warm-up", "ramp", "ramp, off refresh", "learned"])
def test_resuming_at_any_moment_goes_on_exactly(steps, new_weight):
    keys = {**SHORT, "buffer": 100, "new_weight": new_weight}
    whole = make(VP, **keys)
    first, rest = train(whole, steps), None
    state = json.loads(json.dumps(whole.state_dict(), default=lambda tensor: {"tensor": tensor.tolist()}))
    other = make(VP, **keys)
    other.load_state_dict(whole.state_dict())
    rest = train(whole, 12, first=steps)
    for ours, theirs in zip(train(other, 12, first=steps), rest, strict=True):
        assert torch.equal(ours, theirs)
    assert state["images"] == 16 * steps and len(first) == steps
    assert torch.equal(other.learned.cumulative, whole.learned.cumulative)


def test_saved_tables_of_another_size_are_refused():
    state = make(**SHORT).state_dict()
    with pytest.raises(ValueError, match="128 bins was saved, noise.bins is 64"):
        make(**SHORT, bins=64).load_state_dict(state)


def test_errors_that_are_no_numbers_change_nothing():
    noise = make(**SHORT)
    train(noise, 8)
    before = noise.learned
    for step in range(40):  # more than the buffer holds
        noise.record(torch.zeros(16), torch.full((16,), (math.nan, math.inf)[step % 2]))
        noise.refresh((9 + step) * 16)
    torch.testing.assert_close(noise.learned.cumulative, before.cumulative, rtol=0, atol=0.03)
    train(noise, 8, first=50)
    fresh = make(**SHORT)
    for step in range(8):
        fresh.record(torch.zeros(16), torch.full((16,), math.nan))
        assert fresh.refresh((step + 1) * 16) is None
    assert fresh.sample(4, torch.Generator().manual_seed(0))[0].isfinite().all(), "nothing known: the base goes on"


def test_errors_of_zero_and_a_single_level_still_give_a_density():
    for error in (torch.zeros_like, lambda level: torch.full_like(level, 1e30)):
        noise = make(**SHORT)
        train(noise, 12, error=error)
        levels = noise.sample(64, torch.Generator().manual_seed(0))[0]
        assert levels.isfinite().all() and noise.learned.density.isfinite().all()
    noise = make(**SHORT)
    for step in range(8):
        noise.record(torch.full((16,), 0.3), torch.full((16,), 0.5))
        noise.refresh((step + 1) * 16)
    assert noise.learned.density.isfinite().all()


def test_a_run_that_is_made_longer_keeps_its_lengths_and_goes_on():
    short, long = (make(facts=RunFacts(images=images)) for images in (20_000, 200_000))
    train(short, 150)
    long.load_state_dict(short.state_dict())
    assert long.ramped == short.ramped == 1.0 and long.warmup == short.warmup == 1000
    assert torch.equal(train(long, 5, first=150)[-1], train(short, 5, first=150)[-1])


def test_a_held_state_does_not_change_with_the_run():
    noise = make(**SHORT)
    train(noise, 8)
    state = noise.state_dict()
    held = state["buffer"]["pairs"].clone()
    train(noise, 8, first=8)
    torch.testing.assert_close(state["buffer"]["pairs"], held, rtol=0, atol=0, equal_nan=True)


def test_a_table_that_can_not_be_made_leaves_the_old_one_also_after_a_resume():
    noise = make(**SHORT, power=12.0)
    train(noise, 8)
    before = noise.learned.cumulative.clone()
    train(noise, 40, first=8, error=lambda level: torch.full_like(level, 1e30))
    assert torch.equal(noise.learned.cumulative, before)
    resumed = make(**SHORT, power=12.0)
    resumed.load_state_dict(noise.state_dict())
    assert torch.equal(train(resumed, 5, first=48)[-1], train(noise, 5, first=48)[-1])
    first = make(**SHORT, power=12.0)
    train(first, 8, error=lambda level: torch.full_like(level, 1e30))
    assert first.learned is None, "nothing is learned yet, and nothing fails"


def test_a_weight_of_zero_is_named():
    noise = make(facts=RunFacts(weight=lambda level: (level > 0).double()), **SHORT, weight_compensation="full")
    with pytest.raises(UserError, match="weight .* must be positive and finite"):
        train(noise, 8)


def test_constant_data_is_refused():
    for facts in (RunFacts(data_std=0.0), RunFacts(data_std=1e-8, distinct_values=1)):
        with pytest.raises(UserError, match="one value"):
            make(facts=facts)


def test_telemetry_is_plain_and_tells_convergence():
    noise = make(facts=RunFacts(weight=lambda level: torch.exp(-2 * level)), **SHORT)
    rows = []
    for step in range(40):
        log_sigma, _ = noise.sample(64, torch.Generator().manual_seed(step))
        noise.record(log_sigma, error_at(log_sigma))
        rows += [row] if (row := noise.refresh((step + 1) * 64)) else []
    row = json.loads(json.dumps(rows[-1]))
    assert rows[0]["cdf_change"] is None and 0 < row["cdf_change"] < 0.02
    assert row["quantiles"] == sorted(row["quantiles"]) and row["effective_quantiles"][2] < row["quantiles"][2]
    assert 0 < row["below_pivot"] < 0.5 and len(row["density"]) == len(row["log_sigma"]) == len(row["x0_error"]) == 128
    assert sum(row["density"]) * (row["log_sigma"][1] - row["log_sigma"][0]) == pytest.approx(1, abs=1e-2)


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, and shapes that depend on values."""

    WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_drawing_and_recording_wait_for_nothing():
    noise = make(**SHORT)
    with pytest.raises(AssertionError, match="waits"), NoWait():
        torch.ones(1).item()
    for steps in (2, 5, 9):  # warm-up, ramp, learned
        train(noise, steps)
        with NoWait():
            log_sigma, _ = noise.sample(16, torch.Generator().manual_seed(0))
            noise.record(log_sigma, error_at(log_sigma))


@pytest.mark.gpu
def test_on_a_gpu_the_draws_are_the_same_and_no_step_waits():
    noise = build("noise", InfoNoiseSection(**SHORT), path=EDM, device=torch.device("cuda"), facts=RunFacts())
    for step in range(12):
        generator = torch.Generator("cuda").manual_seed(step)
        torch.cuda.set_sync_debug_mode("error")
        log_sigma, _ = noise.sample(16, generator)
        noise.record(log_sigma, error_at(log_sigma))
        torch.cuda.set_sync_debug_mode("default")
        noise.refresh((step + 1) * 16)
    assert log_sigma.device.type == "cuda" and log_sigma.isfinite().all() and noise.learned is not None


def test_keys_without_effect_are_refused_and_resolved_sections_are_not():
    for keys, message in (
        ({"gate_order": 0, "pivot": 0.2}, "pivot: has no effect with gate_order: 0"),
        ({"gate_order": 0, "onset": 0.01}, "onset: has no effect with gate_order: 0"),
        ({"pivot": 0.2, "onset": 0.01}, "onset: has no effect with a pivot"),
        ({"pivot": 0.2, "data": "discrete"}, "data: has no effect with a pivot"),
        ({"data": "discrete", "onset": 0.01}, "onset: has no effect with data: discrete"),
    ):
        with pytest.raises(ValidationError, match=message):
            InfoNoiseSection(**keys)
    for keys in ({"gate_order": 0}, {"pivot": 0.2}, {}):
        resolved = InfoNoiseSection(**keys).model_dump()
        assert InfoNoiseSection(**resolved).model_dump() == resolved
