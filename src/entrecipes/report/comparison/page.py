"""What a comparison leaves: comparison.json, report.md, report.html and the plots."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from entrecipes.evaluation.result import Metric
from entrecipes.recipe.load import display
from entrecipes.report.comparison.arms import Arm, Spread
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.report.comparison.curve import Curve
from entrecipes.report.comparison.equal import Reading, readings
from entrecipes.report.comparison.notes import notes
from entrecipes.report.comparison.plots import draw_comparison
from entrecipes.report.comparison.tables import headlines, seeds_text, tables
from entrecipes.report.facts import origins
from entrecipes.report.report import embedded, template

PLOTS = {
    "speedup": "How many times fewer images and seconds each arm needs to the target; hollow: to the arm's own best "
    "value, where it does not reach the target",
    "quality_images": "Quality against images seen; the dotted line is the target",
    "quality_seconds": "Quality against seconds of training, evaluation excluded",
    "difference": "Difference to the baseline with the same seed",
    "train_held_out": "Nats of held-out and of training images",
}
"""What each plot shows, in the order of the report."""


def write_comparison(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write the report into the folder.

    Returns:
        `json`, `md`, `html` and the plots by name, with their paths.

    Raises:
        UserError: When a finished run lacks the compared metric, or a file of it is damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"json": folder / "comparison.json", "md": folder / "report.md", "html": folder / "report.html"}
    paths["json"].write_text(_compact(to_json(comparison)) + "\n", encoding="utf-8")
    drawn = draw_comparison(comparison, folder)
    plots = {name: (text, drawn[name]) for name, text in PLOTS.items() if name in drawn}
    shown = {
        "comparison": comparison,
        "headlines": headlines(comparison),
        "tables": tables(comparison),
        "notes": notes(comparison),
        "seeds": seeds_text(comparison),
        "arms": [(arm, _described(comparison, arm)) for arm in comparison.arms.values()],
        "origins": origins(_metrics(comparison)),
        "facts": _facts(comparison),
    }
    links = {name: (text, path.name) for name, (text, path) in plots.items()}
    paths["md"].write_text(template("comparison/report.md.jinja").render(**shown, plots=links), encoding="utf-8")
    pictures = {name: (text, embedded(path)) for name, (text, path) in plots.items()}
    paths["html"].write_text(template("comparison/report.html.jinja").render(**shown, plots=pictures), encoding="utf-8")
    return paths | drawn


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, rounded to six digits; null stands for `not reached`."""
    return _rounded(
        {
            "name": comparison.name,
            "metric": comparison.metric,
            "higher_is_better": comparison.higher_is_better,
            "baseline": comparison.baseline,
            "seeds": list(comparison.seeds),
            "fixed_target": comparison.fixed_target,
            "targets": comparison.targets,
            "unequal": list(comparison.unequal),
            "budget": asdict(comparison.budget) if comparison.budget else None,
            "bases": [asdict(base) for base in comparison.bases],
            "command": comparison.command,
            "facts": _facts(comparison),
            "arms": {name: _arm(comparison, arm) for name, arm in comparison.arms.items()},
            "equal": [_reading(reading) for reading in readings(comparison)] if comparison.others else [],
            "origins": {metric.name: metric.origin for metric in _metrics(comparison)},
            "notes": notes(comparison),
        }
    )


def _arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    name, base = arm.name, comparison.baseline
    finals, bests = comparison.final(name), comparison.best(name)
    record = {
        "recipe": arm.recipe,
        "overrides": list(arm.overrides),
        "differs_in": {key: {"baseline": theirs, "arm": ours} for key, theirs, ours in arm.changes},
        "images_to_target": _spread(comparison.images_to_target(name)),
        "seconds_to_target": _spread(comparison.seconds_to_target(name)),
        "speedup_images": _spread(comparison.speedup(name)),
        "speedup_seconds": _spread(comparison.speedup(name, "seconds")),
        "speedup_images_of_mean_curves": comparison.mean_speedup(name),
        "speedup_seconds_of_mean_curves": comparison.mean_speedup(name, "seconds"),
        "budget_over_images": _spread(comparison.budget_ratio(name)),
        "reverse_images": _spread(comparison.reverse(name)),
        "final": _spread(finals),
        "best": _spread(bests),
        "final_minus_baseline": _spread(comparison.paired(finals, comparison.final(base))),
        "best_minus_baseline": _spread(comparison.paired(bests, comparison.best(base))),
        "values": {key: _spread(comparison.values(name, key)) for key in comparison.value_names},
    }
    runs = {}
    for seed, run in arm.runs.items():
        runs[seed] = {"state": run.state, "folder": display(run.folder.resolve()), "jobs": run.jobs}
        if run.finished:
            curve, train = comparison.curves[name][seed], run.curve_if_any("train_nats")
            runs[seed] |= {"images": curve.images, comparison.metric: curve.values, "seconds": curve.seconds}
            runs[seed] |= {"train_nats": train.values} if _beside(train, curve) else {}
        else:
            runs[seed]["message"] = run.message
    return record | {"runs": runs}


def _beside(train: Curve | None, curve: Curve) -> bool:
    return train is not None and list(train.images) == list(curve.images)


def _spread(spread: Spread) -> dict[str, Any] | None:
    if not spread:
        return None
    numbers = {"mean": spread.mean, "median": spread.median, "low": spread.low, "high": spread.high}
    return numbers | {"by_seed": spread.by_seed}


def _reading(reading: Reading) -> dict[str, Any]:
    values = {name: {arm: _spread(each) for arm, each in arms.items()} for name, arms in reading.values.items()}
    return {"unit": reading.unit, "point": reading.point, "values": values}


def _facts(comparison: Comparison) -> dict[str, Any]:
    """What the runs share: budget, data, device, versions; all that there are where they differ."""
    runs = [run.facts for run in comparison.runs if run.finished]
    keys = ("images", "batch_size", "device", "precision", "parameters", "world_size")
    found = {key: [run.get(key) for run in runs] for key in keys} | {"data": [run["data"]["name"] for run in runs]}
    packages = dict.fromkeys(package for run in runs for package in run["versions"])
    versions = {package: _one([run["versions"].get(package) for run in runs]) for package in packages}
    return {key: _one(values) for key, values in found.items()} | {"versions": versions}


def _one(values: list, separator: str = ", ") -> Any:
    """The value that all share, or the different ones in words."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else separator.join(map(str, different))


def _metrics(comparison: Comparison) -> list[Metric]:
    """One of each metric for its origin; where runs differ in it (their seeds), all that there are."""
    found: dict[str, list[Metric]] = {}
    for run in comparison.runs:
        for name, metric in run.metrics.items() if run.finished else ():
            found.setdefault(name, []).append(metric)
    shared = {
        name: {key: _one([each.origin.get(key) for each in metrics], " / ") for key in metrics[0].origin}
        for name, metrics in found.items()
    }
    return [replace(metrics[0], origin=shared[name]) for name, metrics in found.items()]


def _described(comparison: Comparison, arm: Arm) -> str:
    """What makes an arm: its recipe, and where it differs from the baseline."""
    if not arm.changes:
        return "" if arm.name == comparison.baseline else "the same recipe as the baseline"
    return "; ".join(f"{key}: {theirs} -> {ours}" for key, theirs, ours in arm.changes)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.6g}")
        return int(value) if value.is_integer() else value
    return value


def _compact(record: dict[str, Any]) -> str:
    """JSON of few lines: a list or mapping that holds no other takes one."""
    text = json.dumps(record, indent=1)
    return re.sub(r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])", lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text)
