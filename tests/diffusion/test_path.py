"""The noise paths against diffusers' own schedulers, and table 1.4: every prediction type tells the same x0 error."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from torch import Tensor

from entrecipes.diffusion.path import FLOW_TIME_LIMIT, EdmPath, FlowPath, GaussianPath, VpPath
from entrecipes.errors import UserError

VP_TYPES = ["epsilon", "v_prediction", "sample"]
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ALL = [
    *[diffusers.DDPMScheduler(prediction_type=kind) for kind in VP_TYPES],
    diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    *[diffusers.EDMEulerScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction")],
    diffusers.EDMDPMSolverMultistepScheduler(sigma_data=1.0, sigma_schedule="exponential"),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS, flow_shift=2.0),
]


def named(scheduler: diffusers.SchedulerMixin) -> str:
    """A test id."""
    return f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', 'flow')}"


@pytest.fixture
def draws() -> tuple[Tensor, Tensor]:
    """Clean images (data of mean 0, standard deviation 0.5) and noise, float64 [16, 2, 3, 3]."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 16, 2, 3, 3, generator=generator, dtype=torch.float64)
    return 0.5 * x0, noise


def gaussian_mean(path: GaussianPath, x: Tensor, log_sigma: Tensor) -> Tensor:
    """E[x0 | x] of data ~ N(0, 0.25)."""
    a, _ = path.coefficients(log_sigma)
    shape = (-1, 1, 1, 1)
    return 0.25 / (0.25 + torch.exp(2 * log_sigma).view(shape)) * x / a.view(shape).to(x)


def two_point_mean(path: GaussianPath, x: Tensor, log_sigma: Tensor) -> Tensor:
    """E[x0 | x] of data that is -1 or 1 with equal probability."""
    a, _ = path.coefficients(log_sigma)
    shape = (-1, 1, 1, 1)
    return torch.tanh(x / a.view(shape).to(x) * torch.exp(-2 * log_sigma).view(shape))


def prediction_of(path: GaussianPath, x0_hat: Tensor, x: Tensor, log_sigma: Tensor) -> Tensor:
    """What a network says that believes in `x0_hat`: the target of x0_hat and the noise that it implies."""
    a, b = (c.view(-1, 1, 1, 1).to(x) for c in path.coefficients(log_sigma))
    return path.target(x0_hat, (x - a * x0_hat) / b, log_sigma)


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [gaussian_mean, two_point_mean])
@pytest.mark.parametrize("scheduler", ALL, ids=named)
def test_every_prediction_type_tells_the_same_x0_error(draws, scheduler, mean):
    x0, noise = draws
    x0 = x0.sign() if mean is two_point_mean else x0
    path = GaussianPath.from_scheduler(scheduler)
    log_sigma = torch.linspace(-3, 1.5, len(x0), dtype=torch.float64)
    x = path.add_noise(x0, noise, log_sigma)
    x0_hat = mean(path, x, log_sigma)
    prediction = prediction_of(path, x0_hat, x, log_sigma)

    torch.testing.assert_close(path.x0_from_prediction(prediction, x, log_sigma), x0_hat)
    raw = (prediction - path.target(x0, noise, log_sigma)).square().flatten(1).mean(1)
    reference = x0 + noise * log_sigma.exp().view(-1, 1, 1, 1)  # the variance-exploding x: the same for every path
    expected = (mean(EdmPath(diffusers.EDMEulerScheduler().config), reference, log_sigma) - x0).square()
    torch.testing.assert_close(raw * path.x0_error_scale(log_sigma), expected.flatten(1).mean(1), rtol=1e-9, atol=1e-12)


