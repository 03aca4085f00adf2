"""The picture of block scores: every block at every noise level, and what that makes of each block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from entrecipes.report.block_report import BlockReport
from entrecipes.report.facts import number
from entrecipes.report.plots import BLUE, FAINT, INK, ORANGE, STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = {
    "loss_rise": ("loss_rise", "Loss rise", "squared error"),
    "information": ("information", "Information", "nats"),
    "ced": ("cei_timestep", "CED", "nats"),
}
"""Each score drawn: what its map shows (of CED the sign too), its title, and the unit of its bars."""
PANELS, COLUMNS = 2, len(SHOWN)
NEAR_ZERO = 1 / 50
"""Colours and bars are linear up to this share of the largest value, and logarithmic beyond: a few blocks are often
worth a hundred times the others, which shall be told apart too."""


def height_of(report: BlockReport) -> float:
    """Height of the picture in inches, so that blocks stay apart."""
    return 1.7 + PANELS * min(6.5, max(1.5, 0.15 * len(report.scores.paths)))


def plot_blocks(*axes_and_report: Axes | BlockReport) -> None:
    """Above a map of block x noise level for each of [`SHOWN`], below its bars: what goes and what stays."""
    *axes, report = axes_and_report
    blocks = len(report.scores.paths)
    for above, below, (name, (shown, title, unit)) in zip(axes[:COLUMNS], axes[COLUMNS:], SHOWN.items(), strict=True):
        _map(above, report, shown)
        above.set(title=title, xlabel="log sigma")
        _bars(below, report, name)
        below.set_xlabel(unit)
    for first in (axes[0], axes[COLUMNS]):
        block_axis(first, blocks)
    _legend(axes[0].figure, report)


def block_axis(axes: Axes, blocks: int) -> None:
    """Blocks down the y axis, the first on top."""
    axes.set(ylabel="block", ylim=(blocks - 0.5, -0.5), yticks=range(0, blocks, math.ceil(blocks / 16)))


def signed_map(axes: Axes, x: np.ndarray, table: np.ndarray) -> None:
    """A table of blocks x evenly spaced places on the x axis, orange below 0 and blue above; NaN stays white."""
    from matplotlib.colors import AsinhNorm, LinearSegmentedColormap

    most = _largest(table)
    steps = [ORANGE, "#eab98f", "white", *STEPS]
    places = [0, 0.25, 0.5, *np.linspace(0.625, 1, len(STEPS))]
    colours = LinearSegmentedColormap.from_list("signed", list(zip(places, steps, strict=True)))
    norm = AsinhNorm(linear_width=most * NEAR_ZERO, vmin=-most, vmax=most)
    step = x[1] - x[0] if len(x) > 1 else 1.0
    edges = np.append(x - step / 2, x[-1] + step / 2)  # a single column has a width too
    mesh = axes.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table, cmap=colours, norm=norm)
    bar = axes.figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02, aspect=14, ticks=[-most, 0, most])
    bar.outline.set_visible(False)
    bar.ax.set_xticklabels([_short(-most), "0", _short(most)], fontsize=8)
    axes.grid(False)


def _map(axes: Axes, report: BlockReport, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    signed_map(axes, report.scores.log_sigma.numpy(), report.scores.by_level(name).numpy())
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 4, 5, 10]))


def _bars(axes: Axes, report: BlockReport, name: str) -> None:
    values = np.array(report.values[name])
    goes = set(report.removes(name))
    colours = [
        ORANGE if index in goes else FAINT if index in report.selection.protected else BLUE
        for index in range(len(values))
    ]
    axes.barh(range(len(values)), values, color=colours, height=0.75)
    axes.axvline(0, color=INK, linewidth=0.6)
    most = _largest(values)
    axes.set_xscale("asinh", linear_width=most * NEAR_ZERO)
    ends = [end for end in (min(0, values.min()), max(0, values.max())) if abs(end) > most / 10]
    ticks = [0, most / 10 if values.max() == most else -most / 10, *ends]  # the middle one shows that it is not linear
    axes.set_xticks(ticks, ["0", *map(_short, ticks[1:])])
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)


def _legend(figure: Figure, report: BlockReport) -> None:
    from matplotlib.patches import Patch

    meanings = {ORANGE: f"would go ({report.count})", BLUE: "would stay", FAINT: "can't go"}
    handles = [Patch(color=colour, label=label) for colour, label in meanings.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def _largest(values: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(values)).max(initial=0)) or 1.0


def _short(value: float) -> str:
    """Two significant digits."""
    return number(float(f"{value:.2g}"))
