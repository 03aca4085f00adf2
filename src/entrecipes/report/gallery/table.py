"""The numbers of several runs beside one another: only what was measured in the same way shares a column."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from entrecipes.evaluation.result import Metric
from entrecipes.recipe.changes import HARMLESS
from entrecipes.report import facts
from entrecipes.report.comparison.arms import Spread
from entrecipes.report.comparison.tables import Table, factors, spread_text
from entrecipes.report.gallery.folder import ComparisonFolder
from entrecipes.report.gallery.run import GalleryRun
from entrecipes.report.plots import short

OF_THE_RUN = ("images", "training_seed")
"""Facts of a metric's origin that tell of the run and not of how it was measured."""

CHANGES = 4
"""Keys of an arm's recipe that its row shows, at most."""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, what it is sorted by (None: last, whichever way), whether it is the best of its column."""

    text: str = ""
    value: float | str | None = None
    best: bool = False


@dataclass
class Column:
    """One metric, measured in one way.

    Args:
        name: The metric's.
        note: How it differs from the other columns of that name; empty where there is none.
        higher_is_better: Its direction.
        found: The metric by run.
    """

    name: str
    note: str
    higher_is_better: bool
    found: dict[str, Metric] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """What it was measured on."""
        return str(next(iter(self.found.values())).origin.get("data") or "")

    @property
    def direction(self) -> str:
        """In words."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"


def columns(runs: Sequence[GalleryRun]) -> list[Column]:
    """The metrics that at least two runs measured (of one run all), a column for each way in which they were measured.

    Two runs' metrics are the same when their names, origins (but for the run's own images and seed) and data agree.
    """
    ways: dict[str, dict[str, Column]] = {}
    origins: dict[str, dict[str, dict[str, str]]] = {}
    for run in runs:
        for metric in run.metrics:
            origin = _way(run, metric)
            key = json.dumps(origin, sort_keys=True)
            origins.setdefault(metric.name, {})[key] = origin
            column = Column(metric.name, "", metric.higher_is_better)
            ways.setdefault(metric.name, {}).setdefault(key, column).found[run.id] = metric
    shown = []
    for name, found in ways.items():
        if len(runs) > 1 and sum(len(column.found) for column in found.values()) < 2:
            continue
        for key, column in found.items():
            column.note = _difference(origins[name][key], list(origins[name].values()))
            shown.append(column)
    return sorted(shown, key=lambda column: len(column.found) < 2)  # those that compare come first


def summary(runs: Sequence[GalleryRun], shown: Sequence[Column]) -> dict[str, list[Cell]]:
    """For each run the cells of images, speed, memory and parameters, then of the metrics' columns."""
    best = {id(column): _best(column, runs) for column in shown}
    table = {}
    for run in runs:
        known = [run.folder.images, run.number("images_per_second"), run.number("peak_memory_gib")]
        texts = ("{:,}".format, facts.number, facts.number)
        cells = [
            Cell() if value is None else Cell(text(value), value) for text, value in zip(texts, known, strict=True)
        ]
        cells.append(_parameters(run.number("trainable_parameters"), run.number("parameters")))
        for column in shown:
            metric = column.found.get(run.id)
            is_best = run.id in best[id(column)]
            cells.append(Cell(facts.value(metric), metric.value, is_best) if metric else Cell())
        table[run.id] = cells
    return table


def comparison_table(comparison: ComparisonFolder) -> Table | None:
    """A row an arm: how many times fewer images and seconds it needs, and every final number; None without a record."""
    record = comparison.record
    if not record:
        return None
    names = dict.fromkeys(name for arm in record["arms"].values() for name in arm.get("values", {}))
    header = ["arm", "differs from the baseline", "fewer images", "fewer seconds", *names]
    rows = []
    for name, arm in record["arms"].items():
        baseline = name == record["baseline"]
        times = [_times(arm.get(key)) for key in ("speedup_images", "speedup_seconds")]
        differing = [f"{key} {of['arm']}" for key, of in arm.get("differs_in", {}).items() if of["arm"] is not None]
        changes = "; ".join(differing[:CHANGES]) + f"; {len(differing) - CHANGES} more" * (len(differing) > CHANGES)
        values = [_spread(arm.get("values", {}).get(key)) for key in names]
        finals = [spread_text(spread) if spread else "" for spread in values]
        rows.append([name, "baseline" if baseline else changes, *([""] * 2 if baseline else times), *finals])
    seeds = len(record.get("seeds", []))
    over = f"Means over {seeds} {'seed' if seeds == 1 else 'seeds'} (lowest to highest)"
    return Table(f"{over}; speed-ups to the baseline's final {record['metric']} as medians", header, rows)


def _way(run: GalleryRun, metric: Metric) -> dict[str, str]:
    """How a metric was measured: its origin, and the data section of the recipe as far as it decides anything."""
    data = run.recipe.get("data") or {}
    told = {f"data.{key}": value for key, value in data.items() if f"data.{key}" not in HARMLESS}
    told |= {key.replace("_", " "): value for key, value in metric.origin.items() if key not in OF_THE_RUN}
    return {key: str(value) for key, value in told.items() if value is not None}


def _difference(origin: dict[str, str], others: list[dict[str, str]]) -> str:
    """In words, the fewest facts that tell a way of measuring from the others of that name, its data first."""
    keys = dict.fromkeys(key for other in others for key in other)
    differing = [key for key in keys if len({other.get(key) for other in others}) > 1]
    told: list[str] = []
    for key in sorted(differing, key=lambda key: (key != "data", key.startswith("data."))):
        name = key.removeprefix("data.")
        told.append(f"no {name}" if key not in origin else origin[key] if key == "data" else f"{name} {origin[key]}")
        others = [other for other in others if other.get(key) == origin.get(key)]
        if len(others) == 1:
            break
    return ", ".join(told)


def _best(column: Column, runs: Sequence[GalleryRun]) -> set[str]:
    """The finished runs with the best value, where at least two finished runs share the column."""
    finished = {run.id for run in runs if run.finished}
    values = {run: metric.value for run, metric in column.found.items() if run in finished}
    if len(values) < 2:
        return set()
    best = (max if column.higher_is_better else min)(values.values())
    return {run for run, value in values.items() if value == best}


def _spread(record: dict[str, Any] | None) -> Spread:
    """The numbers of comparison.json; null stands for `not reached`."""
    by_seed = (record or {}).get("by_seed") or {}
    return Spread({int(seed): -math.inf if value is None else value for seed, value in by_seed.items()})


def _times(record: dict[str, Any] | None) -> str:
    spread = _spread(record)
    return factors(spread) if spread else ""


def _parameters(trained: float | None, total: float | None) -> Cell:
    """`12k / 1.23M`, trained and all; one number where all are trained."""
    if total is None:
        return Cell()
    counts = [short(float(f"{count:.3g}")) for count in (trained, total) if count is not None]
    return Cell(" / ".join(dict.fromkeys(counts)), total)
