"""A comparison in words and tables: the same for the terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from entrecipes.report.comparison.arms import (
    MEMORY,
    PARAMETERS,
    SAVED,
    SECONDS,
    SPEED,
    STATE,
    STEP_MEMORY,
    TRAIN_NATS,
    TRAINABLE,
    Spread,
)
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.report.comparison.equal import Reading, readings
from entrecipes.report.facts import number

NOT_REACHED = "not reached"
COSTS = (SECONDS, SPEED, MEMORY, TRAINABLE, PARAMETERS)
STEP = (STEP_MEMORY, SAVED, STATE)


@dataclass(frozen=True)
class Table:
    """A title, a header, and rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def to_text(self) -> str:
        """Aligned with spaces, for a terminal."""
        cells = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines)])

    def to_markdown(self) -> str:
        """A table as GitHub draws it."""
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def tables(comparison: Comparison) -> list[Table]:
    """The speed-ups, the compared metric, every other final number, what can be read on equal terms, the costs."""
    if not comparison.others:
        return [_only(comparison)]
    numbers = [_number(comparison, name) for name in _others(comparison)]
    equal = [_equal(comparison, reading) for reading in readings(comparison)]
    found = [_speedups(comparison), _otherwise(comparison), _metric(comparison), *numbers, *equal, _costs(comparison)]
    return found + ([_step_memory(comparison)] if STEP_MEMORY in comparison.value_names else [])


def headlines(comparison: Comparison) -> list[str]:
    """One sentence for each arm, the fastest first: how many times fewer images and seconds it needs."""
    arms = [arm for arm in comparison.others if comparison.speedup(arm)]
    return [_headline(comparison, arm) for arm in sorted(arms, key=lambda arm: -comparison.speedup(arm).median)]


def better(comparison: Comparison, name: str) -> bool | None:
    """Whether higher is better for a final number; None when it is neither."""
    known = {
        TRAIN_NATS: False,
        SECONDS: False,
        MEMORY: False,
        **dict.fromkeys(STEP, False),
        SPEED: True,
        comparison.metric: comparison.higher_is_better,
    }
    found = (run.metrics[name].higher_is_better for run in comparison.runs if run.finished and name in run.metrics)
    return next(found, known.get(name))


def factor(value: float | None) -> str:
    """`1.43x`."""
    if value is None or math.isnan(value):
        return "-"
    return NOT_REACHED if math.isinf(value) else f"{value:.2f}x"


def factors(spread: Spread) -> str:
    """The median and, of several seeds, the lowest and highest: `1.43x (1.31 to 1.52)`."""
    if not spread:
        return "-"
    text = factor(spread.median)
    if len(spread.by_seed) == 1 or math.isinf(spread.high):
        return text
    low = "not reached" if math.isinf(spread.low) else f"{spread.low:.2f}"
    return f"{text} ({low} to {spread.high:.2f})"


def spread_text(spread: Spread) -> str:
    """The mean and, of several seeds, the lowest and highest: `24.86 (24.75 to 24.97)`."""
    if not spread:
        return "-"
    mean, low, high = (number(value) for value in (spread.mean, spread.low, spread.high))
    return mean if low == high else f"{mean} ({low} to {high})"


def count_text(spread: Spread, shown: Callable[[float], str] = number) -> str:
    """The median of image counts or seconds with the lowest and highest; some may be `not reached`."""
    if not spread:
        return "-"
    values = spread.median, spread.low, spread.high
    median, low, high = (NOT_REACHED if math.isinf(value) else shown(value) for value in values)
    return median if low == high else f"{median} ({low} to {high})"


def difference_text(spread: Spread) -> str:
    """The mean of paired differences with the lowest and highest, signed."""
    if not spread:
        return "-"
    mean, low, high = (f"{value:+.3g}" for value in (spread.mean, spread.low, spread.high))
    return mean if low == high else f"{mean} ({low} to {high})"


def target_text(comparison: Comparison) -> str:
    """What has to be reached, in words."""
    if comparison.fixed_target is not None:
        return f"{comparison.metric} of {number(comparison.fixed_target)}"
    finals = comparison.final(comparison.baseline)
    return f"{comparison.baseline}'s final {comparison.metric} ({number(finals.mean) if finals else 'not measured'})"


