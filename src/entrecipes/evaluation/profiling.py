"""The information profile of a pipeline that exists already, measured on data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.opening import OpenedData
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.pipelines import Components
from entrecipes.errors import UserError
from entrecipes.evaluation.drawing import draw_x0
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.heldout import HeldOutBundle
from entrecipes.information.profile import Profile
from entrecipes.information.values import value_statistics
from entrecipes.recipe.evaluation import HeldOut


@dataclass(frozen=True)
class MeasuredProfile:
    """A profile and what it was measured on.

    Args:
        profile: Mean squared x0 error per dimension at noise levels [L] that are even in log sigma, the ends of the
            noise path among them.
        dimensions: Numbers in one x0.
        data: Name of the data set.
        split: `held_out` or `train`.
        images: Images, each used at every level with a noise of its own.
        data_std: Standard deviation of their x0 over all numbers.
        distinct_values: Different numbers in them.
        spacing: Smallest distance between two of these.
        seconds: What the forward passes took, one for each image and level.
    """

    profile: Profile
    dimensions: int
    data: str
    split: str
    images: int
    seconds: float
    data_std: float
    distinct_values: int
    spacing: float

    @property
    def passes(self) -> int:
        """Forward passes, each of one image."""
        return self.images * len(self.profile.log_sigma)


@torch.inference_mode()
def measure_profile(
    components: Components,
    data: OpenedData,
    device: torch.device,
    section: HeldOut,
    batch_size: int = 64,
    expect: Callable[[float], None] = lambda seconds: None,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> MeasuredProfile:
    """Measure the x0 error on a fixed bundle of images, noise and noise levels; held-out images where there are any.

    Args:
        components: The pipeline's parts; the model is moved to `device` and put into eval mode.
        data: Opened for them.
        section: How many images and levels, and the seed; its gate is not used.
        batch_size: Images at a time.
        expect: Called with the seconds that it will take, judged from the first batch.
        shard: Processes that share the images; every one gets the whole result.

    Raises:
        UserError: For data that can't be asked for chosen images or has one value only, and for a model that fails on
            it or predicts what is not finite.
    """
    split = "held_out" if data.held_out else "train"
    images = data.held_out or data.train
    if not isinstance(images, ImageSet):
        raise UserError(
            "data: a stream must hold images out to be measured on; set held_out above 0 in the data section"
        )
    x0, condition = draw_x0(data, images, section.images, section.seed, device)
    statistics = value_statistics(x0)
    if statistics["distinct_values"] < 2:
        raise UserError(f"data: all numbers of the {len(x0)} images are the same: there is no information to measure")
    denoiser = Denoiser(components.model.to(device).eval(), components.family, components.path)
    bundle = HeldOutBundle(section, x0, condition, components.path)
    mine = len(shard.rows(len(x0)))
    expect(seconds_of_one_batch(denoiser, bundle, batch_size) * len(bundle.log_sigma) * mine / batch_size)
    start = time.perf_counter()
    found = bundle.measure(
        denoiser.x0_error, batch_size, shard
    )  # gives its result on the CPU, hence waits for the device
    seconds = time.perf_counter() - start
    if not bool(found.x0_error.isfinite().all()):
        worst = found.log_sigma[~found.x0_error.isfinite()][0].exp().item()
        raise UserError(f"pipeline: the error at sigma {worst:.3g} is not finite: the weights are damaged or overflow")
    dimensions = x0[0].numel()
    return MeasuredProfile(
        Profile(found.log_sigma, found.x0_error / dimensions),
        dimensions,
        data.images.train.name,
        split,
        len(x0),
        seconds,
        **statistics,
    )


def seconds_of_one_batch(denoiser: Denoiser, bundle: HeldOutBundle, batch_size: int) -> float:
    """Try the model on the first images, and time it; whatever it raises is said in words.

    Args:
        denoiser: With the model in eval mode, on the device of the bundle.
        bundle: What it is tried on.
        batch_size: Images at a time; with fewer in the bundle the time is that of so many all the same.

    Raises:
        UserError: Naming what the model fails on.
    """
    x0: Tensor = bundle.x0[:batch_size]
    condition = None if bundle.condition is None else bundle.condition[:batch_size]
    level = torch.full((len(x0),), bundle.log_sigma.mean().item(), device=x0.device)
    try:
        for _ in range(2):  # the first one also warms up
            start = time.perf_counter()
            prediction, target = denoiser(x0, torch.randn_like(x0), level, condition)
            prediction.sum().item()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{batch_size} images at a time do not fit into memory; lower --batch-size") from error
    except Exception as error:  # whatever a model that diffusers loads may raise on images
        raise UserError(f"pipeline: the model fails on {list(x0.shape[1:])} of the data: {error}") from error
    seconds = time.perf_counter() - start
    if prediction.shape != target.shape:
        predicted, wanted = list(prediction.shape[1:]), list(target.shape[1:])
        raise UserError(f"pipeline: the model predicts {predicted} for {wanted}: a learned variance is not supported")
    return seconds * batch_size / len(x0)
