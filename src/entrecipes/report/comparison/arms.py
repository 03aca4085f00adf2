"""What is compared: arms, each with one run a seed, and what every run measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.errors import UserError
from entrecipes.report import facts
from entrecipes.report.comparison.curve import Curve, read_curve
from entrecipes.report.run_folder import RunFolder

TRAIN_NATS, SECONDS, SPEED, MEMORY = "train_nats", "seconds of training", "images per second", "peak memory (GiB)"
TRAINABLE, PARAMETERS = "trainable parameters", "parameters"
STEP_MEMORY, SAVED, STATE = "step memory (MiB)", "saved activations (MiB)", "gradients and optimizer (MiB)"
"""Numbers of a run that are no metric of run.json; those in MiB are of the step that holds the most."""


@dataclass(frozen=True)
class ArmRun:
    """The run of one arm with one seed.

    Args:
        seed: Its training seed.
        folder: The run folder.
        state: `finished`, `failed` (it diverged or crashed; `message` says how) or `missing` (not run yet).
        message: The last words of a failed run.
        reused: Whether it was finished before the comparison asked for it.
        jobs: Most runs that ran at the same time as it; None where that is not known.
    """

    seed: int
    folder: Path
    state: str = "finished"
    message: str = ""
    reused: bool = False
    jobs: int | None = None

    @property
    def finished(self) -> bool:
        """Whether there are numbers."""
        return self.state == "finished"

    @cached_property
    def source(self) -> RunFolder:
        """The run folder's reader."""
        return RunFolder(self.folder)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        return self.source.run

    @cached_property
    def metrics(self) -> dict[str, facts.Metric]:
        """The final metrics by name."""
        return {metric.name: metric for metric in facts.metrics(self.source)}

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """The rows of the held-out measurements after image 0."""
        return [row for row in self.source.metrics("held_out") if row["images"] > 0]

    @cached_property
    def values(self) -> dict[str, float]:
        """Every final number of the run: its metrics, the nats on training images, seconds, speed, memory, sizes."""
        values = {name: metric.value for name, metric in self.metrics.items()}
        if self.held_out and self.held_out[-1].get(TRAIN_NATS) is not None:
            values[TRAIN_NATS] = self.held_out[-1][TRAIN_NATS]
        keys = {SECONDS: "seconds_training", SPEED: "images_per_second", MEMORY: "peak_memory_gib"}
        keys |= {TRAINABLE: "trainable_parameters", PARAMETERS: "parameters"}
        values |= {name: self.facts[key] for name, key in keys.items() if self.facts.get(key) is not None}
        return values | {name: value / 2**20 for name, value in self._step_bytes().items()}

    def _step_bytes(self) -> dict[str, float]:
        """What the heaviest step held, in bytes; empty where it was not measured."""
        rows = self.source.metrics("costs")
        if not rows:
            return {}
        state = [row["gradient_bytes"] + row["optimizer_bytes"] for row in rows]
        saved = [row["saved_bytes"] for row in rows]
        return {STEP_MEMORY: max(map(sum, zip(saved, state, strict=True))), SAVED: max(saved), STATE: max(state)}

    def curve(self, metric: str) -> Curve:
        """The curve of a metric. Raises `UserError` when the run measured no such thing."""
        return read_curve(self.source, metric)

    def curve_if_any(self, metric: str) -> Curve | None:
        """The curve of a metric, or None."""
        try:
            return self.curve(metric)
        except UserError:
            return None


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: What the report calls it.
        recipe: The recipe that its runs follow, as it was named.
        overrides: Changes to it, `key=value`.
        changes: Dotted keys of the resolved recipe that differ from the baseline's, with both values.
        runs: Its runs by seed.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    changes: tuple[tuple[str, Any, Any], ...] = ()
    runs: dict[int, ArmRun] = field(default_factory=dict)

    @property
    def finished(self) -> dict[int, ArmRun]:
        """The finished runs by seed."""
        return {seed: run for seed, run in self.runs.items() if run.finished}


@dataclass(frozen=True)
class Spread:
    """One number over the seeds; -inf and inf stand for `not reached`.

    Args:
        by_seed: The number by seed.
    """

    by_seed: dict[int, float]

    @property
    def _values(self) -> Sequence[float]:
        return list(self.by_seed.values())

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self._values))

    @property
    def median(self) -> float:
        """Median over seeds; not reached where one of the middle values was not."""
        return float(np.median(self._values))

    @property
    def low(self) -> float:
        """Lowest."""
        return min(self._values)

    @property
    def high(self) -> float:
        """Highest."""
        return max(self._values)

    def __bool__(self) -> bool:
        return bool(self.by_seed)
