"""The pictures of a learned noise schedule: where it drew over the run, what it learned, and whether it settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entrecipes.information.nats import gate
from entrecipes.report.plots import BLUE, INK, MUTED, ORANGE, STEPS, VEIL, draw
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SETTLED = 1e-2
"""A table whose CDF moves less than this from one rebuild to the next has settled (Raya et al. 2026's page)."""

SIGMA = "noise level sigma (more noise to the right)"


def draw_noise_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw what a learned noise schedule logged into the run's `assets/`; returns `{name: path}`, empty without it."""
    rows = folder.metrics("noise")
    if not rows:
        return {}
    section = folder.recipe.get("noise", {}) if folder.has("recipe.yaml") else {}
    plots = {
        "noise_density": (density_over_training, 1, rows),
        "noise_profile": (learned_profile, 2, rows, section.get("gate_order", 3)),
        "noise_convergence": (convergence, 2, rows),
    }
    return {
        name: draw(folder.assets / f"{name}.png", plot, *arguments, panels=panels, height=4.2)
        for name, (plot, panels, *arguments) in plots.items()
    }


def density_over_training(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Where the draws of the whole run went: a map of their density, with their 5, 50 and 95 % and the gate's pivot.

    The warm-up shows the base distribution (rows of older runs do not hold it: it stays white), the ramp the mixture.
    """
    from matplotlib.colors import LinearSegmentedColormap

    log_sigma = np.array(rows[0]["log_sigma"])
    base = np.array(rows[0].get("base_density", np.full_like(log_sigma, math.nan)))
    starts = np.array([row["images"] for row in rows], dtype=float)
    columns = [base]
    for row in rows:
        learned, share = np.array(row["density"]), row["ramped"]
        columns.append(learned if share == 1 or np.isnan(base).any() else (1 - share) * base + share * learned)
    ends = np.r_[0, starts, starts[-1] + (np.diff(starts)[-1] if len(starts) > 1 else starts[-1] / 10)]
    half = (log_sigma[1] - log_sigma[0]) / 2
    sigma = np.exp(np.r_[log_sigma - half, log_sigma[-1] + half])
    white_to_blue = LinearSegmentedColormap.from_list("density", ["white", *STEPS])
    density = np.stack(columns, axis=1)
    mesh = axes.pcolormesh(ends, sigma, density, cmap=white_to_blue, vmin=0, vmax=np.nanquantile(density, 0.998))
    axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30, label="density per unit log sigma").outline.set_visible(
        False
    )

    quantiles = np.array([row["quantiles"] for row in rows])
    axes.plot(starts, quantiles[:, 2], color=INK, linewidth=1.2, label="median of the draws")
    axes.plot(starts, quantiles[:, [0, -1]], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label=["5 and 95 %", ""])
    if rows[-1]["pivot"] is not None:
        axes.plot(starts, [row["pivot"] for row in rows], color=ORANGE, linewidth=1.4, label="pivot of the gate")
    axes.axvline(starts[0], color=MUTED, linewidth=0.8)
    note = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8, "transform": axes.get_xaxis_transform()}
    axes.text(starts[0] / 2, 0.5, "warm-up", color=INK, **note)
    _log_ticks(axes.set_yscale, axes.yaxis)
    axes.set(xlim=(0, ends[-1]), ylim=_worth_showing(log_sigma, density), title="Which noise levels were trained")
    axes.set_ylabel("noise level sigma")
    axes.grid(False)
    axes.legend(loc="lower right", fontsize=8)


def learned_profile(top: Axes, bottom: Axes, rows: list[dict[str, Any]], gate_order: int) -> None:
    """The last estimate: the information rate, gated and not, and the density made of it beside the base's."""
    last = rows[-1]
    log_sigma, x0_error = torch.tensor(last["log_sigma"]).double(), torch.tensor(last["x0_error"]).double()
    rate_panel(top, log_sigma, x0_error * torch.exp(-2 * log_sigma), last["pivot"], gate_order)
    top.set(title="Information at each noise level", ylabel="nats per dimension\nand unit log sigma")
    curves = {"learned": (last["density"], {"color": BLUE, "linewidth": 1.8})}
    if "base_density" in rows[0]:
        curves["base of the warm-up"] = rows[0]["base_density"], {"color": MUTED, "linewidth": 1.2}
    density_panel(bottom, log_sigma, curves)
    bottom.set(title="Where the draws go", xlabel=SIGMA)


def convergence(top: Axes, bottom: Axes, rows: list[dict[str, Any]]) -> None:
    """How much the CDF of the draws moved at each rebuild, and the share of draws below the pivot."""
    from matplotlib.ticker import MaxNLocator

    moved = [row for row in rows if row["cdf_change"]]
    top.plot([row["images"] for row in moved], [row["cdf_change"] for row in moved], color=BLUE, linewidth=1.4)
    top.axhline(SETTLED, color=ORANGE, linewidth=1, linestyle="--", label=f"settled below {SETTLED:g}")
    _log_ticks(top.set_yscale, top.yaxis)
    top.set(title="Change at each rebuild", ylabel="change of the CDF", ylim=(None, 6 * top.get_ylim()[1]))
    top.legend(loc="upper right")
    below = np.array([[row["images"], row["below_pivot"]] for row in rows if row["below_pivot"] is not None])
    if len(below):  # there may be no gate
        bottom.plot(below[:, 0], 100 * below[:, 1], color=BLUE, linewidth=1.4)
    bottom.set(title="Draws below the pivot", ylabel="% of the draws", ylim=(0, 100), xlim=(0, rows[-1]["images"]))
    bottom.xaxis.set_major_locator(MaxNLocator(5))


def rate_panel(
    axes: Axes,
    log_sigma: torch.Tensor,
    rate: torch.Tensor,
    pivot: float | None,
    gate_order: int,
    window: tuple[float, float] | None = None,
) -> None:
    """Nats per unit log sigma, gated (filled) and not, with the pivot and, shaded, a window of noise levels.

    Args:
        log_sigma: Levels [L].
        rate: Nats per unit log sigma [L], in whatever unit the caller labels.
        pivot: Sigma at which the gate is one half; None: no gate.
        window: Two sigmas.
    """
    sigma = log_sigma.exp().numpy()
    gated = (rate if pivot is None else rate * gate(log_sigma, pivot, gate_order)).numpy()
    if window:
        axes.axvspan(*window, color=VEIL, alpha=0.6, linewidth=0, label="central 90 %")
    axes.fill_between(sigma, gated, color=BLUE, alpha=0.12, linewidth=0)
    axes.plot(sigma, gated, color=BLUE, linewidth=1.8, label="rate" if pivot is None else "gated rate")
    if pivot is not None:
        axes.plot(sigma, rate.numpy(), color=BLUE, linewidth=1.1, linestyle=(0, (1, 2)), label="without the gate")
        axes.axvline(pivot, color=ORANGE, linewidth=1.2, label=f"pivot {pivot:.3g}")
    axes.set_ylim(0, 1.4 * gated.max())
    _sigma_axis(axes, sigma)
    axes.legend(loc="upper right")


def density_panel(
    axes: Axes,
    log_sigma: torch.Tensor,
    curves: Mapping[str, tuple[Any, dict[str, Any]]],
    window: tuple[float, float] | None = None,
) -> None:
    """Densities per unit log sigma, each `label: (values [L], line style)`."""
    sigma = log_sigma.exp().numpy()
    if window:
        axes.axvspan(*window, color=VEIL, alpha=0.6, linewidth=0)
    for label, (density, style) in curves.items():
        axes.plot(sigma, np.asarray(density), label=label, **style)
    axes.set(ylim=(0, 1.35 * axes.dataLim.y1), ylabel="density per\nunit log sigma")
    _sigma_axis(axes, sigma)
    axes.legend(loc="upper right")


def _sigma_axis(axes: Axes, sigma: np.ndarray) -> None:
    _log_ticks(axes.set_xscale, axes.xaxis)
    axes.set_xlim(sigma[0], sigma[-1])


def _log_ticks(set_scale: Callable[[str], None], axis: Axis) -> None:
    """A logarithmic axis that says 0.01, 0.1, 1, 10 and no powers."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _worth_showing(log_sigma: np.ndarray, density: np.ndarray) -> tuple[float, float]:
    """The sigmas between which any column has more than a hundredth of the highest density."""
    seen = np.nanmax(density, axis=1) > 0.01 * np.nanmax(density)
    return math.exp(log_sigma[seen][0]), math.exp(log_sigma[seen][-1])
