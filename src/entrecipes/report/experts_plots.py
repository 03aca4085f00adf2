"""The pictures of experts: their groups, the plans of their networks, the search for these, and the costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.report.experts import TRAINING, ExpertRun, Row, experts
from entrecipes.report.plots import BLUE, FAINT, INK, MUTED, ORANGE, STEPS, VEIL, draw
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BORDER = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 2))}
SEARCHES = 10
"""Groups whose search is drawn, at most, spread evenly over all."""
NAMED = 48
"""Units with their names beside the map, at most."""
PROPOSERS = [BLUE, ORANGE, "#3c8d5a", "#8a5fa8", MUTED]


def draw_expert_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw what there is of a run with experts into its `assets/`; returns `{name: path}`, empty for other runs."""
    run = experts(folder)
    if run is None:
        return {}
    assets, units = folder.assets, run.plan.get("units", ())
    found = {"expert_groups": draw(assets / "expert_groups.png", plot_groups, run, panels=2, height=4.4)}
    if units and all("kept" in group for group in run.groups):
        height = 1.4 + min(9.0, max(1.5, 0.17 * len(units)))
        found["expert_plans"] = draw(assets / "expert_plans.png", plot_plans, run, height=height)
    if searched := shown_searches(run):
        height = 1.3 + 0.95 * len(searched)
        found["expert_search"] = draw(
            assets / "expert_search.png", plot_search, run, panels=len(searched), height=height
        )
    if "training_flops" in run.costs and all("flops" in group for group in run.groups):
        found["expert_costs"] = draw(assets / "expert_costs.png", plot_costs, run, height=2.6)
    return found


def plot_groups(above: Axes, below: Axes, run: ExpertRun) -> None:
    """The gated rate of the base and of the experts over log sigma; below it the networks' FLOPs, budget and found."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    if run.base_row:
        x, rate = _rate(run.base_row)
        above.fill_between(x, rate, color=BLUE, alpha=0.12, linewidth=0)
        handles += above.plot(x, rate, color=BLUE, linewidth=1.8, label="base")
    for group, row in zip(run.groups, run.expert_rows, strict=True):
        if row:
            low, high = group["log_sigma"]
            x, rate = _rate(row)
            inside = np.r_[low, x[(x > low) & (x < high)], high].clip(x[0], x[-1])
            line = above.plot(inside, np.interp(inside, x, rate), color=ORANGE, linewidth=1.6, label="experts")
            handles += line if len(handles) < 2 else []
    above.set(title="Where the error lies", ylabel="nats per unit log sigma", ylim=(0, None))

    for group in run.groups:
        low, high = group["log_sigma"]
        share = group.get("flops", 0) / run.plan["base_flops"]
        below.bar((low + high) / 2, share, width=high - low, color=BLUE, alpha=0.85, edgecolor="white", linewidth=1)
        below.plot([low, high], [group["ratio"]] * 2, color=INK, linewidth=1.2, solid_capstyle="butt")
        below.text((low + high) / 2, 1.08, group["number"], ha="center", va="center", fontsize=9, color=INK)
        for axes in (above, below) if group["number"] else ():
            axes.axvline(high, **BORDER, zorder=0.6)
    handles += [
        Patch(color=BLUE, alpha=0.85, label="network"),
        Line2D([], [], color=INK, linewidth=1.2, label="budget"),
    ]
    below.axhline(1, color=FAINT, linewidth=1, zorder=0.5)
    below.set(title="Networks", xlabel="log sigma (more noise to the right)", ylabel="FLOPs / base's", ylim=(0, 1.18))
    below.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    below.set_xlim(run.groups[-1]["log_sigma"][0], run.groups[0]["log_sigma"][1])
    below.grid(axis="x", visible=False), above.grid(axis="x", visible=False)
    above.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def plot_plans(axes: Axes, run: ExpertRun) -> None:
    """Units down, experts across: the share of its atoms that a unit keeps, written where there is room."""
    from matplotlib.colors import LinearSegmentedColormap

    units, count = run.plan["units"], len(run.groups)
    kept = np.array(
        [[group["kept"][index] / unit["atoms"] for group in run.groups] for index, unit in enumerate(units)]
    )
    colours = LinearSegmentedColormap.from_list("kept", ["white", *STEPS])
    edges = np.arange(count + 1) - 0.5, np.arange(len(units) + 1) - 0.5
    axes.pcolormesh(*edges, kept, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axes.set_facecolor(VEIL)
    if len(units) <= NAMED and count <= 10:
        for (row, column), share in np.ndenumerate(kept):
            colour = "white" if share > 0.6 else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_ylim(len(units) - 0.5, -0.5)
    if len(units) <= NAMED:
        axes.set_yticks(range(len(units)), [short_path(unit) for unit in units], fontsize=7)
    else:
        axes.set_ylabel("unit")
    axes.set_xticks(range(0, count, -(-count // 20)))
    axes.set(title="Share of each unit kept, %", xlabel="expert (0 serves the noisiest levels)")
    axes.grid(False)


def plot_search(*axes_and_run: Any) -> None:
    """For each group the reward of every trial by its proposer, and the best so far."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    *every, run = axes_and_run
    names = list(dict.fromkeys(trial["proposer"] for trial in run.trials))
    colours = {name: PROPOSERS[min(index, len(PROPOSERS) - 1)] for index, name in enumerate(names)}
    for axes, number in zip(every, shown_searches(run), strict=True):
        trials = run.trials_of(number)
        rewards = np.array([trial["reward"] for trial in trials], dtype=float)
        x = np.arange(1, len(trials) + 1)
        axes.step(x, np.fmax.accumulate(rewards), where="post", color=INK, linewidth=1.2)
        axes.scatter(x, rewards, c=[colours[trial["proposer"]] for trial in trials], s=14, zorder=3, linewidths=0)
        for place in np.flatnonzero(np.diff([trial["round"] for trial in trials])):
            axes.axvline(place + 1.5, color=FAINT, linewidth=0.7, zorder=0.5)
        axes.set(title=f"Group {number}")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("plans measured")
    axes.figure.supylabel("reward", fontsize=10)
    handles = [Line2D([], [], color=INK, linewidth=1.2, label="best so far")]
    handles += [Line2D([], [], color=c, marker="o", linestyle="", markersize=4, label=n) for n, c in colours.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)


