"""The pictures that only a gallery has: curves of several runs over one another, and where the nats lie over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entrecipes.information.nats import gate
from entrecipes.report.comparison.curve import Curve
from entrecipes.report.comparison.plots import COLORS, DASHES, MARKERS
from entrecipes.report.plots import INK, ORANGE, STEPS, draw, log_scale_where_wide, short, smooth
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[str, Curve]
"""A name, shared by runs that are drawn alike, and a curve."""
UNITS = {"images": "images seen", "seconds": "seconds of training"}


def overlay(path: Path, title: str, series: Sequence[Series], unit: str, styles: Sequence[str]) -> Path | None:
    """Curves of several runs against `images` or `seconds`; None where no run has any point there.

    Args:
        styles: All series of the page, by whose places colours, dashes and marks are given.
    """
    shown = [(name, curve) for name, curve in series if np.isfinite(getattr(curve, unit)).any()]
    if not shown:
        return None
    legend = math.ceil(len({name for name, _ in shown}) / 2)
    return draw(path, plot_overlay, title, shown, unit, styles, height=2.9 + 0.2 * legend)


def plot_overlay(axes: Axes, title: str, series: Sequence[Series], unit: str, styles: Sequence[str]) -> None:
    """One line a run; runs of one series look alike and share their entry of the legend."""
    from matplotlib.ticker import FuncFormatter

    for name, curve in series:
        index, named = styles.index(name), name in axes.get_legend_handles_labels()[1]
        many = len(curve.values) > 30
        look = {"color": COLORS[index % len(COLORS)], "linestyle": ("-", *DASHES[:3])[index // len(COLORS) % 4]}
        marks = {"marker": "" if many else MARKERS[index % len(MARKERS)], "markersize": 3.5}
        values = smooth(curve.values) if many else curve.values
        axes.plot(getattr(curve, unit), values, linewidth=1.6, label=None if named else name, **look, **marks)
    log_scale_where_wide(axes, np.concatenate([curve.values for _, curve in series]))
    axes.set(title=title, xlabel=UNITS[unit])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= 28 else 1
    place = {"loc": "outside lower center", "ncols": min(columns, len(labels)), "borderaxespad": 0.1}
    axes.figure.legend(handles, labels, handlelength=2.4, **place)


def draw_profile(folder: RunFolder) -> dict[str, Path]:
    """Draw where the nats lay over the run, from its `noise` rows or, without a learned schedule, `held_out` rows.

    Returns:
        `{"profile": path}`, empty where fewer than two rows tell of it.
    """
    learned = folder.metrics("noise")
    rows = learned or [row for row in folder.metrics("held_out") if row.get("rate")]
    if len(rows) < 2:
        return {}
    section: dict[str, Any] = folder.recipe.get("noise", {}) if folder.has("recipe.yaml") else {}
    nats = [_gated(row, section.get("gate_order", 3)) for row in rows]
    return {"profile": draw(folder.assets / "profile.png", plot_profile, rows, nats, bool(learned), height=3.9)}


def plot_profile(axes: Axes, rows: list[dict[str, Any]], nats: list[np.ndarray], learned: bool) -> None:
    """Log sigma up, images to the right, nats per unit log sigma as colour; the window of the draws, the pivot.

    Colours are logarithmic over the two decades below the largest value after the first tenth of the run: an untrained
    model's error would hide the rest.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    log_sigma, images = np.array(rows[-1]["log_sigma"]), np.array([row["images"] for row in rows], dtype=float)
    table = np.stack([np.interp(log_sigma, row["log_sigma"], of) for row, of in zip(rows, nats, strict=True)], axis=1)
    late = table[:, images >= 0.1 * images[-1]]
    most = float(np.nanquantile(late, 0.995)) or 1.0
    colours = LinearSegmentedColormap.from_list("nats", ["white", *STEPS, "#08203a"])
    middles = (images[1:] + images[:-1]) / 2
    edges = np.r_[images[0], middles, images[-1]] if images[0] == 0 else np.r_[0, middles, images[-1]]
    half = (log_sigma[1] - log_sigma[0]) / 2
    levels = np.r_[log_sigma - half, log_sigma[-1] + half]
    norm = LogNorm(most / 100, most, clip=True)
    mesh = axes.pcolormesh(edges, levels, np.where(table > 0, table, most / 1e4), cmap=colours, norm=norm)
    unit = "nats per dimension, unit log sigma" if learned else "nats per unit log sigma"
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30, label=unit, format="{x:g}")
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    seen = table.max(axis=1) > most / 100
    low, high = levels[:-1][seen].min(), levels[1:][seen].max()
    if learned:
        window = np.log([[row["quantiles"][0], row["quantiles"][-1]] for row in rows])
        label = ["90 % of the draws", ""]
        axes.plot(images, window, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label=label)
        low, high = min(low, window.min() - half), max(high, window.max() + half)
    if learned and rows[-1].get("pivot") is not None:
        pivots = np.log([row["pivot"] for row in rows])
        axes.plot(images, pivots, color=ORANGE, linewidth=1.4, label="pivot of the gate")
    axes.set(title="Where the nats lie over the run", ylabel="log sigma", xlim=(edges[0], edges[-1]), ylim=(low, high))
    axes.grid(False)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, borderaxespad=0.1)


def _gated(row: dict[str, Any], gate_order: int) -> np.ndarray:
    """Nats per unit log sigma of a row, faded out below the pivot."""
    if "rate" in row:
        return np.array(row["rate"]) * np.array(row["gate"])
    log_sigma = torch.tensor(row["log_sigma"]).double()
    rate = torch.tensor(row["x0_error"]).double() * torch.exp(-2 * log_sigma)
    return (rate * gate(log_sigma, row.get("pivot"), gate_order)).numpy()
