"""The picture of a pruning: how long each block lived, and what it scored at each stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrecipes.report.block_plots import block_axis, signed_map
from entrecipes.report.plots import BLUE, FAINT, INK, MUTED, ORANGE, VEIL, draw, short
from entrecipes.report.pruning import PrunedRun, pruned
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGE = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 2))}
NUMBERS = {"labelcolor": MUTED, "labelsize": 8, "pad": 1}
CROSS = {"marker": "x", "linestyle": "", "color": INK, "markersize": 5, "markeredgewidth": 1.4, "clip_on": False}


def draw_prune_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw the block map into the run's `assets/`; returns `{name: path}`, empty where nothing was pruned."""
    run = pruned(folder)
    if run is None:
        return {}
    path, scored = folder.assets / "block_map.png", run.score is not None
    height = 1.5 + 0.5 * scored + min(6.5, max(1.8, 0.17 * run.count))
    return {"block_map": draw(path, plot_pruning, run, columns=1 + scored, height=height)}


def plot_pruning(*axes_and_run: Axes | PrunedRun) -> None:
    """The life of each block over the run, and beside it, where a score was measured, its value at each stage."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes, *others, run = axes_and_run
    ends = [run.removed[block]["images"] if block in run.removed else run.images for block in range(run.count)]
    colours = [ORANGE if block in run.removed else FAINT if block in run.stays else BLUE for block in range(run.count)]
    axes.barh(range(run.count), ends, color=colours, height=0.7)
    axes.plot([ends[block] for block in run.removed], list(run.removed), **CROSS)
    for stage in run.stages:
        axes.axvline(stage["images"], **STAGE, zorder=0.5)
    top = axes.secondary_xaxis("top")
    top.set_xticks([row["images"] for row in run.stages], [row["stage"] for row in run.stages])
    top.tick_params(**NUMBERS)
    top.spines["top"].set_visible(False)
    block_axis(axes, run.count)
    axes.set(title="Life of each block", xlabel="images seen", xlim=(0, max(1, run.images)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: short(images)))
    axes.grid(False)
    for other in others:
        axes.get_gridspec().set_width_ratios([3, 2])
        _scores(other, run)
    _legend(axes, run)


def _scores(axes: Axes, run: PrunedRun) -> None:
    """What every block scored at each stage; a cross where it was removed, grey where it was gone."""
    stages = range(len(run.stages))
    table = [[row["scores"].get(str(block), math.nan) for row in run.stages] for block in range(run.count)]
    signed_map(axes, np.arange(len(run.stages)), np.array(table))
    axes.set_facecolor(VEIL)
    crosses = [(column, block) for column in stages for block in run.stages[column]["remove"]]
    axes.plot([column for column, _ in crosses], [block for _, block in crosses], **CROSS)
    axes.set(title=run.score, xlabel="stage")
    axes.set_xticks(stages, [row["stage"] for row in run.stages])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", **NUMBERS)


def _legend(axes: Axes, run: PrunedRun) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = {BLUE: "kept", FAINT: "could not go", ORANGE: "removed"}
    handles = [Patch(color=colour, label=label) for colour, label in colours.items() if run.stays or colour != FAINT]
    handles += [Line2D([], [], **CROSS, label="removal"), Line2D([], [], **STAGE, label="stage")]
    axes.figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, columnspacing=1.2, handlelength=1.4
    )