def plot_costs(axes: Axes, run: ExpertRun) -> None:
    """Training as shares of its budget, stage by stage; sampling as shares of the base's, expert by expert."""
    training, sampling = run.costs["training_flops"], run.costs.get("sampling_flops")
    labels, shades = [*TRAINING.values()], [STEPS[3], ORANGE, STEPS[1]]
    ends = [_stacked(axes, 0, [training[key] / training["budget"] for key in TRAINING], shades, labels)]
    if sampling:
        calls = run.calls or [group["steps"] for group in run.groups]
        each = np.array([count * group["flops"] for count, group in zip(calls, run.groups, strict=True)])
        ends.append(_stacked(axes, 1, (each * sampling["ratio"] / each.sum()).tolist(), [BLUE] * len(each)))
    for place, end in enumerate(ends):
        axes.text(end + 0.01, place, f" {end:.1%}", va="center", fontsize=9, bbox={"color": "white", "pad": 1})
    axes.axvline(1, **BORDER, zorder=0.6)
    axes.set_yticks(range(len(ends)), ["training", "sampling"][: len(ends)])
    axes.set(title="FLOPs", xlabel="share of the budget, and of the base's sampling")
    axes.set(xlim=(0, max(1, *ends) * 1.16), ylim=(len(ends) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _stacked(axes: Axes, place: int, shares: list[float], colours: list[str], labels: list[str] | None = None) -> float:
    """A bar of several parts, numbered where they have no label; returns where it ends."""
    start = 0.0
    for index, (share, colour) in enumerate(zip(shares, colours, strict=True)):
        label = {"label": labels[index]} if labels else {}
        axes.barh(place, share, left=start, color=colour, height=0.55, edgecolor="white", linewidth=1, **label)
        if not labels and share > 0.03:
            axes.text(start + share / 2, place, index, ha="center", va="center", color="white", fontsize=8)
        start += share
    return start


def shown_searches(run: ExpertRun) -> list[int]:
    """The groups of which the search is drawn."""
    searched = [group["number"] for group in run.groups if run.trials_of(group["number"])]
    places = np.unique(np.linspace(0, len(searched) - 1, min(SEARCHES, len(searched))).round().astype(int))
    return [searched[place] for place in places]


def short_path(unit: Row) -> str:
    """A unit's module path without what diffusers' names repeat: `down_blocks.0.resnets.1` -> `down 0 resnet 1`."""
    path = (
        unit["path"]
        .replace("_blocks", "")
        .replace("_block", "")
        .replace("transformer", "block")
        .replace("s.", ".")
        .replace(".", " ")
    )
    return path if unit["kind"] != "blocks" else f"{path}: all"


def _rate(row: Row) -> tuple[np.ndarray, np.ndarray]:
    return np.array(row["log_sigma"]), np.array(row["rate"]) * np.array(row["gate"])
