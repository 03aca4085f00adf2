"""The metrics of all arms at one image count, or after as many seconds, where their runs did not all end there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from entrecipes.report.comparison.arms import ArmRun, Spread
from entrecipes.report.comparison.comparison import Comparison


@dataclass(frozen=True)
class Reading:
    """Every metric that was measured along the way, read at one point of all runs.

    Args:
        unit: `images` or `seconds` (of training, evaluation excluded).
        point: How many: the most that every finished run has reached.
        values: By metric and arm; seeds that measured nothing before the point or nothing after it are left out.
    """

    unit: str
    point: float
    values: dict[str, dict[str, Spread]]


def readings(comparison: Comparison) -> list[Reading]:
    """At equal images where arms saw different counts, else at equal seconds; none without two arms to be read."""
    runs = [run for run in comparison.runs if run.finished]
    unit = "images" if len({run.facts["images"] for run in runs}) > 1 else "seconds"
    ends = [getattr(curve, unit)[-1] for curves in comparison.curves.values() for curve in curves.values()]
    if not ends or not math.isfinite(min(ends)):
        return []
    point = float(min(ends))
    names = dict.fromkeys((comparison.metric, "heldout_nats"))
    names |= dict.fromkeys(row["name"] for run in runs for row in run.source.metrics("metric"))
    values = {name: {arm: _read(comparison, arm, name, unit, point) for arm in comparison.arms} for name in names}
    told = {name: spreads for name, spreads in values.items() if sum(map(bool, spreads.values())) > 1}
    return [Reading(unit, point, told)] if told else []


def _read(comparison: Comparison, arm: str, metric: str, unit: str, point: float) -> Spread:
    read = {seed: _value(run, metric, unit, point) for seed, run in comparison.arms[arm].finished.items()}
    return Spread({seed: value for seed, value in read.items() if math.isfinite(value)})


def _value(run: ArmRun, metric: str, unit: str, point: float) -> float:
    curve = run.curve_if_any(metric)
    return curve.at(point, unit) if curve else math.nan
