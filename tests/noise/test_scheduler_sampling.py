"""Sampling with InfoNoiseScheduler: the same as stock solvers where these exist, and of the order that it says."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scheduler_case import STOCK, ours, profile, sample, stock
from torch import Tensor

from entrecipes import InfoNoiseScheduler
from entrecipes.errors import UserError

CLIPPED = {"use_clipped_model_output": True}
SAME = [
    ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": True}, CLIPPED, 1),
    ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}, {}, 1),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **CLIPPED}, CLIPPED, 1),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}, CLIPPED, 1),
    ("EDMEulerScheduler", {}, {}, 1),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}, {}, 1),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}, {}, 2),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, {}, 2),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "thresholding": True}, {}, 2),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {}, 2),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}, 1),
]


def noise(*shape: int) -> Tensor:
    """The same noise for all."""
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize(("class_name", "config", "step_keys", "order"), SAME)
def test_on_the_base_grid_it_is_the_stock_solver(
    class_name: str, config: dict[str, Any], step_keys: dict[str, Any], order: int, steps: int
) -> None:
    config = {key: value for key, value in config.items() if key not in CLIPPED}
    theirs = getattr(diffusers, class_name)(**config)
    mine = InfoNoiseScheduler.from_config(theirs.config, grid="base", profile=profile())
    assert mine.settings["solver_order"] == order
    expected = sample(theirs, steps, noise(), **step_keys)
    # stock solvers tell the network timesteps cut to whole numbers
    torch.testing.assert_close(sample(mine, steps, noise(), at=theirs), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_fresh_noise_is_ddims(eta: float) -> None:
    theirs = stock("vp")
    expected = sample(theirs, 10, noise(), eta=eta, generator=torch.Generator().manual_seed(1))
    actual = sample(ours("vp", grid="base"), 10, noise(), eta=eta, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_all_fresh_noise_is_the_sde_solver(order: int) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type="v_prediction", algorithm_type="sde-dpmsolver++", solver_order=order
    )
    mine = InfoNoiseScheduler.from_config(theirs.config)
    expected = sample(theirs, 10, noise(), generator=torch.Generator().manual_seed(1))
    actual = sample(mine, 10, noise(), at=theirs, eta=1.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_order_of_the_solver(name: str, order: int) -> None:
    """Gaussian data N(0, c^2) with its exact denoiser, whose probability flow scales x by a known factor."""
    std, errors = 0.5, []
    scheduler = ours(name, profile=profile(std, bins=512), solver_order=order, grid="rescaled")
    path = scheduler.path
    for steps in (40, 80):
        scheduler.set_timesteps(steps)
        x = start = noise().double()
        for timestep in scheduler.timesteps:
            level = path.log_sigma(timestep.double().reshape(1))
            a, b = path.coefficients(level)
            x0 = a * std**2 / (a**2 * std**2 + b**2) * x
            p, q = path.target_coefficients(level)
            x = scheduler.step(p * x0 + q * (x - a * x0) / b, timestep, x).prev_sample
        a, b = path.coefficients(torch.tensor([path.log_sigma_max], dtype=torch.float64))
        exact = start * std / (a**2 * std**2 + b**2).sqrt()
        errors.append((x - exact).abs().max().item())
    assert errors[0] / errors[1] > 0.85 * 2**order, errors


@pytest.mark.parametrize("name", STOCK)
def test_a_part_of_the_way_goes_on_from_noised_images(name: str) -> None:
    """Image to image: the last timesteps, entered by timestep or by begin index."""
    image, fresh, results = noise(2, 3, 4, 4), noise(4, 3, 4, 4)[2:], []
    for by_index in (False, True):
        scheduler = ours(name, profile=profile())
        scheduler.set_timesteps(10)
        remaining = scheduler.timesteps[6:]
        if by_index:
            scheduler.set_begin_index(6)
        x = scheduler.add_noise(image, fresh, remaining[:1])
        a, b = scheduler.path.coefficients(scheduler._levels[6:7])
        torch.testing.assert_close(x, (a * image + b * fresh).float(), rtol=1e-5, atol=1e-5)
        for timestep in remaining:
            seen = scheduler.scale_model_input(x, timestep)
            x = scheduler.step(0.1 * seen, timestep, x).prev_sample
        assert scheduler.step_index == 10
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_samples_keep_their_dtype_and_are_stepped_in_float32_at_least(name: str, dtype: torch.dtype) -> None:
    scheduler = ours(name, profile=profile(), solver_order=2)
    full = sample(scheduler, 6, noise().to(dtype).float())
    half = sample(scheduler, 6, noise().to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", STOCK)
def test_levels_of_ones_own(name: str) -> None:
    scheduler = ours(name, profile=profile(), grid="rescaled")
    scheduler.set_timesteps(7)
    timesteps, sigmas = scheduler.timesteps, scheduler.sigmas
    assert sigmas[-1] == 0 and len(sigmas) == 8 and scheduler.as_sigmas(7) == pytest.approx(sigmas[:-1].tolist())
    for given in ({"sigmas": sigmas.tolist()}, {"sigmas": sigmas[:-1].numpy()}, {"timesteps": timesteps}):
        scheduler.set_timesteps(**given)
        assert scheduler.num_inference_steps == 7
        torch.testing.assert_close(scheduler.timesteps, timesteps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=1e-3, atol=1e-5)
    for wrong in ({"sigmas": sigmas.flip(0)[1:]}, {"sigmas": [0.5, -0.1]}, {"sigmas": []}):
        with pytest.raises(UserError, match="noise levels that fall"):
            scheduler.set_timesteps(**wrong)
    for wrong in ({}, {"num_inference_steps": 1, "timesteps": [1.0]}, {"sigmas": [0.5], "timesteps": [1.0]}):
        with pytest.raises(UserError, match="only one"):
            scheduler.set_timesteps(**wrong)
    scheduler.set_timesteps(num_inference_steps=7, sigmas=sigmas)  # as many as steps, as in diffusers
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="3 steps but 1 sigmas"):
        scheduler.set_timesteps(num_inference_steps=3, sigmas=[0.5])


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear", "shift_terminal": 0.1}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_the_ramp_of_flux_like_pipelines_is_bent_by_the_base_or_gives_way_to_a_learned_grid(
    class_name: str, config: dict[str, Any]
) -> None:
    theirs = getattr(diffusers, class_name)(use_dynamic_shifting=True, **config)
    mine = InfoNoiseScheduler.from_config(theirs.config)
    ramp = {"sigmas": np.linspace(1.0, 1 / 8, 8), "mu": 0.8}
    for given in (ramp, {**ramp, "num_inference_steps": 8}, {"sigmas": np.array([0.9, 0.3]), "mu": 1.2}):
        theirs.set_timesteps(**given)
        mine.set_timesteps(**given)
        assert abs(theirs.sigmas[1] - given["sigmas"][1]) > 0.01
        torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="noise levels that fall"):
        mine.set_timesteps(sigmas=[0.3, 0.9], mu=1.2)

    learned = InfoNoiseScheduler.from_config(theirs.config, profile=profile(), grid="rescaled")
    learned.set_timesteps(8)
    wanted = learned.sigmas
    for given in (ramp, {**ramp, "num_inference_steps": 8, "sigmas": ramp["sigmas"].astype(np.float32).tolist()}):
        learned.set_timesteps(**given)
        assert torch.equal(learned.sigmas, wanted)
    for literal in ({"sigmas": ramp["sigmas"]}, {"sigmas": [0.9, 0.3], "mu": 0.8}):
        learned.set_timesteps(**literal)
        assert learned.sigmas[:-1].tolist() == pytest.approx(list(literal["sigmas"]))


def test_misuse_is_said() -> None:
    scheduler, x = ours("edm"), noise()
    with pytest.raises(UserError, match="set_timesteps first"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="not an index"):
        scheduler.step(x, 0, x)
    for timestep in scheduler.timesteps:
        scheduler.step(x, timestep, x)
    with pytest.raises(UserError, match="all 2 steps are done"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(UserError, match="at least 1"):
        ours("edm", profile=profile()).set_timesteps(0)


@pytest.mark.parametrize(
    ("base", "message"),
    [("KDPM2DiscreteScheduler", "visits 11 levels in 10"), ("FlowMatchEulerDiscreteScheduler", "makes no grid")],
)
def test_a_base_without_a_grid_to_read_is_named(base: str, message: str) -> None:
    keys = {"use_dynamic_shifting": True} if "Flow" in base else {}
    scheduler = InfoNoiseScheduler(base_class=base, **keys)
    with pytest.raises(UserError, match=message):
        scheduler.set_timesteps(10)
    if keys:
        scheduler.set_timesteps(10, mu=0.8)  # as pipelines with dynamic shifting do
        assert scheduler.sigmas[0] == 1 and len(scheduler.timesteps) == 10


def test_edm_begins_with_the_noise_that_its_stock_scheduler_begins_with() -> None:
    assert ours("edm").init_noise_sigma == pytest.approx(stock("edm").init_noise_sigma)
    assert ours("edm").init_noise_sigma == pytest.approx(math.hypot(80, 1))
    assert ours("flow").init_noise_sigma == ours("vp").init_noise_sigma == 1
