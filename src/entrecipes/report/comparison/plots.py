"""The pictures of a comparison, legible at the width of a phone and without colour vision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.report.comparison.arms import TRAIN_NATS, Spread
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.report.comparison.curve import Curve
from entrecipes.report.plots import BLUE, INK, MUTED, ORANGE, STYLE, log_scale_where_wide, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#999933", "#44aa99")
"""Okabe & Ito's palette without its yellow, then three of Tol's: told apart under any colour blindness."""
DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), "-")
MARKERS = "osD^vP*X<>"
UNITS = {"images": (BLUE, "o", -0.17), "seconds": (ORANGE, "D", 0.17)}
"""Colour, marker and offset of the speed-ups in images and in seconds."""


def draw_comparison(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw into the folder; returns `{name: path}`."""
    plots: dict[str, tuple[Callable[[Figure, Comparison], None], float]] = {}
    rows = math.ceil(len(comparison.arms) / 3)  # of the legend
    if any(len(curve.images) > 1 for curves in comparison.curves.values() for curve in curves.values()):
        plots["quality_images"] = quality_against_images, 3.3 + 0.22 * rows
        plots["quality_seconds"] = quality_against_seconds, 3.3 + 0.22 * rows
        if comparison.others:
            plots["difference"] = differences, 2.9 + 0.22 * rows
    if any(comparison.speedup(arm) for arm in comparison.others):
        plots["speedup"] = speedups, 1.15 + 0.42 * len(comparison.others)
    if _train_curves(comparison):
        plots["train_held_out"] = train_and_held_out, 0.7 + 1.45 * math.ceil(len(comparison.arms) / 2)
    return {name: _draw(folder / f"{name}.png", *plot, comparison) for name, plot in plots.items()}


def quality_against_images(figure: Figure, comparison: Comparison) -> None:
    """The metric against images seen: the median over seeds, from the lowest to the highest."""
    axes = figure.subplots()
    _quality(axes, comparison, lambda curve: curve.images)
    _images_axis(axes)
    _legend(figure, axes)


def quality_against_seconds(figure: Figure, comparison: Comparison) -> None:
    """The same against seconds of training, evaluation excluded."""
    axes = figure.subplots()
    _quality(axes, comparison, lambda curve: curve.seconds)
    axes.set_xlabel("seconds of training")
    _legend(figure, axes)


def differences(figure: Figure, comparison: Comparison) -> None:
    """The arm's value minus the baseline's with the same seed at the same images: what large curves hide."""
    axes = figure.subplots()
    base = comparison.curves[comparison.baseline]
    axes.axhline(0, color=INK, linewidth=1.6, label=comparison.baseline)
    bands = []
    for arm in comparison.others:
        gaps = [_gap(curve, base[seed]) for seed, curve in comparison.curves[arm].items() if seed in base]
        if stacked := _stacked(gaps, lambda curve: curve.images):
            bands.append(_band(axes, comparison, arm, *stacked))
    axes.set_title(f"{comparison.metric}: difference to {comparison.baseline}")
    axes.set_ylabel(f"{'above' if comparison.higher_is_better else 'below'} zero is better")
    if bands:
        _late_limits(axes, [*bands, (np.ones(1),) + (np.zeros(1),) * 3])
        _log_across(axes, bands)
    _images_axis(axes)
    _legend(figure, axes)