def test_x0_error_scales_are_those_of_the_table():
    log_sigma = torch.linspace(-4, 4, 9, dtype=torch.float64)
    sigma = log_sigma.exp()
    vp = {kind: GaussianPath.from_scheduler(diffusers.DDPMScheduler(prediction_type=kind)) for kind in VP_TYPES}
    edm = GaussianPath.from_scheduler(diffusers.EDMEulerScheduler(sigma_data=0.7))
    flow = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    for path, expected in (
        (vp["epsilon"], sigma**2),
        (vp["v_prediction"], sigma**2 / (1 + sigma**2)),
        (vp["sample"], torch.ones(9, dtype=torch.float64)),
        (edm, sigma**2 * 0.49 / (sigma**2 + 0.49)),
        (flow, (sigma / (1 + sigma)) ** 2),
    ):
        torch.testing.assert_close(path.x0_error_scale(log_sigma), expected)


@pytest.mark.parametrize("scheduler", ALL, ids=named)
def test_levels_time_and_fraction_are_inverse_and_in_order(scheduler):
    path = GaussianPath.from_scheduler(scheduler)
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, 301, dtype=torch.float64)
    a, b = path.coefficients(log_sigma)
    torch.testing.assert_close((b / a).log(), log_sigma)
    assert (path.timestep(log_sigma).diff() > 0).all() and (path.fraction(log_sigma).diff() > 0).all()
    torch.testing.assert_close(path.log_sigma(path.timestep(log_sigma)), log_sigma, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.at_fraction(path.fraction(log_sigma)), log_sigma, rtol=0, atol=1e-9)
    ends = path.at_fraction(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, log_sigma[[0, -1]])


@pytest.mark.parametrize("scheduler", ALL, ids=named)
def test_images_keep_their_dtype_and_float32_keeps_its_precision(draws, scheduler):
    path = GaussianPath.from_scheduler(scheduler)
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, 16, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x0, noise = (part.to(dtype) for part in draws)
        exact, x = (
            path.target(part.to(kind), noise.to(kind), log_sigma) for part, kind in ((x0, torch.float64), (x0, dtype))
        )
        assert x.dtype == path.add_noise(x0, noise, log_sigma).dtype == path.network_input(x0, log_sigma).dtype == dtype
        assert path.x0_from_prediction(x, x0, log_sigma).dtype == dtype
        torch.testing.assert_close(x.double(), exact, rtol=tolerance, atol=tolerance)


# -- what diffusers does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_vp_equals_add_noise_and_velocity_at_every_kind_of_timestep(draws, schedule, zero_snr):
    x0, noise = (part.float() for part in draws)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    path = GaussianPath.from_scheduler(scheduler)
    timestep = torch.tensor([0, 1, 2, 3, 10, 50, 100, 250, 500, 700, 800, 900, 990, 997, 998, 999])
    log_sigma = path.log_sigma(timestep)
    assert torch.equal(path.timestep(log_sigma), timestep.double())
    assert torch.equal(path.timestep(path.log_sigma(torch.arange(1000))), torch.arange(1000).double())
    # zero terminal SNR is 2^-24 here, as in diffusers' samplers, but 0 in add_noise: a = 2^-12
    tolerance = {"rtol": 1e-5, "atol": 1e-3 if zero_snr else 1e-5}
    torch.testing.assert_close(
        path.add_noise(x0, noise, log_sigma), scheduler.add_noise(x0, noise, timestep), **tolerance
    )
    torch.testing.assert_close(
        path.target(x0, noise, log_sigma), scheduler.get_velocity(x0, noise, timestep), **tolerance
    )
    torch.testing.assert_close(path.at_fraction(timestep.double() / 999), log_sigma, rtol=0, atol=1e-4)
    if zero_snr:
        euler = diffusers.EulerDiscreteScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True)
        assert GaussianPath.from_scheduler(euler).log_sigma_max == pytest.approx(path.log_sigma_max)
        if schedule != "linear":  # there diffusers' own last two sigmas are out of order
            assert path.log_sigma_max == pytest.approx(math.log(euler.sigmas[0]), abs=1e-4)


