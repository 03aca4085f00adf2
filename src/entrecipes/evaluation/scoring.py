"""Block scores of a model on fixed draws: training images, each with one noise per noise level."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from entrecipes.blocks.measuring import Draw, measure_blocks
from entrecipes.blocks.scores import BlockScores, model_fingerprint
from entrecipes.blocks.stack import BlockStack
from entrecipes.data.images import ImageSet
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.families import Family, family_of_pipeline
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.evaluation.drawing import draw_x0
from entrecipes.evaluation.evaluator import evaluating
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.heldout import HeldOutBundle
from entrecipes.evaluation.profiling import seconds_of_one_batch
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.blocks import HoldOut
from entrecipes.recipe.prune import Draws

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from entrecipes.data.opening import OpenedData
    from entrecipes.diffusion.pipelines import Components
    from entrecipes.noise.base import NoiseSampler

SAMPLED = 4096
"""Noise levels drawn to learn where a sampler draws."""


class Scoring:
    """Draws that are made once; any model of the family can be scored on them, as often as one likes.

    Args:
        section: Number of levels, gate and seed (`images` is the caller's to cut).
        family: How the model is called.
        path: Its noise path; gives the range of the levels, which are even in log sigma.
        x0: Clean images or latents, float [n, ...], on the device where the model will be.
        condition: Class labels int64 [n], condition maps float [n, C, F, H, W], or None.
        batch_size: Images at a time; the hidden states of all blocks are held for so many.
        shard: Processes that share the images; every one gets the whole result.
        data: Name of the data, for the origin.
        data_fingerprint: What tells the data set that x0 is drawn from from any other.
        model: Name of the model, for the origin; None: that of its class.
    """

    def __init__(
        self,
        section: Draws | HoldOut,
        family: Family,
        path: GaussianPath,
        x0: Tensor,
        condition: Tensor | None,
        *,
        batch_size: int = 64,
        shard: Shard = Shard(),  # noqa: B008 (frozen)
        data: str,
        data_fingerprint: str,
        model: str | None = None,
    ) -> None:
        self.section, self.family, self.path = section, family, path
        self.batch_size, self.shard = batch_size, shard
        self.bundle = HeldOutBundle(section, x0, condition, path)
        self.data, self.data_fingerprint, self.model = data, data_fingerprint, model

    @classmethod
    def on_images(
        cls,
        section: Draws | HoldOut,
        components: Components,
        data: OpenedData,
        device: torch.device,
        batch_size: int = 64,
        model: str | None = None,
        split: Literal["train", "held_out"] = "train",
        shard: Shard = Shard(),  # noqa: B008 (frozen)
    ) -> Scoring:
        """Draw images of a split by the section's seed.

        Raises:
            UserError: For a stream, which can't be asked for chosen images, without held-out images, or when too many
                are unreadable.
        """
        images = data.train if split == "train" else data.held_out
        if images is None:
            raise UserError("data: no images are held out, which blocks are compared on; set data.held_out above 0")
        if not isinstance(images, ImageSet):
            raise UserError(
                "data: blocks can't be scored on a stream, which can't be asked for chosen images; set data.streaming: "
                "false, or take one of its shards as data"
            )
        return cls(
            section,
            components.family,
            components.path,
            *draw_x0(data, images, section.images, section.seed, device),
            batch_size=batch_size,
            shard=shard,
            data=data.images.train.name,
            data_fingerprint=images.fingerprint,
            model=model,
        )

    def measure(
        self, model: ModelMixin, gone: Collection[int] = (), gradients: bool = True, identify: bool = True
    ) -> BlockScores:
        """Score every block, in eval mode; the model is left as it was.

        Args:
            model: Of the family, on the device of x0: the raw weights, no distributed wrapper.
            gone: Blocks that count as removed already.
            gradients: Also measure the Taylor score (one more forward and backward pass).
            identify: Keep the model's fingerprint, which takes reading all its weights.

        Raises:
            UserError: For a model without a stack of blocks, or one that predicts what is not finite.
        """
        stack = BlockStack(model)
        origin = {
            "model": self.model or type(model).__name__,
            **({"model_fingerprint": model_fingerprint(model)} if identify else {}),
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "images": len(self.bundle.x0),
            "noise_levels": len(self.bundle.log_sigma),
            "seed": self.section.seed,
            "device": str(self.bundle.x0.device),
            "gone": sorted(gone),
        }
        with evaluating(model):
            return measure_blocks(
                stack,
                self._draws(Denoiser(model, self.family, self.path)),
                log_sigma=self.bundle.log_sigma,
                x0_error_scale=self.path.x0_error_scale(self.bundle.log_sigma),
                gate_pivot=self.section.gate_pivot,
                gone=gone,
                gradients=gradients,
                origin=origin,
                total=self.shard.total,
            )

    def _draws(self, denoiser: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[Draw]:
        images = len(self.bundle.x0)
        mine, own = self.shard.rows(images).to(self.bundle.x0.device), self.shard.own(images)
        for level, batches in itertools.groupby(self.bundle.batches(self.batch_size, mine), itemgetter(0)):
            left = own
            for _, batch in batches:
                yield Draw(level, partial(denoiser, *batch), max(left, 0))
                left -= len(batch[0])

    @torch.no_grad()
    def try_out(self, model: ModelMixin, gradients: bool = True) -> float:
        """Try the model on the first images, and estimate how many seconds `measure` takes.

        Raises:
            UserError: When it fails on them.
        """
        blocks, levels = len(BlockStack(model)), len(self.bundle.log_sigma)
        with evaluating(model):
            seconds = seconds_of_one_batch(Denoiser(model, self.family, self.path), self.bundle, self.batch_size)
        passes = 1 + (blocks - 1) / 2 + (3 if gradients else 0)
        return seconds / self.batch_size * len(self.shard.rows(len(self.bundle.x0))) * levels * passes

    @torch.inference_mode()
    def loss(self, model: ModelMixin, objective: Objective, weights: Tensor) -> float:
        """The training loss on the draws: the same images, noise and noise levels every time, in eval mode.

        Args:
            model: As for `measure`.
            objective: The loss of training.
            weights: What each noise level counts [L], such as `weights` of the run's sampler.
        """
        denoiser = Denoiser(model, self.family, self.path)

        def loss(*batch: Any) -> Tensor:
            return objective(*denoiser(*batch), batch[2])[0].double()

        with evaluating(model):
            return float(self.bundle.each(loss, self.batch_size, self.shard).mean(0).cpu() @ weights.double())

    def call(self, model: ModelMixin) -> Tensor:
        """Predict from the first two images at the middle noise level, with gradients where they are on."""
        levels = self.bundle.batches(2)
        middle = next(batch for level, batch in levels if level == len(self.bundle.log_sigma) // 2)
        return Denoiser(model, self.family, self.path)(*middle)[0]

    def weights(self, sampler: NoiseSampler, levels: Tensor | None = None) -> Tensor:
        """Share of a sampler's draws, times the factors of their losses, that is nearest to each level [L], float64.

        Drawn with a generator of its own, so that no random state changes.

        Args:
            sampler: Where training draws.
            levels: Noise levels [L], increasing; None: those of the draws here.
        """
        levels = self.bundle.log_sigma if levels is None else levels
        return level_shares(sampler, levels, torch.Generator(self.bundle.x0.device).manual_seed(self.section.seed))


def level_shares(sampler: NoiseSampler, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Share of a sampler's draws, times the factors of their losses, nearest to each of increasing levels [L], float64.

    Args:
        sampler: Where training draws.
        levels: Noise levels, log sigma.
        generator: One of its own, on the sampler's device, so that no random state of the run changes.
    """
    log_sigma, factor = (values.double().cpu() for values in sampler.sample(SAMPLED, generator))
    nearest = torch.bucketize(log_sigma, (levels[1:] + levels[:-1]) / 2)
    shares = torch.bincount(nearest, weights=factor, minlength=len(levels))
    return shares / shares.sum()


def score_blocks(
    pipeline: DiffusionPipeline,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    noise_levels: int = 16,
    gate_pivot: float | None = 0.2,
    seed: int = 0,
    batch_size: int = 64,
    gradients: bool = True,
) -> BlockScores:
    """Score the blocks of a pipeline's denoiser, for a training loop of one's own.

    The model stays where it is and as it is. For one that is called with more than labels (a text-conditional one)
    make the draws yourself: `measure_blocks(BlockStack(model), draws, ...)`.

    Args:
        pipeline: A diffusers pipeline of a supported family, such as DiTPipeline.
        images: x0 as the model sees it, float [n, ...]: images in [-1, 1], or latents already scaled; about 64.
        labels: Class labels int64 [n], for a class-conditional model.
        noise_levels: Levels, even in log sigma over the scheduler's range; every image is used at each.
        gate_pivot: Sigma at which the information's gate is one half, in units of x0; None: no gate.
        seed: Seed of the noise.
        batch_size: Images at a time.
        gradients: Also measure the Taylor score.

    Raises:
        UserError: For a pipeline without a supported model, inputs that do not fit it, or a model that fails on them.
    """
    family = family_of_pipeline(pipeline)
    model = family.denoiser(pipeline)
    if not images.is_floating_point() or len(images) < 2:
        raise UserError(
            f"images: {images.dtype} {list(images.shape)}; give at least two as float [n, ...], in [-1, 1] or, with a "
            "VAE, as latents already scaled"
        )
    if (family.num_classes(model) is None) != (labels is None) or (labels is not None and len(labels) != len(images)):
        wants = "takes no labels" if family.num_classes(model) is None else "is class-conditional"
        raise UserError(f"labels: the model {wants}; give {'None' if 'no' in wants else 'one label for each image'}")
    x0 = images.to(model.device, model.dtype)
    section = Draws(images=len(images), noise_levels=noise_levels, gate_pivot=gate_pivot, seed=seed)
    scoring = Scoring(
        section,
        family,
        GaussianPath.from_scheduler(getattr(pipeline.scheduler, "base", pipeline.scheduler)),
        x0,
        None if labels is None else labels.to(model.device),
        batch_size=batch_size,
        data="given images",
        data_fingerprint=fingerprint(images, labels),
    )
    scoring.try_out(model)
    return scoring.measure(model, gradients=gradients)