def speedups(figure: Figure, comparison: Comparison) -> None:
    """How many times fewer images and seconds each arm needs: the median, every seed, lowest to highest.

    Seeds that do not reach the target are hollow, at one over what the baseline needs fewer to reach their best value.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    for row, arm in enumerate(comparison.others):
        for unit, (color, marker, shift) in UNITS.items():
            _ratio(axes, comparison.speedup(arm, unit), comparison.reverse(arm, unit), row + shift, color, marker)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.05, high * (high / low) ** 0.16)  # room for the numbers on the right
    # as many ticks as have room for their labels
    subs = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 5, 7) if high / low > 3 else np.arange(1, 10, 0.2)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(comparison.others)), comparison.others)
    axes.set_ylim(len(comparison.others) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"Speed-up over {comparison.baseline}")
    for unit, (color, marker, _) in UNITS.items():
        axes.plot([], [], color=color, marker=marker, linestyle="", label=f"fewer {unit}")
    if any(math.isinf(comparison.speedup(arm).low) for arm in comparison.others if comparison.speedup(arm)):
        axes.plot([], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="", label="own best only")
    _legend(figure, axes)


def train_and_held_out(figure: Figure, comparison: Comparison) -> None:
    """Nats of training and of held-out images, arm by arm on one scale: where they part, an arm overfits."""
    curves = _train_curves(comparison)
    grid = figure.subplots(math.ceil(len(curves) / 2), min(2, len(curves)), sharex=True, sharey=True, squeeze=False)
    bands = []
    for axes, (arm, pairs) in zip(grid.flat, curves.items(), strict=False):
        for index, (label, color, style) in enumerate((("held out", BLUE, "-"), ("training", ORANGE, (0, (3, 1))))):
            bands.append(_stacked([pair[index] for pair in pairs], lambda curve: curve.images))
            images, middle, low, high = bands[-1]
            axes.fill_between(images, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(images, middle, color=color, linestyle=style, linewidth=1.6, label=label)
        axes.set_title(arm)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for column, axes in enumerate(grid[-1]):
        above = axes if axes.get_visible() else grid[-2][column]
        above.tick_params(labelbottom=True)
        _images_axis(above)
    _late_limits(grid[0, 0], bands)
    figure.supylabel("nats (lower is better)", fontsize=10)
    _legend(figure, grid[0, 0])


def _quality(axes: Axes, comparison: Comparison, across: Callable[[Curve], np.ndarray]) -> None:
    bands = []
    for arm, curves in comparison.curves.items():
        if stacked := _stacked(list(curves.values()), across):
            bands.append(_band(axes, comparison, arm, *stacked))
    if comparison.others and comparison.targets:
        target = float(np.median(list(comparison.targets.values())))
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axes.set_title(f"{comparison.metric} ({'higher' if comparison.higher_is_better else 'lower'} is better)")
    log_scale_where_wide(axes, np.concatenate([middle for _, middle, _, _ in bands]))
    _log_across(axes, bands)


def _band(axes: Axes, comparison: Comparison, arm: str, across: Any, middle: Any, low: Any, high: Any) -> tuple:
    """One arm's median and range; its look is a function of its place among the arms."""
    style = _style(comparison, arm)
    axes.fill_between(across, low, high, color=style["color"], alpha=0.13, linewidth=0)
    marks = {"markevery": max(1, len(across) // 6), "markersize": 3.5}
    axes.plot(across, middle, label=arm, **style, **marks)
    return across, middle, low, high


def _style(comparison: Comparison, arm: str) -> dict[str, Any]:
    if arm == comparison.baseline:
        return {"color": INK, "linestyle": "-", "linewidth": 2.2, "marker": "", "zorder": 3}
    index = comparison.others.index(arm)
    color, dash = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
    return {"color": color, "linestyle": dash, "linewidth": 1.6, "marker": MARKERS[index % len(MARKERS)]}


def _stacked(curves: list[Curve], across: Callable[[Curve], np.ndarray]) -> tuple[np.ndarray, ...] | None:
    """x, and the median, lowest and highest values at the image counts that all curves share."""
    shared = sorted(set.intersection(*(set(curve.images) for curve in curves))) if curves else []
    if not shared:
        return None
    at = [np.searchsorted(curve.images, shared) for curve in curves]
    values = np.stack([curve.values[i] for curve, i in zip(curves, at, strict=True)])
    x = np.median([across(curve)[i] for curve, i in zip(curves, at, strict=True)], axis=0)
    return x, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)


def _gap(curve: Curve, base: Curve) -> Curve:
    shared = np.intersect1d(curve.images, base.images)
    own, other = (each.values[np.searchsorted(each.images, shared)] for each in (curve, base))
    return Curve(shared, own - other, np.full(len(shared), math.nan), curve.higher_is_better)


def _ratio(axes: Axes, spread: Spread, reverse: Spread, y: float, color: str, marker: str) -> None:
    """One row of the speed-ups; a seed that missed the target stands where its reverse puts it."""
    places = {
        seed: value if value > 0 else 1 / reverse.by_seed[seed]
        for seed, value in spread.by_seed.items()
        if value > 0 or reverse.by_seed.get(seed, -1) > 0
    }
    if not places:
        return
    middle, values = float(np.median(list(places.values()))), list(places.values())
    reached = math.isfinite(spread.median)
    axes.plot([min(values), max(values)], [y, y], color=color, linewidth=1.4, alpha=0.6)
    axes.plot(values, [y] * len(values), color=color, marker="|", linestyle="", markersize=6)
    fill = color if reached else "white"
    axes.plot([middle], [y], color=color, marker=marker, markersize=6, markerfacecolor=fill)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "bbox": ground}
    axes.annotate(f"{middle:.2f}x", (max(values), y), color=color, fontsize=8, **place)


def _train_curves(comparison: Comparison) -> dict[str, list[tuple[Curve, Curve]]]:
    """Held-out and training nats of every finished run that measured both, by arm."""
    found = {
        name: [(run.curve_if_any("heldout_nats"), run.curve_if_any(TRAIN_NATS)) for run in arm.finished.values()]
        for name, arm in comparison.arms.items()
    }
    pairs = {name: [pair for pair in pairs if None not in pair] for name, pairs in found.items()}
    return {name: each for name, each in pairs.items() if each and len(each[0][0].images) > 1}


def _images_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: short(images)))
    axes.set_xlabel("images seen")


def _log_across(axes: Axes, bands: list[tuple]) -> None:
    """A logarithmic x axis from tenfold spans on: there, a speed-up is the same distance everywhere."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = min(band[0][0] for band in bands), max(band[0][-1] for band in bands)
    if first > 0 and last >= 10 * first:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda across, _: short(across)))


def _late_limits(axes: Axes, bands: list[tuple]) -> None:
    """Let the y axis show what lies after the first tenth of the run, where curves have left their start behind."""
    late = [column[across >= 0.1 * across[-1]] for across, _, low, high in bands for column in (low, high)]
    values = np.concatenate(late)
    margin = 0.08 * (values.max() - values.min() or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) <= 18 else 2 if max(map(len, labels)) <= 26 else 1
    place = {"loc": "outside lower center", "ncols": min(columns, len(labels)), "borderaxespad": 0.1}
    figure.legend(handles, labels, handlelength=2.6, columnspacing=1.4, **place)


def _draw(path: Path, plot: Callable[[Figure, Comparison], None], height: float, comparison: Comparison) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(
        STYLE | {"axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold"}
    ):
        figure = Figure(figsize=(4.8, height), dpi=200, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.07)
        plot(figure, comparison)
        figure.savefig(path)
    return path