def seeds_text(comparison: Comparison) -> str:
    """`seeds 0, 1, 2`."""
    return f"seed{'s' * (len(comparison.seeds) > 1)} {', '.join(map(str, comparison.seeds))}"


def _others(comparison: Comparison) -> list[str]:
    """The final numbers with a table of their own."""
    return [name for name in comparison.value_names if name not in (comparison.metric, TRAIN_NATS, *COSTS, *STEP)]


def _direction(comparison: Comparison, name: str) -> str:
    higher = better(comparison, name)
    return "" if higher is None else f" ({'higher' if higher else 'lower'} is better)"


def _ended(comparison: Comparison) -> str:
    """The end of a title: what the runs had in common when they ended."""
    equal = f" at equal seconds: {comparison.budget.seconds:g} of training each" if comparison.budget else ""
    return f"{equal}; mean (lowest to highest)" if equal else ": mean (lowest to highest)"


def _speedups(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms:
        ratios = [factors(comparison.speedup(arm)), factors(comparison.speedup(arm, "seconds"))]
        ratios = ratios if arm != comparison.baseline else ["baseline", "baseline"]
        counts = [
            count_text(comparison.images_to_target(arm), "{:,.0f}".format),
            count_text(comparison.seconds_to_target(arm)),
        ]
        rows.append([arm, *ratios, *counts])
    title = f"To reach {target_text(comparison)}: median (lowest to highest) over {seeds_text(comparison)}"
    return Table(title, ["arm", "fewer images", "fewer seconds", "images", "seconds"], rows)


def _otherwise(comparison: Comparison) -> Table:
    """Other ways to count the same images."""
    rows = []
    for arm in comparison.arms:
        relative = [factor(comparison.mean_speedup(arm)), factors(comparison.reverse(arm))]
        relative = relative if arm != comparison.baseline else ["baseline", "baseline"]
        rows.append([arm, relative[0], factors(comparison.budget_ratio(arm)), relative[1]])
    base = comparison.baseline
    header = ["arm", "of the mean curves", f"than {base}'s whole budget", f"{base} to the arm's best"]
    return Table("Fewer images, counted otherwise", header, rows)


def _metric(comparison: Comparison) -> Table:
    rows, base = [], comparison.baseline
    for arm in comparison.arms:
        final, best = comparison.final(arm), comparison.best(arm)
        gap = comparison.paired(final, comparison.final(base))
        texts = [difference_text(gap), _wins(gap, comparison.higher_is_better)]
        texts += [difference_text(comparison.paired(best, comparison.best(base)))]
        rows.append(
            [arm, spread_text(final), spread_text(best), *(texts if arm != base else ["baseline", "", "baseline"])]
        )
        rows[-1] += [spread_text(comparison.values(arm, TRAIN_NATS))] if _beside_training(comparison) else []
    header = ["arm", "final", "best", "final - baseline", "better", "best - baseline"]
    header += ["final on training images"] if _beside_training(comparison) else []
    title = f"{comparison.metric}{_direction(comparison, comparison.metric)}{_ended(comparison)}"
    return Table(title, header, rows)


def _beside_training(comparison: Comparison) -> bool:
    return comparison.metric == "heldout_nats" and TRAIN_NATS in comparison.value_names


def _number(comparison: Comparison, name: str) -> Table:
    rows, base = [], comparison.values(comparison.baseline, name)
    for arm in comparison.arms:
        own = comparison.values(arm, name)
        gap = comparison.paired(own, base)
        texts = [difference_text(gap), _wins(gap, better(comparison, name))]
        rows.append([arm, spread_text(own), *(texts if arm != comparison.baseline else ["baseline", ""])])
    title = f"{name}{_direction(comparison, name)}{_ended(comparison)}"
    return Table(title, ["arm", "final", "final - baseline", "better"], rows)


def _equal(comparison: Comparison, reading: Reading) -> Table:
    """What all arms had measured by the same image count, or after the same seconds."""
    header = ["arm", *(f"{name}{_direction(comparison, name)}" for name in reading.values)]
    rows = [[arm, *(spread_text(spreads[arm]) for spreads in reading.values.values())] for arm in comparison.arms]
    point = f"{reading.point:,.0f} images" if reading.unit == "images" else f"{number(reading.point)} s of training"
    title = f"At equal {reading.unit}: after {point} of each arm, linear between two measurements"
    return Table(f"{title}; mean (lowest to highest)", header, rows)


def _costs(comparison: Comparison) -> Table:
    """What the runs took, in all."""
    rows = [
        [arm, *(spread_text(comparison.values(arm, name)) for name in COSTS), _times_less(comparison, arm, SECONDS)]
        for arm in comparison.arms
    ]
    return Table("The whole run: mean (lowest to highest)", ["arm", *COSTS, "fewer seconds for its images"], rows)


def _step_memory(comparison: Comparison) -> Table:
    """What the heaviest training step held, beside the weights."""
    rows = [
        [arm, *(spread_text(comparison.values(arm, name)) for name in STEP), _times_less(comparison, arm, STEP_MEMORY)]
        for arm in comparison.arms
    ]
    return Table("The heaviest step, beside the weights: mean (lowest to highest)", ["arm", *STEP, "less memory"], rows)


def _times_less(comparison: Comparison, arm: str, name: str) -> str:
    """How many times less of a cost an arm took than the baseline, seed by seed."""
    if arm == comparison.baseline:
        return "baseline"
    own, base = comparison.values(arm, name).by_seed, comparison.values(comparison.baseline, name).by_seed
    return factors(Spread({seed: base[seed] / own[seed] for seed in own if seed in base}))


def _only(comparison: Comparison) -> Table:
    """Of a single arm: every number with its spread."""
    arm = comparison.baseline
    numbers = {f"best {comparison.metric}": comparison.best(arm)}
    numbers = {name: comparison.values(arm, name) for name in comparison.value_names} | numbers
    rows = [
        [name, number(spread.mean), f"{number(spread.low)} to {number(spread.high)}"]
        for name, spread in numbers.items()
        if spread
    ]
    return Table(f"{arm}, {seeds_text(comparison)}", ["number", "mean", "lowest to highest"], rows)


def _wins(gap: Spread, higher: bool | None) -> str:
    """In how many seeds the arm is better than the baseline."""
    if not gap or higher is None:
        return ""
    wins = sum(value > 0 if higher else value < 0 for value in gap.by_seed.values())
    return f"in {wins} of {len(gap.by_seed)}"


def _headline(comparison: Comparison, arm: str) -> str:
    images, seconds = comparison.speedup(arm), comparison.speedup(arm, "seconds")
    count = len(images.by_seed)
    seeds = f"median of {count} seeds" if count > 1 else "one seed"
    goal = target_text(comparison)
    if math.isinf(images.median):
        reached = sum(map(math.isfinite, images.by_seed.values()))
        text = f"{arm} does not reach {goal} ({reached} of {count} seeds do)"
        other = comparison.reverse(arm)
        known = other and math.isfinite(other.median)
        return text + (
            f"; {comparison.baseline} is as good as its best with {_times(other, 'images')}" if known else ""
        )
    needs = f"{_times(images, 'images')} and {_times(seconds, 'seconds')}"
    return f"{arm} reaches {goal} with {needs} of training ({seeds})"


def _times(spread: Spread, unit: str) -> str:
    """`1.43x fewer images (1.31 to 1.52)`; below one `1.20x more images`."""
    middle, low, high = spread.median, spread.low, spread.high
    if math.isnan(middle):
        return f"an unknown number of {unit}"
    word = "fewer"
    if middle < 1:
        word, middle, low, high = "more", 1 / middle, 1 / high, 1 / low
    ends = " to ".join(NOT_REACHED if math.isinf(end) or end <= 0 else f"{end:.2f}" for end in (low, high))
    return f"{middle:.2f}x {word} {unit}" + (f" ({ends})" if len(spread.by_seed) > 1 else "")