@pytest.mark.parametrize("kind", VP_TYPES)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_vp_step_predicts_the_same_x0(draws, name, kind):
    scheduler = getattr(diffusers, name)(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(50)
    path = GaussianPath.from_scheduler(scheduler)
    timestep = scheduler.timesteps[20]
    log_sigma = path.log_sigma(timestep[None])
    x, x0_hat, prediction = believe(path, draws, log_sigma)
    result = scheduler.step(prediction, timestep, x, return_dict=True)
    torch.testing.assert_close(result.pred_original_sample, x0_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VP_TYPES)
def test_vp_euler_sees_the_same_input_and_predicts_the_same_x0(draws, kind):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=kind)
    scheduler.set_timesteps(10)
    path = GaussianPath.from_scheduler(scheduler)
    log_sigma = scheduler.sigmas[:1].double().log()
    x, x0_hat, prediction = believe(path, draws, log_sigma)
    exploding = x / path.coefficients(log_sigma)[0].float()
    timestep = scheduler.timesteps[0]
    assert path.timestep(log_sigma).item() == pytest.approx(timestep.item(), abs=1e-3)
    shown = scheduler.scale_model_input(exploding, timestep)
    torch.testing.assert_close(shown, path.network_input(x, log_sigma), rtol=1e-5, atol=1e-5)
    result = scheduler.step(prediction, timestep, exploding)
    torch.testing.assert_close(result.pred_original_sample, x0_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", VP_TYPES)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_vp_multistep_solvers_predict_the_same_x0(draws, name, kind):
    assert_solver_agrees(getattr(diffusers, name)(prediction_type=kind), draws)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_flow_multistep_solvers_follow_the_flow_path(draws, name):
    scheduler = getattr(diffusers, name)(**FLOW_SIGMAS, flow_shift=3.0)
    path = GaussianPath.from_scheduler(scheduler)
    assert isinstance(path, FlowPath) and path.log_shift == pytest.approx(math.log(3))
    if name != "DEISMultistepScheduler":  # DEIS keeps noise, not x0, between steps
        assert_solver_agrees(scheduler, draws)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_equals_the_preconditioning(draws, name, kind):
    x0, noise = draws
    scheduler = getattr(diffusers, name)(prediction_type=kind, sigma_data=0.6, sigma_min=0.01, sigma_max=50)
    path = GaussianPath.from_scheduler(scheduler)
    assert (path.log_sigma_min, path.log_sigma_max) == (math.log(0.01), math.log(50))
    log_sigma = torch.full((len(x0),), 0.3, dtype=torch.float64)
    sigma, x = log_sigma.exp().view(-1, 1, 1, 1), path.add_noise(x0, noise, log_sigma)
    torch.testing.assert_close(x, x0 + sigma * noise)
    torch.testing.assert_close(path.network_input(x, log_sigma), scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(path.timestep(log_sigma), scheduler.precondition_noise(sigma).flatten())
    torch.testing.assert_close(
        path.x0_from_prediction(noise, x, log_sigma), scheduler.precondition_outputs(x, noise, sigma)
    )
    target = path.target(x0, noise, log_sigma)
    torch.testing.assert_close(scheduler.precondition_outputs(x, target, sigma), x0)


def test_edm_step_predicts_the_same_x0(draws):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    path = GaussianPath.from_scheduler(scheduler)
    log_sigma = scheduler.sigmas[4:5].double().log()
    x, x0_hat, prediction = believe(path, draws, log_sigma)
    timestep = scheduler.timesteps[4]
    assert path.timestep(log_sigma).item() == pytest.approx(timestep.item(), abs=1e-6)
    torch.testing.assert_close(scheduler.scale_model_input(x, timestep), path.network_input(x, log_sigma))
    torch.testing.assert_close(scheduler.step(prediction, timestep, x).pred_original_sample, x0_hat)


@pytest.mark.parametrize("ramp", ["karras", "exponential"])
def test_edm_time_is_the_schedulers_ramp(ramp):
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule=ramp, rho=5.0, num_train_timesteps=100)
    path = GaussianPath.from_scheduler(scheduler)
    expected = scheduler.sigmas[:-1].flip(0).double().log()
    torch.testing.assert_close(path.at_fraction(torch.linspace(0, 1, 101)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_equals_scale_noise_and_the_shifted_time(draws, shift):
    x0, noise = (part.float() for part in draws)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    path = GaussianPath.from_scheduler(scheduler)
    timestep = scheduler.timesteps[5:997:62]
    log_sigma = path.log_sigma(timestep)
    torch.testing.assert_close(path.timestep(log_sigma), timestep.double())
    expected = scheduler.scale_noise(x0, timestep, noise)
    torch.testing.assert_close(path.add_noise(x0, noise, log_sigma), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path.target(x0, noise, log_sigma), noise - x0)
    unshifted = torch.linspace(1, 1 / 1000, 1000)
    inside = (scheduler.sigmas > FLOW_TIME_LIMIT) & (scheduler.sigmas < 1 - FLOW_TIME_LIMIT)
    reached = path.timestep(path.at_fraction(unshifted))[inside]
    torch.testing.assert_close(reached, scheduler.timesteps[inside].double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_step_keeps_to_the_line_of_the_predicted_x0(draws, name):
    scheduler = getattr(diffusers, name)(shift=2.0)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(2)
    path = GaussianPath.from_scheduler(scheduler)
    now, later = scheduler.sigmas[2], scheduler.sigmas[2:].unique().flip(0)[1]
    log_sigma = torch.logit(now.double())[None]
    x, x0_hat, prediction = believe(path, draws, log_sigma)
    implied_noise = (x - (1 - now) * x0_hat) / now
    stepped = scheduler.step(prediction, scheduler.timesteps[2], x).prev_sample
    expected = (1 - later) * x0_hat + later * implied_noise
    torch.testing.assert_close(stepped.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_dynamic_shifting_leaves_training_time_unshifted():
    path = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    torch.testing.assert_close(path.at_fraction(torch.tensor([0.25])), torch.logit(torch.tensor([0.25]).double()))


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_a_configuration_serves_as_well_as_a_scheduler():
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    path = GaussianPath.from_scheduler(json.loads(scheduler.to_json_string()))
    assert isinstance(path, VpPath) and path.prediction_type == "v_prediction"
    assert path.log_sigma_max == GaussianPath.from_scheduler(scheduler).log_sigma_max


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas: true"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type: flow_prediction"),
        (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler is not supported; supported are"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type continuous"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas True"),
        (diffusers.EDMEulerScheduler(prediction_type="sample"), "prediction_type sample"),
        (diffusers.DDPMScheduler(prediction_type="noise"), "prediction_type noise"),
        (diffusers.DDPMScheduler(trained_betas=[0.1, 0.0, 0.1]), "alphas_cumprod"),
        ({"_class_name": "DDIMSchedulr"}, "did you mean 'DDIMScheduler'"),
        (dict(diffusers.DDIMScheduler().config), "_class_name"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel' is no diffusers scheduler"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_schedulers_are_refused_with_what_to_do(scheduler, message):
    with pytest.raises(UserError, match=message):
        GaussianPath.from_scheduler(scheduler)


# -- helpers --------------------------------------------------------------------------------------------------------


def believe(path: GaussianPath, draws: tuple[Tensor, Tensor], log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images at one level, the exact posterior mean, and the network output that means it."""
    x0, noise = draws
    log_sigma = log_sigma.double().expand(len(x0))
    x = path.add_noise(x0, noise, log_sigma)
    x0_hat = gaussian_mean(path, x, log_sigma)
    return x.float(), x0_hat.float(), prediction_of(path, x0_hat, x, log_sigma).float()


def assert_solver_agrees(scheduler: diffusers.SchedulerMixin, draws: tuple[Tensor, Tensor]) -> None:
    """The x0 that a multistep solver derives in its first step, which it keeps as its newest model output, is ours."""
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    path = GaussianPath.from_scheduler(scheduler)
    sigma = scheduler.sigmas[8:9].double()
    log_sigma = torch.logit(sigma) if isinstance(path, FlowPath) else sigma.log()
    x, x0_hat, prediction = believe(path, draws, log_sigma)
    scheduler.step(prediction, scheduler.timesteps[8], x)
    torch.testing.assert_close(scheduler.model_outputs[-1], x0_hat, rtol=1e-5, atol=1e-5)
