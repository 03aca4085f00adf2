"""Measure a model as its recipe says: held-out nats on a fixed bundle, sample-based metrics, images to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.opening import OpenedData
from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.pipelines import Components
from entrecipes.errors import UserError
from entrecipes.evaluation.clips import compare_clips
from entrecipes.evaluation.drawing import conditions, draw, draw_x0
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.generation import Shard, balanced_labels, generate
from entrecipes.evaluation.grid import SampleGrid, draw_grid
from entrecipes.evaluation.heldout import HeldOutBundle, HeldOutResult
from entrecipes.evaluation.metrics import compare
from entrecipes.evaluation.ngrams import compare_ngrams
from entrecipes.evaluation.own import measure_own
from entrecipes.evaluation.pose_detector import pose_detector
from entrecipes.evaluation.result import Metric
from entrecipes.evaluation.stickers import compare_stickers
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import OWN_METRICS, Evaluation


class Evaluator:
    """Everything that is measured on one data set with one evaluation section; the bundles and features are kept."""

    def __init__(
        self, section: Evaluation, components: Components, data: OpenedData, device: torch.device, shard: Shard
    ) -> None:
        """Raises UserError when there is nothing to measure on."""
        self.section, self.components, self.data = section, components, data
        self.device, self.shard = device, shard
        splits = {"held_out": data.held_out, "train": data.train}
        self.splits = {name: images for name, images in splits.items() if isinstance(images, ImageSet)}
        """What can be measured on, the first by preference; a stream can't be asked for chosen images."""
        if not self.splits:
            raise UserError("data: a stream must hold images out to be measured on; set data.held_out above 0")
        self._bundles: dict[str, HeldOutBundle] = {}

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The recipe's feature extractor. Raises `UserError` when it can't be had."""
        return build("features", self.section.features, device=self.device)

    @cached_property
    def judges(self) -> dict[str, Any]:
        """Networks that clips are measured with besides the extractor, as far as metrics want them.

        The pose detector is trained now when it isn't kept from another run. Raises `UserError` when one can't be had.
        """
        section, images, found = self.section, self.data.images, {}
        if "fvd" in section.metrics:
            found["video"] = build(
                "video_features", section.video_features, features=self.extractor, device=self.device
            )
        if "text" in section.metrics:
            found["text"] = build(
                "text_features",
                section.text_features,
                features=self.extractor,
                train=images.train,
                held_out=images.held_out,
                device=self.device,
            )
        if "pose" in section.metrics:
            found["detector"] = pose_detector(section.pose, images.train, images.held_out, self.device)
        return found

    def check(
        self, model: ModelMixin, in_turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    ) -> None:
        """Sample two images as `evaluation:` says but in one step, and load the feature extractor, before any training.

        Args:
            model: The weights to try.
            in_turn: Context in which one process makes what the others then find in the cache, the pose detector.

        Raises:
            UserError: For a model, scheduler or extractor that training would only stumble over at its end.
        """
        section, family = self.section, self.components.family
        pipeline = family.pipeline_class.__name__
        if section.guidance_scale != 1 and not family.guidance:
            raise UserError(f"evaluation.guidance_scale: {pipeline} has no guidance; remove the key")
        real = next(iter(self.splits.values()))
        if section.metrics and section.reference not in self.splits:
            raise UserError("evaluation.reference: a stream can't be drawn from; take held_out, with data.held_out")
        images = self._x0(real, 2)
        try:
            type(self.components.scheduler).from_config(self.components.scheduler.config).set_timesteps(section.steps)
            with evaluating(model), torch.no_grad():
                denoiser = Denoiser(model, family, self.components.path)
                level = torch.zeros(len(images[0]), device=self.device)
                prediction, target = denoiser(images[0], torch.zeros_like(images[0]), level, images[1])
                samples = self.samples(model, 2, steps=1)
        except UserError:
            raise
        except Exception as error:  # whatever a config that diffusers accepts leads to: said now rather than at the end
            raise UserError(f"pipeline: this model does not work in {pipeline}: {error}") from error
        if prediction.shape != target.shape or samples.shape[1:] != self.data.sample_shape:
            raise UserError(
                f"pipeline: the model predicts {list(prediction.shape[1:])} for {list(target.shape[1:])} and samples "
                f"images of {list(samples.shape[1:])}; in_channels, out_channels and sample_size must agree"
            )
        of_samples = [name for name, own in OWN_METRICS.items() if own.of == "samples"]
        if set(section.metrics) - set(of_samples) and family.kind != "sequences":
            with in_turn():
                _ = self.extractor, self.judges

    # -- denoising --------------------------------------------------------------------------------------------------

    def nats(self, model: ModelMixin) -> dict[str, HeldOutResult]:
        """The denoising error per noise level and the nats of `model` on the fixed bundle of each split.

        Raises:
            UserError: When they are not finite.
        """
        denoiser = Denoiser(model, self.components.family, self.components.path)
        results = {}
        for split, images in self.splits.items():
            if split not in self._bundles:
                self._bundles[split] = self._bundle(images)
            with evaluating(model):
                bundle = self._bundles[split]
                results[split] = bundle.measure(denoiser.x0_error, self.section.batch_size, self.shard)
            results[split].to_metric()  # refuses what is not finite
        return results

    def nats_row(self, results: dict[str, HeldOutResult]) -> dict[str, Any]:
        """A log row: the profile of the first split, and the nats of the training bundle beside it."""
        split, first = next(iter(results.items()))
        train = results["train"].nats if "train" in results else None
        return first.to_row() | {"split": split, "train_nats": train}

    def clean(self, count: int) -> Tensor:
        """Up to `count` clean images or latents x0 [n, ...] of the first split, always the same, on the device."""
        return self._x0(next(iter(self.splits.values())), count)[0]

    def _bundle(self, images: ImageSet) -> HeldOutBundle:
        x0, condition = self._x0(images, self.section.held_out.images, self.section.held_out.seed)
        return HeldOutBundle(self.section.held_out, x0, condition, self.components.path)

    def _x0(self, images: ImageSet, count: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Clean images or latents and their condition, drawn by the seed, on the device."""
        return draw_x0(self.data, images, count, seed, self.device, self.section.task)

    # -- samples ----------------------------------------------------------------------------------------------------

    def samples(
        self, model: ModelMixin, count: int, condition: Sequence[Any] | None = None, steps: int | None = None
    ) -> Tensor:
        """uint8 samples [count, ...] on the CPU from the stock pipeline around `model`.

        They are asked for by the classes in turn, or by the conditions of drawn clips (see `clips`).
        """
        section = self.section
        if condition is None and self.data.num_classes:
            condition = balanced_labels(count, self.data.num_classes)
        if condition is None and self.components.family.kind in ("clips", "stickers"):
            _, condition = self.clips(count)
        stickers = self.components.family.kind == "stickers"
        options = {"frame_guidance_scale": section.frame_guidance_scale} if stickers else {}
        with evaluating(model), self.components.sampling(model, self.device) as pipeline:
            return generate(
                pipeline,
                self.components.family,
                condition,
                count,
                steps=steps or section.steps,
                guidance_scale=section.guidance_scale,
                seed=section.seed,
                batch_size=section.batch_size,
                shard=self.shard,
                **options,
            )

    def clips(self, count: int) -> tuple[Tensor, Tensor | Asked]:
        """Clips that give what is asked for: uint8 [count, 3, 2F + 1, H, W] with poses and a reference, or stickers.

        Drawn by the evaluation's seed from the first split: held-out ones where there are any; in turn if too few.

        Returns:
            The clips, and the condition maps (or what is `Asked` of stickers).
        """
        drawn, condition, _ = self.captioned(count)
        return drawn, condition

    def captioned(self, count: int) -> tuple[Tensor, Tensor | Asked, list[str]]:
        """The same, with the captions of stickers."""
        split = next(iter(self.splits))
        drawn, indices = draw(getattr(self.data.images, split), count, self.section.seed)
        turn = torch.arange(count) % len(drawn)
        captions = getattr(self.data.images, split).captions or [""] * (max(indices) + 1)
        condition = conditions(self.data, split, indices, self.section.task)[turn]
        return drawn[turn], condition, [captions[indices[i]] for i in turn.tolist()]

    def grid(self, model: ModelMixin) -> SampleGrid:
        """The sample grid: one column a class, at most ten; clips beside what was asked for."""
        return draw_grid(self, model)

    def metrics(self, model: ModelMixin, nats: dict[str, HeldOutResult], origin: dict[str, Any]) -> list[Metric]:
        """The held-out nats and the recipe's sample-based metrics, each with where it comes from.

        Args:
            model: The weights to measure, on the device.
            nats: What `nats` gave for them.
            origin: What the caller knows of them (images seen, training seed, whether they are averaged).
        """
        split, first = next(iter(nats.items()))
        about = origin | {"data": self.data.images.train.name}
        metrics = [first.to_metric(about | {"split": split})]
        if self.components.family.kind == "sequences":
            nats, (length,) = metrics[0], self.data.sample_shape
            per_symbol = {"value": nats.value / length, "spread": nats.spread / length}
            metrics.append(replace(nats, name=f"{nats.name}_per_symbol", **per_symbol))
        return metrics + (self._sample_metrics(model, about) if self.section.metrics else [])

    def _sample_metrics(self, model: ModelMixin, origin: dict[str, Any]) -> list[Metric]:
        section, kind = self.section, self.components.family.kind
        real = self.data.images.train if section.reference == "train" else self.data.images.held_out
        paired = kind in ("clips", "stickers")
        count = section.samples if paired else section.reference_samples or section.samples
        drawn, indices = draw(real, count, section.seed)
        origin = origin | {
            "split": section.reference,
            "sampler": type(self.components.scheduler).__name__,
            "steps": section.steps,
            "guidance_scale": section.guidance_scale,
            "seed": section.seed,
        }
        condition = conditions(self.data, section.reference, indices, section.task) if paired else None
        fake = self.samples(model, len(drawn) if paired else section.samples, condition)
        about = {"batch_size": section.batch_size, "seed": section.seed, "origin": origin}
        shown = drawn[:, :, : fake.shape[2]] if kind == "clips" else drawn
        own = measure_own(section.metrics, shown, fake, extractor=lambda: self.extractor, **about)
        if not (names := [name for name in section.metrics if name not in OWN_METRICS]):
            return own
        if kind == "sequences":
            symbols = self.components.channels
            return own + compare_ngrams(drawn.numpy(), fake.numpy(), symbols, seed=section.seed, origin=origin)
        about |= {"real_fingerprint": f"{real.fingerprint}-{section.seed}-{count}", "shard": self.shard}
        if kind == "clips":
            joints = None if real.keypoints is None else real.keypoints[indices]
            return own + compare_clips(names, self.extractor, shown, fake, keypoints=joints, **self.judges, **about)
        if kind == "stickers":
            about["origin"] = origin | {"task": section.task, "frame_guidance_scale": section.frame_guidance_scale}
            captions = [real.captions[i] for i in indices] if real.captions else None
            return own + compare_stickers(
                names,
                self.extractor,
                drawn,
                fake,
                captions=captions,
                given=condition.given[0].cpu(),
                **self.judges,
                **about,
            )
        return own + compare(names, self.extractor, drawn, fake, **about)


@contextlib.contextmanager
def evaluating(model: ModelMixin) -> Iterator[None]:
    """Dropout and the like off; afterwards the model is as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
