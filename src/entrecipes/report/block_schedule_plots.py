"""The pictures of a block schedule: what was open when, how candidates compared, and what a step took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.report.block_plots import block_axis
from entrecipes.report.blocks import BlockRun
from entrecipes.report.plots import BLUE, FAINT, INK, MUTED, ORANGE, STEPS, VEIL, draw, log_scale_where_wide
from entrecipes.report.prune_plots import NUMBERS, STAGE
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.spans import HELD, Compared, held

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPEN, TURNS, CLOSED = BLUE, STEPS[0], VEIL
RING = {"markerfacecolor": "none", "markeredgecolor": ORANGE, "markeredgewidth": 1.6}
CHOSEN = {"linestyle": "", "marker": "o", "markersize": 9, **RING}
LAYERS = dict(zip(HELD, (BLUE, STEPS[1], STEPS[0]), strict=True))
DASHED = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 2))}


def draw_block_schedule_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw what there is to see into the run's `assets/`; returns `{name: path}`, empty where nothing changed."""
    run = BlockRun(folder)
    assets, compared = folder.assets, [found for found in run.compared if found.ended]
    plots = {}
    if run.progressive:
        blocks = run.spans[-1].blocks["blocks"]
        height, below = 1.5 + min(6.5, max(1.5, 0.17 * blocks)), 1.6 * bool(compared)
        plots["block_schedule"] = draw(
            assets / "block_schedule.png", plot_schedule, run, panels=1 + bool(compared), height=height + below
        )
    if compared:
        plots["block_efficiency"] = draw(assets / "block_efficiency.png", plot_efficiency, run, compared)
        panels = {"panels": len(compared), "height": 1.3 + 1.2 * len(compared)}
        plots["block_turns"] = draw(assets / "block_turns.png", plot_turns, run, compared, **panels)
    if len([span for span in run.spans if span.costs]) > 1:
        plots["step_costs"] = draw(assets / "step_costs.png", plot_costs, run, panels=2, height=4.6)
    return plots


def plot_schedule(*axes_and_run: Axes | BlockRun) -> None:
    """Which blocks each step trained; below, where candidates were compared, the held-out loss after each turn."""
    from matplotlib.patches import Patch

    axes, *others, run = axes_and_run
    count, end = run.spans[-1].blocks["blocks"], run.spans[-1].end
    axes.barh(range(count), end, color=CLOSED, height=0.7)
    for span in run.spans:
        always = run.opened(span)
        for blocks, colour in ((always, OPEN), (set(span.blocks["open"]) - set(always), TURNS)):
            axes.barh(list(blocks), span.end - span.start, left=span.start, color=colour, height=0.7)
    _stages(axes, run)
    block_axis(axes, count)
    axes.set(title="Blocks that are trained", xlim=(0, end))
    axes.grid(False)
    for below in others:
        axes.get_gridspec().set_height_ratios([max(1.5, 0.17 * count), 1.5])
        for found in run.compared:
            places = np.linspace(found.begun["images"], found.ended.get("images", end), len(found.turns) + 1)
            _segments(below, run, found, places, [BLUE] * len(found.numbers))
        _stages(below, run, numbers=False)
        below.set(title="Held-out loss after each turn", ylabel="squared error")
        log_scale_where_wide(below, np.array([loss for found in run.compared for _, loss in found.turns]))
    meanings = {OPEN: "open", **({TURNS: "open in turns"} if run.compared else {}), CLOSED: "closed"}
    handles = [Patch(color=colour, label=label) for colour, label in meanings.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def plot_efficiency(axes: Axes, run: BlockRun, compared: list[Compared]) -> None:
    """CE(m), the fall of the loss for its cost, against the number of open blocks, a curve for each stage.

    Each is relative to its largest value: the first stage often earns a hundred times what the last one does.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    for found, colour in zip(compared, _shades(len(compared)), strict=True):
        curve = {c.m: c.efficiency(run.clock) for c in found.candidates if c.steps}
        if not curve:  # the stage was too short for a turn that counts
            continue
        most = max(curve.values(), key=abs) or 1.0
        curve = {m: value / abs(most) for m, value in curve.items()}
        label = f"stage {found.begun['stage'] + 1} (1 = {abs(most):.3g})"
        axes.plot(*zip(*curve.items(), strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        if found.chosen in curve:
            axes.plot(found.chosen, curve[found.chosen], zorder=4, **CHOSEN)
        if min(curve.values()) < 0:
            axes.axhline(0, color=INK, linewidth=0.6)
    handles = [*axes.get_legend_handles_labels()[0], Line2D([], [], label="chosen", **CHOSEN)]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8)
    unit = {"predicted": "loss fall per cost", "measured": "loss fall per second"}[run.clock]
    axes.set(title="Convergence efficiency CE(m)", xlabel="open blocks m", ylabel=unit)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_turns(*axes_run_compared: Any) -> None:
    """The held-out loss in each comparison, turn by turn, coloured by whose turn it was."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    *every, run, compared = axes_run_compared
    for axes, found in zip(every, compared, strict=True):
        colours = _shades(len(found.candidates))
        _segments(axes, run, found, np.arange(len(found.turns) + 1), colours)
        handles = [
            Line2D([], [], color=colour, marker="o", markersize=3, label=f"m = {candidate.m}")
            for candidate, colour in zip(found.candidates, colours, strict=True)
        ]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        axes.set(title=f"Stage {found.begun['stage'] + 1}: {found.chosen} chosen")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turns")
    axes.figure.supylabel("held-out loss", fontsize=10)


def plot_costs(memory: Axes, seconds: Axes, run: BlockRun) -> None:
    """What the heaviest step of each span held besides the weights, and how long its steps took."""
    spans = [span for span in run.spans if span.costs]
    edges = [edge for span in spans for edge in (span.start, span.end)]
    layers = {key: np.repeat([span.costs[key] / 2**20 for span in spans], 2) for key in HELD}
    labels = [HELD[key] for key in layers]
    memory.stackplot(edges, *layers.values(), labels=labels, colors=LAYERS.values(), linewidth=0)
    if run.full:
        memory.axhline(held(run.full.costs) / 2**20, label="all weights", **DASHED)
    top = 1.08 * max(held(span.costs) for span in spans) / 2**20
    memory.set(title="Memory of a step besides the weights", ylabel="MiB", xlim=(0, edges[-1]), ylim=(0, top))

    train = [row for row in run.folder.metrics("train") if row.get("images_per_second")]
    batch = run.folder.recipe["training"]["batch_size"]
    logged = [batch / row["images_per_second"] for row in train]
    seconds.plot([row["images"] for row in train], logged, color=FAINT, linewidth=1, label="as logged")
    means = np.repeat([np.nan if span.step_seconds is None else span.step_seconds for span in spans], 2)
    seconds.plot(edges, means, color=BLUE, linewidth=1.8, label="mean of the steps")
    if run.full and run.full.step_seconds:
        seconds.axhline(run.full.step_seconds, **DASHED)
    if predicted := _predicted(run):
        seconds.plot(edges, np.repeat(predicted, 2), color=ORANGE, linewidth=1.2, label="predicted, scaled to fit")
    seconds.set(title="Time of a step", ylabel="seconds", ylim=(0, 1.5 * np.nanmax(means)))
    _stages(memory, run)
    _stages(seconds, run, numbers=False)
    handles = [handle for axes in (memory, seconds) for handle in axes.get_legend_handles_labels()[0]]
    memory.figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=8, columnspacing=1.2, handlelength=1.4
    )


