"""A measured profile against one that is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from entrecipes.data.images import ImageSet, Splits
from entrecipes.data.opening import OpenedData
from entrecipes.diffusion.families import family_of
from entrecipes.diffusion.path import GaussianPath
from entrecipes.diffusion.pipelines import Components
from entrecipes.diffusion.space import PixelSpace
from entrecipes.errors import UserError
from entrecipes.evaluation.profiling import measure_profile
from entrecipes.recipe.evaluation import HeldOut

SCHEDULER = DDPMScheduler(prediction_type="sample")
PATH = GaussianPath.from_scheduler(SCHEDULER)


class CoinDenoiser(torch.nn.Module):
    """The best denoiser of independent pixels that are -1 or 1 with equal odds: E[x0 | x] = tanh(x / (a sigma^2))."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: None, return_dict: bool) -> tuple[Tensor]:
        log_sigma = PATH.log_sigma(timestep)
        a, _ = PATH.coefficients(log_sigma)
        scale = 1 / (a * torch.exp(2 * log_sigma))
        return (torch.tanh(sample * scale[:, None, None, None].float()),)


def coins(count: int, value: int | None = None) -> OpenedData:
    pixels = torch.randint(0, 2, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    pixels = pixels if value is None else torch.full_like(pixels, value)
    images = ImageSet("coins", "", "", "coins", tensor=pixels)
    return OpenedData(images, None, PixelSpace(), Splits(images, None), None, ())


def measure(data: OpenedData, model: torch.nn.Module, **keys: int):
    components = Components(model, SCHEDULER, None, "", family_of("UNet2DModel"), PATH)
    return measure_profile(components, data, torch.device("cpu"), HeldOut(**keys), batch_size=100)


def test_fair_coins_hold_ln_2_nats_each() -> None:
    measured = measure(coins(1024), CoinDenoiser(), images=1024, noise_levels=48)
    assert measured.profile.nats() == pytest.approx(math.log(2), rel=0.01)
    assert (measured.split, measured.images, measured.dimensions, measured.passes) == ("train", 1024, 64, 1024 * 48)
    assert measured.distinct_values == 2 and measured.data_std == pytest.approx(1, abs=1e-3) and measured.seconds > 0
    log_sigma, error = measured.profile.log_sigma, measured.profile.x0_error
    assert log_sigma[[0, -1]].tolist() == pytest.approx([PATH.log_sigma_min, PATH.log_sigma_max])
    assert error[0] == 0 and error[-1] == pytest.approx(1, abs=0.01), "nothing and everything is unknown at the ends"


class Broken(torch.nn.Module):
    """Predicts what `change` makes of its input."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: None, return_dict: bool) -> tuple[Tensor]:
        return (self.change(sample),)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x * math.nan, "the error at sigma 0.01 is not finite"),
        (lambda x: torch.cat([x, x], 1), r"predicts \[2, 8, 8\] for \[1, 8, 8\]"),
        (lambda x: x @ x[:, :, :3], r"fails on \[1, 8, 8\] of the data"),
    ],
)
def test_models_that_do_not_work_are_named(change, said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure(coins(4), Broken(change), images=4, noise_levels=4)


def test_data_of_one_value_has_no_information() -> None:
    with pytest.raises(UserError, match="all numbers of the 4 images are the same"):
        measure(coins(4, value=7), CoinDenoiser(), images=4, noise_levels=4)
