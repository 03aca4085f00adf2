"""Quality against images and seconds of one run, and when it first was as good as a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrecipes.errors import UserError, nearest
from entrecipes.report.run_folder import RunFolder

HELD_OUT = {"heldout_nats": "nats", "train_nats": "train_nats"}
"""Metrics that stand in the rows of kind `held_out`, and under which key."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run at increasing image counts above zero.

    Args:
        images: Training images seen, [n], n > 0.
        values: The metric there, [n].
        seconds: Seconds of training until there, [n], evaluation excluded; NaN where the run logged none.
        higher_is_better: Direction of improvement.
    """

    images: np.ndarray
    values: np.ndarray
    seconds: np.ndarray
    higher_is_better: bool = False

    @property
    def final(self) -> float:
        """The last value."""
        return float(self.values[-1])

    @property
    def best_index(self) -> int:
        """Where the best value stands."""
        return int(np.argmax(self._gain))

    @property
    def best(self) -> float:
        """The best value."""
        return float(self.values[self.best_index])

    @property
    def _gain(self) -> np.ndarray:
        return self.values if self.higher_is_better else -self.values

    def reach(self, target: float) -> float:
        """Images after which the curve first is as good as `target`; inf when it never is.

        Between two measurements the best value so far moves linearly over log images. A target that the first
        measurement already reaches is reached there: an upper bound, since nothing is known before it.
        """
        best = np.maximum.accumulate(self._gain)
        goal = target if self.higher_is_better else -target
        reached = np.flatnonzero(best >= goal)
        if not len(reached):
            return math.inf
        after = int(reached[0])
        if after == 0:
            return float(self.images[0])
        share = (goal - best[after - 1]) / (best[after] - best[after - 1])
        before, there = np.log(self.images[after - 1]), np.log(self.images[after])
        return float(np.exp(before + share * (there - before)))

    def seconds_at(self, images: float) -> float:
        """Seconds of training until that image count, linear between measurements; inf for inf."""
        if math.isinf(images):
            return math.inf
        return float(np.interp(images, [0, *self.images], [0, *self.seconds]))

    def at(self, point: float, unit: str = "images") -> float:
        """The metric after `point` images (or `seconds`), linear between measurements; NaN before and after them."""
        return float(np.interp(point, getattr(self, unit), self.values, math.nan, math.nan))


def read_curve(folder: RunFolder, metric: str) -> Curve:
    """The curve of a metric from a run's metrics.jsonl.

    Args:
        folder: The run folder.
        metric: `heldout_nats`, `train_nats`, a sample-based metric by its name (`kid_efflite0_500`), or a number of
            the log lines (`loss`, `x0_error`).

    Raises:
        UserError: When the run measured no such thing, naming what it did measure.
    """
    train = folder.metrics("train")
    points, higher = _points(folder, metric, train)
    images = np.array([count for count in points if count > 0], dtype=float)
    values = np.array([points[count] for count in points if count > 0], dtype=float)
    clock = [(row["images"], row["seconds"]) for row in train if row.get("seconds") is not None]
    seconds = np.interp(images, *zip((0, 0.0), *clock, strict=True)) if clock else np.full(len(images), math.nan)
    return Curve(images, values, seconds, higher)


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """The mean over runs at the image counts that all of them measured; None when they share none."""
    shared = sorted(set.intersection(*(set(curve.images) for curve in curves))) if curves else []
    if not shared:
        return None
    columns = [np.searchsorted(curve.images, shared) for curve in curves]
    values = np.mean([curve.values[at] for curve, at in zip(curves, columns, strict=True)], axis=0)
    seconds = np.mean([curve.seconds[at] for curve, at in zip(curves, columns, strict=True)], axis=0)
    return Curve(np.array(shared), values, seconds, curves[0].higher_is_better)


def _points(folder: RunFolder, metric: str, train: list[dict[str, Any]]) -> tuple[dict[int, float], bool]:
    """Values by image count, increasing, and whether higher is better."""
    if metric in HELD_OUT:
        rows, key, higher = folder.metrics("held_out"), HELD_OUT[metric], False
    elif rows := [row for row in folder.metrics("metric") if row["name"] == metric]:
        key, higher = "value", rows[0]["higher_is_better"]
    else:
        rows, key, higher = train, metric, False
    points = {row["images"]: row[key] for row in rows if math.isfinite(row.get(key) or math.nan)}
    if not any(count > 0 for count in points):
        known = [*HELD_OUT, *{row["name"]: 0 for row in folder.metrics("metric")}, "loss", "x0_error"]
        raise UserError(
            f"{folder.path}: no '{metric}' was measured{nearest(metric, known) or '.'} There is {', '.join(known)}"
        )
    return dict(sorted(points.items())), higher
