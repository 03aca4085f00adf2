"""The loss weightings against the forms in which they were published."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.recipe.pipeline import Objective as Section

TIMESTEPS = torch.arange(0, 1000, 37)
EDM = GaussianPath.from_scheduler(diffusers.EDMEulerScheduler(sigma_data=0.7))
FLOW = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
WEIGHTINGS = ["none", "edm", "min_snr", "p2", "sigma_sqrt", "cosmap"]


def on_prediction(path: GaussianPath, log_sigma: torch.Tensor, **section) -> torch.Tensor:
    """The weight as the literature writes it: on the squared error of the network's own prediction."""
    return Objective(Section(**section), path).weight(log_sigma) * path.x0_error_scale(log_sigma)


def vp(kind: str) -> tuple[GaussianPath, torch.Tensor, torch.Tensor]:
    """A VP path, log sigma at `TIMESTEPS`, and diffusers' SNR there."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    path = GaussianPath.from_scheduler(scheduler)
    return path, path.log_sigma(TIMESTEPS), compute_snr(scheduler, TIMESTEPS).double()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_the_published_weight_of_each_prediction(kind):
    path, log_sigma, snr = vp(kind)
    capped = snr.clamp(max=5)
    published = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
    torch.testing.assert_close(on_prediction(path, log_sigma, weighting="min_snr"), published, rtol=1e-4, atol=0)


def test_min_snr_on_the_flow_velocity():
    log_sigma = torch.linspace(-6, 6, 25, dtype=torch.float64)
    time = torch.sigmoid(log_sigma)
    expected = torch.minimum((1 - time) ** 2, 5 * time**2)
    torch.testing.assert_close(on_prediction(FLOW, log_sigma, weighting="min_snr"), expected)


def test_p2_is_the_published_weight_of_epsilon():
    path, log_sigma, snr = vp("epsilon")
    weight = on_prediction(path, log_sigma, weighting="p2", p2_gamma=0.5, p2_k=2.0)
    torch.testing.assert_close(weight, (2 + snr) ** -0.5, rtol=1e-4, atol=0)


def test_edm_weight_cancels_the_output_scale():
    log_sigma = torch.linspace(-6, 4, 25, dtype=torch.float64)
    weight = on_prediction(EDM, log_sigma, weighting="edm", sigma_data=0.7)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    sigma = log_sigma.exp()
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(Objective(Section(weighting="edm"), FLOW).weight(log_sigma), expected)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_sd3_weights_are_diffusers_weights_of_the_flow_velocity(weighting):
    log_sigma = torch.linspace(-5, 5, 25, dtype=torch.float64)
    expected = compute_loss_weighting_for_sd3(weighting, torch.sigmoid(log_sigma)).double()
    torch.testing.assert_close(on_prediction(FLOW, log_sigma, weighting=weighting), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])  # none is each network's own space, by definition
def test_one_weighting_means_the_same_loss_for_every_prediction(weighting):
    log_sigma = torch.linspace(-3, 2, 8, dtype=torch.float64)
    x0, noise, error = torch.randn(3, 8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = []
    for path in (EDM, FLOW, *(vp(kind)[0] for kind in ("epsilon", "v_prediction", "sample"))):
        a, b = (c.view(-1, 1, 1, 1) for c in path.coefficients(log_sigma))
        x = path.add_noise(x0, noise, log_sigma)
        prediction = path.target(x0 + error, (x - a * (x0 + error)) / b, log_sigma)
        loss, x0_error = Objective(Section(weighting=weighting), path)(
            prediction, path.target(x0, noise, log_sigma), log_sigma
        )
        torch.testing.assert_close(x0_error, error.square().flatten(1).mean(1).float(), rtol=1e-4, atol=1e-6)
        losses.append(loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_float32_and_only_the_loss_carries_gradients(weighting):
    prediction = torch.ones(4, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    log_sigma = torch.tensor([-4.0, -1.0, 0.0, 3.0], dtype=torch.float64)
    loss, x0_error = Objective(Section(weighting=weighting), EDM)(prediction, torch.zeros(4, 3, 2, 2), log_sigma)
    assert loss.dtype == x0_error.dtype == torch.float32 and loss.shape == x0_error.shape == (4,)
    assert loss.requires_grad and not x0_error.requires_grad
    torch.testing.assert_close(x0_error.double(), EDM.x0_error_scale(log_sigma), rtol=1e-6, atol=0)
    if weighting == "none":
        torch.testing.assert_close(loss, torch.ones(4))
