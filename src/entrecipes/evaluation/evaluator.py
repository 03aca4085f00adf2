"""Measure a model as its recipe says: held-out nats on a fixed bundle, sample-based metrics, images to look at."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.opening import OpenedData
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.pipelines import Components
from entrecipes.errors import UserError
from entrecipes.evaluation.generation import Shard, balanced_labels, generate
from entrecipes.evaluation.heldout import HeldOutBundle, HeldOutResult
from entrecipes.evaluation.metrics import compare
from entrecipes.evaluation.result import Metric
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import Evaluation

GRID_COLUMNS = 10


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
        self._extractor: Any = None

    # -- denoising --------------------------------------------------------------------------------------------------

    def held_out(self, model: ModelMixin, split: str) -> HeldOutResult:
        """The denoising error per noise level and the nats of `model` on the fixed bundle of a split."""
        if split not in self._bundles:
            self._bundles[split] = self._bundle(self.splits[split])
        denoiser = Denoiser(model, self.components.family, self.components.path)
        training = model.training
        model.eval()
        try:
            return self._bundles[split].measure(denoiser.x0_error, batch_size=self.section.batch_size, shard=self.shard)
        finally:
            model.train(training)

    def held_out_row(self, model: ModelMixin) -> dict[str, Any]:
        """A log row: the nats of the held-out and the training bundle side by side, and the profile of the former."""
        started = time.perf_counter()
        results = {split: self.held_out(model, split) for split in self.splits}
        split, first = next(iter(results.items()))
        row = first.to_row() | {"split": split, "train_nats": results["train"].nats if "train" in results else None}
        return row | {"seconds": time.perf_counter() - started}

    def _bundle(self, images: ImageSet) -> HeldOutBundle:
        section = self.section.held_out
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(section.seed))
        chosen = order[: section.images].tolist()
        x0 = self.data.space.encode(torch.stack([images.image(i) for i in chosen]).to(self.device))
        labels = images.labels[chosen].to(self.device) if images.labels is not None else None
        return HeldOutBundle(section, x0, labels, self.components.path)

    # -- samples ----------------------------------------------------------------------------------------------------

    def samples(self, model: ModelMixin, count: int, labels: list[int] | None = None) -> Tensor:
        """uint8 images [count, C, H, W] on the CPU from the stock pipeline around `model`, classes in turn."""
        section, num_classes = self.section, self.data.num_classes
        if labels is None and num_classes:
            labels = balanced_labels(count, num_classes)
        pipeline = self.components.pipeline(model).to(self.device)
        return generate(
            pipeline,
            self.components.family,
            labels,
            count,
            steps=section.steps,
            guidance_scale=section.guidance_scale,
            seed=section.seed,
            batch_size=section.batch_size,
            shard=self.shard,
        )

    def grid(self, model: ModelMixin) -> tuple[Tensor, int]:
        """Images for the sample grid, row by row, and its number of columns (one a class, at most ten)."""
        columns = min(self.data.num_classes or GRID_COLUMNS, GRID_COLUMNS)
        labels = balanced_labels(columns * self.section.grid, columns) if self.data.num_classes else None
        return self.samples(model, columns * self.section.grid, labels), columns

    def metrics(self, model: ModelMixin, origin: dict[str, Any]) -> list[Metric]:
        """The held-out nats and the recipe's sample-based metrics, each with where it comes from.

        Args:
            model: The weights to measure, on the device.
            origin: What the caller knows of them (images seen, training seed, whether they are averaged).
        """
        section = self.section
        split = next(iter(self.splits))
        about = origin | {"data": self.data.images.train.name}
        nats = self.held_out(model, split).to_metric(about | {"split": split})
        return [nats, *self._sample_metrics(model, about)] if section.metrics else [nats]

    def _sample_metrics(self, model: ModelMixin, origin: dict[str, Any]) -> list[Metric]:
        section = self.section
        fake = self.samples(model, section.samples)
        real = self.data.images.train if section.reference == "train" else self.data.images.held_out
        count = min(section.reference_samples or section.samples, len(real))
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(section.seed))[:count]
        if self._extractor is None:
            self._extractor = build("features", section.features, device=self.device)
        return compare(
            section.metrics,
            self._extractor,
            (torch.stack([real.image(i) for i in part.tolist()]) for part in order.split(section.batch_size)),
            fake,
            batch_size=section.batch_size,
            seed=section.seed,
            origin=origin
            | {
                "split": section.reference,
                "sampler": type(self.components.scheduler).__name__,
                "steps": section.steps,
                "guidance_scale": section.guidance_scale,
                "seed": section.seed,
            },
            real_fingerprint=f"{real.fingerprint}-{section.seed}-{count}",
        )