def _predicted(run: BlockRun) -> list[float]:
    """Predicted cost of each span's steps, in the seconds that fit the measured ones best; none without a schedule."""
    spans = [span for span in run.spans if span.costs]
    if not run.progressive or any(span.predicted is None or span.step_seconds is None for span in spans):
        return []
    pairs = [(span.predicted, span.step_seconds, span.steps) for span in spans]
    scale = sum(p * s * n for p, s, n in pairs) / sum(p * p * n for p, _, n in pairs)
    return [scale * predicted for predicted, *_ in pairs]


def _segments(axes: Axes, run: BlockRun, found: Compared, places: np.ndarray, colours: list[Any]) -> None:
    """The loss from turn to turn (of snapshots: from the start), each stretch in its candidate's colour."""
    colours = dict(zip(found.numbers, colours, strict=True))
    before = places[0], found.begun["loss"]
    axes.plot(*before, marker="o", markersize=3, color=MUTED, zorder=3)
    for place, (candidate, loss) in zip(places[1:], found.turns, strict=True):
        xs, ys = zip(before, (place, loss), strict=True)
        axes.plot(xs, ys, color=colours[candidate.m], linewidth=1.4)
        axes.plot(place, loss, color=colours[candidate.m], marker="o", markersize=3, zorder=3)
        if run.section["mode"] == "supernet":
            before = place, loss


def _stages(axes: Axes, run: BlockRun, numbers: bool = True) -> None:
    """A line where each stage (or phase) begins, and its number above."""
    begins = {}
    for span in run.spans:
        begins.setdefault((span.blocks.get("stage"), span.phase.get("phase")), span.start)
    for start in list(begins.values())[1:]:
        axes.axvline(start, **STAGE, zorder=2)
    if numbers and len(begins) > 1:
        top = axes.secondary_xaxis("top")
        top.set_xticks(list(begins.values()), range(1, len(begins) + 1))
        top.tick_params(**NUMBERS)
        top.spines["top"].set_visible(False)


def _shades(count: int) -> list[Any]:
    """So many blues, from light to dark."""
    from matplotlib.colors import LinearSegmentedColormap

    return list(LinearSegmentedColormap.from_list("steps", STEPS)(np.linspace(0.15, 1, count) if count > 1 else [1.0]))
