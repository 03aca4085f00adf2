"""Finished run folders whose curves fall linearly over log images, so that every crossing is known exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from report_case import RUN

from entrecipes.report.comparison.arms import Arm, ArmRun
from entrecipes.report.comparison.comparison import Comparison

BUDGET = 100_000
IMAGES = [round(100 * 10 ** (power / 4)) for power in range(13)]
"""Where the runs measured: from 100 images to the budget, four times a decade."""
SECONDS_PER_IMAGE = 0.001


def falling(slope: float, start: float = 100.0) -> Callable[[float], float]:
    """start - slope * ln(images): it reaches a value v at exp((start - v) / slope)."""
    return lambda images: start - slope * math.log(images)


def write_run(
    folder: Path,
    seed: int,
    nats: Callable[[float], float],
    train: Callable[[float], float] | None = None,
    seconds_per_image: float = SECONDS_PER_IMAGE,
    higher: Callable[[float], float] | None = None,
    measured: Sequence[int] = IMAGES,
    **facts: Any,
) -> ArmRun:
    """A run that measured at these image counts, the last of which is its budget, and logged its clock at quarters."""
    folder.mkdir(parents=True)
    budget = measured[-1]
    rows: list[dict[str, Any]] = [{"kind": "held_out", "images": 0, "nats": 1e6, "split": "held_out"}]
    for quarter in range(1, 5):
        images = budget * quarter // 4
        rows.append({"kind": "train", "images": images, "loss": 1 / images, "seconds": images * seconds_per_image})
    for images in measured:
        row = {"kind": "held_out", "images": images, "nats": nats(images), "split": "held_out", "log_sigma": [-3, 3]}
        rows.append(row | {"train_nats": (train or nats)(images)})
        if higher:
            rows.append(metric_row("precision_x_10", higher(images), seed, True) | {"kind": "metric", "images": images})
    metrics = [metric_row("heldout_nats", nats(budget), seed, False)]
    metrics += [metric_row("precision_x_10", higher(budget), seed, True)] if higher else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"images": budget, "seed": seed, "seconds_training": budget * seconds_per_image, "metrics": metrics}
    (folder / "run.json").write_text(json.dumps(RUN | own | facts))
    return ArmRun(seed, folder, jobs=1)


def metric_row(name: str, value: float, seed: int, higher: bool) -> dict[str, Any]:
    """A metric as run.json and metrics.jsonl hold it."""
    origin = {"training_seed": seed, "samples": 10}
    return {"name": name, "value": value, "spread": None, "origin": origin, "higher_is_better": higher}


def comparison(arms: dict[str, dict[int, ArmRun]], **changes: Any) -> Comparison:
    """A comparison of these runs; the first arm is the baseline."""
    first = next(iter(arms))
    changed = (("noise.type", "log_normal", "uniform"),)
    made = {name: Arm(name, "tiny", (), () if name == first else changed, runs) for name, runs in arms.items()}
    seeds = tuple(sorted({seed for runs in arms.values() for seed in runs}))
    return Comparison(
        **{"name": "a <case>", "metric": "heldout_nats", "arms": made, "baseline": first, "seeds": seeds, **changes}
    )
