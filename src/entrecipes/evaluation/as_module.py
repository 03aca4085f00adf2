"""What the `evaluate` modules under modules/ share: images and plain lists in, plain dictionaries out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.heldout import nats_per_image
from entrecipes.evaluation.metrics import compare
from entrecipes.recipe.base import build, choice

ARGUMENTS = """
Args:
    predictions: Generated images (PIL images, or uint8 arrays of height x width or height x width x 3).
    references: Real images, as many.
    features: A feature extractor of `entrecipes ls features`, with its default settings.
    batch_size: Images embedded at a time.
    seed: Of the random subsets, where there are any.
Returns:
    {name: value} with the extractor and the count in the name, `<name>_spread` where known, and `origin`.
"""

NATS_ARGUMENTS = """
Args:
    predictions: Squared x0 errors, summed over dimensions, one for each pair of image and noise level.
    references: log sigma of each pair; every level as often as the others.
    gate_pivot: Sigma at which the gate sigma^3 / (sigma^3 + pivot^3) is one half; None: no gate.
Returns:
    {"heldout_nats": value, "origin": {...}}
"""


class ImageMetric(evaluate.Metric):
    """Thin wrapper of entrecipes.evaluation.metrics.compare; predictions and references are images."""

    measure: str
    """A metric of `compare`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=ARGUMENTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions, references, features="efficientnet_lite0", batch_size=250, seed=0) -> dict:
        return compare_images(self.measure, predictions, references, features, batch_size, seed)


@cache
def _extractor(name: str) -> FeatureExtractor:
    return build("features", choice("features", name).section(), device="cpu")


def _batches(images: Sequence[Image], batch_size: int) -> list[Tensor]:
    """PIL images, all of one size and mode, as uint8 [N, C, H, W] batches."""
    arrays = [np.asarray(image if image.mode == "L" else image.convert("RGB")) for image in images]
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise UserError(f"images of several shapes, such as {sorted(shapes)[:3]}: resize or convert them to one")
    stacked = torch.from_numpy(np.stack(arrays))
    channels_first = stacked[:, None] if stacked.ndim == 3 else stacked.movedim(3, 1)
    return list(channels_first.split(batch_size))


def compare_images(
    metric: str, predictions: Sequence[Image], references: Sequence[Image], features: str, batch_size: int, seed: int
) -> dict[str, Any]:
    """[`entrecipes.evaluation.metrics.compare`] on images, as `evaluate` hands them over."""
    found = compare(
        [metric],
        _extractor(features),
        _batches(references, batch_size),
        _batches(predictions, batch_size),
        batch_size=batch_size,
        seed=seed,
    )
    values = {result.name: result.value for result in found}
    spreads = {f"{result.name}_spread": result.spread for result in found if result.spread is not None}
    return values | spreads | {"origin": found[0].origin}


def nats_of_pairs(x0_error: Sequence[float], log_sigma: Sequence[float], gate_pivot: float | None) -> dict[str, Any]:
    """Nats from (x0 error, log sigma) pairs in any order.

    Raises:
        UserError: If there are fewer than two levels or they don't occur equally often.
    """
    levels, which, counts = np.unique(np.asarray(log_sigma, float), return_inverse=True, return_counts=True)
    if len(levels) < 2 or len(set(counts.tolist())) > 1:
        raise UserError("heldout_nats: give at least two noise levels, and the same number of errors for each of them")
    mean = np.bincount(which, weights=np.asarray(x0_error, float)) / counts
    nats, _ = nats_per_image(torch.from_numpy(levels), torch.from_numpy(mean)[None], gate_pivot)
    origin = {"samples": int(counts[0]), "noise_levels": len(levels), "gate_pivot": gate_pivot}
    return {"heldout_nats": nats.item(), "origin": origin}
