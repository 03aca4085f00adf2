"""What a reader of a comparison must know beside its numbers, found in the runs themselves."""

from __future__ import annotations

from collections.abc import Iterator

from entrecipes.report.comparison.arms import SECONDS, TRAIN_NATS
from entrecipes.report.comparison.comparison import Comparison

FEW_POINTS = 4
OFF = 0.1
"""Share of its seconds by which an arm may miss them and nothing is said."""
RISE = 0.01
"""Share of the best held-out nats by which the final ones must lie above it to be called a rise."""


def notes(comparison: Comparison) -> list[str]:
    """Sentences, the gravest first: failed runs, unequal conditions, bases, overfitting, coarse curves, the clock."""
    found = (_failed, _unequal, _budget, _bases, _bundles, _overfitting, _coarse, _clock)
    return [sentence for find in found for sentence in find(comparison)]


def overfitting_seeds(comparison: Comparison, arm: str) -> list[int]:
    """Seeds whose held-out nats ended more than 1 % above their best while the nats on training images fell."""
    seeds = []
    for seed, run in comparison.arms[arm].finished.items():
        rows = [row for row in run.held_out if row.get(TRAIN_NATS) is not None and row.get("split") != "train"]
        if rows:
            best, last = min(rows, key=lambda row: row["nats"]), rows[-1]
            rose = last["nats"] > best["nats"] + RISE * abs(best["nats"])
            seeds += [seed] if rose and last[TRAIN_NATS] < best[TRAIN_NATS] else []
    return seeds


def _failed(comparison: Comparison) -> Iterator[str]:
    for name, arm in comparison.arms.items():
        for run in arm.runs.values():
            if run.state == "failed":
                yield (
                    f"{name}, seed {run.seed}, failed and counts as not having reached the target; its means leave it "
                    f"out: {run.message.rstrip('.')}"
                )
            elif run.state == "missing":
                yield f"{name}, seed {run.seed}, has not run yet"


def _unequal(comparison: Comparison) -> Iterator[str]:
    if comparison.unequal:
        yield f"NOT AN EQUAL COMPARISON (--unequal): the arms differ in {', '.join(comparison.unequal)}"


def _budget(comparison: Comparison) -> Iterator[str]:
    """Where arms got the same seconds: how that was timed, and how far the runs were from it."""
    if not (budget := comparison.budget):
        return
    speeds = ", ".join(f"{name} {timed.images_per_second:.4g}" for name, timed in budget.arms.items())
    jobs = sorted({timed.jobs for timed in budget.arms.values()})
    yield (
        f"equal in seconds: {budget.seconds:g} of training each; the images follow from speeds that were timed before "
        f"the first run, {' and '.join(map(str, jobs))} at a time, in images/second: {speeds}"
    )
    for name, timed in budget.arms.items():
        if timed.begins:
            yield f"{name} was timed at its beginning only, and its speed may change: {timed.begins}"
        took = comparison.values(name, SECONDS)
        if took and abs(took.mean / budget.seconds - 1) > OFF:
            yield f"{name} took {took.mean:.4g} seconds, not the {budget.seconds:g} that all were to get"


def _bases(comparison: Comparison) -> Iterator[str]:
    for base in comparison.bases:
        start = f"{', '.join(base.arms)} start{'s' * (len(base.arms) == 1)} from {base.folder}"
        if base.seconds is None:
            yield f"{start}, which is not trained yet"
            continue
        yield (
            f"{start}, the run of {base.recipe}: {base.images:,} images and {base.seconds:,.0f} seconds of training "
            "before, which no number here counts"
        )
        if base.changed:
            yield f"{base.folder} was trained with another recipe than {base.recipe} is now: {', '.join(base.changed)}"


def _bundles(comparison: Comparison) -> Iterator[str]:
    """Whether all nats were measured on the same levels and images."""
    grids: dict[tuple, list[str]] = {}
    for name, arm in comparison.arms.items():
        for run in arm.finished.values():
            if run.held_out and "log_sigma" in run.held_out[-1]:
                grid = run.held_out[-1]["log_sigma"]
                grids.setdefault((round(grid[0], 3), round(grid[-1], 3), len(grid)), []).append(name)
    if len(grids) > 1:
        texts = [
            f"{', '.join(dict.fromkeys(names))}: {count} levels from log sigma {low:g} to {high:g}"
            for (low, high, count), names in grids.items()
        ]
        yield f"the held-out nats were not measured over the same noise levels ({'; '.join(texts)})"
    if any(row.get("split") == "train" for run in comparison.runs if run.finished for row in run.held_out):
        yield "no images were held out: these nats are of training images and can't show overfitting"


def _overfitting(comparison: Comparison) -> Iterator[str]:
    for name, arm in comparison.arms.items():
        if seeds := overfitting_seeds(comparison, name):
            yield (
                f"{name} overfits in {len(seeds)} of {len(arm.finished)} seeds: the held-out nats end more than "
                f"{RISE:.0%} above their best while those of training images fall. Compare the best values too"
            )


def _coarse(comparison: Comparison) -> Iterator[str]:
    fewest = min((len(curve.images) for curves in comparison.curves.values() for curve in curves.values()), default=0)
    if comparison.others and 0 < fewest < FEW_POINTS:
        yield (
            f"the coarsest curve has {fewest} point{'s' * (fewest > 1)}: speed-ups between so few are rough; set "
            "evaluation.every (or metrics_every) for more"
        )
    for name in comparison.others:
        curves, needed = comparison.curves[name], comparison.images_to_target(name).by_seed
        if at_once := [seed for seed, curve in curves.items() if needed.get(seed) == curve.images[0]]:
            seeds = f"{len(at_once)} of {len(curves)} seeds"
            yield f"{name} is past the target at its first measurement in {seeds}: its speed-up is a lower bound"


def _clock(comparison: Comparison) -> Iterator[str]:
    finished = [run for run in comparison.runs if run.finished]
    if not finished:
        return
    devices = list(dict.fromkeys(run.facts.get("device", "unknown") for run in finished))
    jobs = {run.jobs for run in finished}
    known = [number for number in jobs if number]
    beside = f"up to {max(known)} run{'s' * (max(known) > 1)} at a time" if known else ""
    if None in jobs:
        beside += f"{'; ' if beside else ''}of some runs it is not known what ran beside them"
    yield (
        "seconds are of training, scores and votes of pruning among it, evaluation excluded, on "
        f"{' and '.join(devices)}, {beside}; whatever else the "
        "machine did is in them" + (". Different devices: compare images, not seconds" if len(devices) > 1 else "")
    )
    versions = {tuple(run.facts["versions"].items()) for run in finished}
    if len(versions) > 1:
        packages = [name for name in dict(next(iter(versions))) if len({dict(each).get(name) for each in versions}) > 1]
        yield f"the runs were made with different versions of {', '.join(packages)}"
