"""Metrics that plugins add (`recipe.evaluation.own_metric`), measured beside the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.metrics import embed
from entrecipes.evaluation.result import Metric, count_tag, metric_name
from entrecipes.recipe.evaluation import OWN_METRICS


def measure_own(
    names: Sequence[str],
    real: Tensor,
    fake: Tensor,
    *,
    extractor: Callable[[], FeatureExtractor],
    batch_size: int,
    seed: int,
    origin: dict[str, Any],
) -> list[Metric]:
    """The metrics among `names` that plugins registered, in that order.

    Args:
        real: Samples of the data as it holds them, uint8 [n, ...].
        fake: Generated ones.
        extractor: Gives the recipe's feature extractor; called only where a metric compares features.

    Raises:
        UserError: When a metric's function raises, or its number isn't finite.
    """
    found = []
    for name in names:
        if name not in OWN_METRICS:
            continue
        metric, about, pair = OWN_METRICS[name], {**origin, "samples": len(fake)}, (real, fake)
        said = f"{name}_{count_tag(len(fake))}"
        if metric.of == "features":
            network = extractor()
            said = metric_name(name, network.tag, len(fake))
            about |= {"extractor": network.name, "extractor_version": network.version}
            pair = tuple(embed(images, network, batch_size) for images in pair)
        about |= {"reference_samples": len(real), "plugin": metric.measure.__module__}
        try:
            value = metric.measure(*pair, seed)
        except Exception as error:  # whatever the user's function does
            raise UserError(
                f"evaluation.metrics: '{name}' of {metric.measure.__module__} failed: {type(error).__name__}: {error}"
            ) from error
        value, spread = value if isinstance(value, tuple) else (value, None)
        found.append(Metric(said, value, spread, about, metric.higher_is_better))
    return found
