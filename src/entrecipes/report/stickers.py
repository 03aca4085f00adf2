"""What a run on stickers says of itself: its tasks, how often each was drawn, how hard each was found, its data."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.recipe import schema  # noqa: F401 (it registers the choices)
from entrecipes.recipe.base import choice
from entrecipes.recipe.masks import GIVEN, TASKS, DualMasksSection
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import Rows, number
from entrecipes.report.plots import BLUE, INK, MUTED, ORANGE, STEPS, draw, log_scale_where_wide, short
from entrecipes.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "stickers"
PICTURES = {
    "task_odds": "How likely each task was to be drawn, by the curriculum, against clips seen",
    "task_nats": "Measured difficulty of each task: gated information rate of the x0 error, nats per unit log sigma "
    "and number that counts",
}
"""The pictures that there may be, and what they show."""
COLOURS = dict(zip(TASKS, (STEPS[1], BLUE, INK, ORANGE, "#4a8f5a", "#96b84f", MUTED), strict=True))

Row = dict[str, Any]


class StickerRun:
    """The tasks, texts and data of a run on stickers, and what it has logged of them so far.

    Raises:
        UserError: When a file of the run is damaged.
    """

    pictures = PICTURES

    def __init__(self, folder: RunFolder) -> None:
        self.recipe = folder.recipe
        self.run: Row = folder.run if folder.has("run.json") else {}
        self.facts: Row = self.run.get(KIND) or {}
        self.masks: Row = self.recipe.get("masks") or {"type": "none"}
        self.logged = [row for row in folder.metrics("train") if row.get("odds")]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Those that are trained, in the order of the recipe."""
        return tuple(self._dual.tasks) if self._dual else ("t2v",)

    @cached_property
    def _dual(self) -> DualMasksSection | None:
        return DualMasksSection.model_validate(self.masks) if self.masks["type"] == "dual" else None

    def rows(self) -> Rows:
        """What was trained on what, at a glance."""
        data = self.run.get("data") or {}
        found = {
            "Tasks": ", ".join(self.tasks),
            "Shown and measured": self.recipe["evaluation"].get("task"),
            "Masks": self._said("masks", self.masks["type"]) + self._masks(),
            "Curriculum": self._curriculum(),
            "Text encoders": self._texts(),
            "Clips": self._clips(),
            "Held out": self._held_out(),
            "Licence of the data": data.get("license"),
        }
        return [(label, text) for label, text in found.items() if text]

    def _said(self, wing: str, name: str) -> str:
        entry = choice(wing, name)
        return f"{name}: {entry.summary.rstrip('.')}" + (f" [{entry.paper}]" if entry.paper else "")

    def _masks(self) -> str:
        dual = self._dual
        if dual is None:
            return ""
        parts = [f"one task a {dual.draw}", "{} to {} frames of each clip".format(*dual.lengths)]
        parts += [f"{dual.uncond:.0%} of the samples are given nothing"] * (dual.uncond > 0)
        parts += ["given frames are left out of the loss"] * (dual.given_frames == "skip")
        parts += ["the loss is the mean over all frames, padding too"] * (dual.normalize == "paper")
        return f"; {', '.join(parts)}"

    def _curriculum(self) -> str:
        said = self._said("curriculum", (self.recipe.get("curriculum") or {"type": "none"})["type"])
        level = self.logged[-1].get("level") if self.logged else None
        return said if level is None else f"{said}; at the end at level {level} (0: easy tasks, 4: hard ones)"

    def _texts(self) -> str | None:
        text = self.facts.get("text")
        if text:
            channels, tokens = (" + ".join(map(str, text[key])) for key in ("channels", "tokens"))
            return f"{text['id']}, frozen: {tokens} tokens of {channels} channels"
        named = (self.recipe["pipeline"].get("build") or {}).get("text") or []
        return ", ".join(f"{section.get('id', 'minilm')}, frozen" for section in named) or None

    def _clips(self) -> str | None:
        if not self.facts:
            return None
        moving, stills = self.facts["clips"], self.facts["stills"]
        return f"{moving:,} moving and {stills:,} still to train on, {self.facts['frames']} frames of {self._side} px"

    @property
    def _side(self) -> int:
        return self.run["pipeline"]["sample_size"]

    def _held_out(self) -> str | None:
        count = (self.run.get("data") or {}).get("held_out_images")
        if not count:
            return None
        parted = self.recipe["data"]["type"] == "stickers"
        whole = "no drawing, in whatever skin tone, is on both sides" if parted else "no motion is on both sides"
        return f"{count:,} moving clips; {whole}"

    def tables(self) -> list[Table]:
        """Each task: what it is given, how often it was drawn, how hard it was found."""
        header = ["task", "given", "text", "odds at first", "mean", "at last"]
        hard = any(row.get("nats") for row in self.logged)
        header += ["nats at first", "at last"] if hard else []
        rows = []
        for task in self.tasks:
            text = {"i2v": "no", "uncond": "no"}.get(task, "yes")
            shares = self.column("odds", task) if self.logged else np.full(1, 1 / len(self.tasks))
            cells = [f"{share:.1%}" for share in (shares[0], shares.mean(), shares[-1])]
            if hard:
                nats = self.column("nats", task)
                cells += _ends(nats[np.isfinite(nats)])
            rows.append([task, GIVEN[task], text, *cells])
        return [Table("Tasks", header, rows)]

    def column(self, key: str, task: str) -> np.ndarray:
        """What was logged of a task; NaN where nothing was."""
        found = [(row.get(key) or {}).get(task) for row in self.logged]
        return np.array([np.nan if value is None else value for value in found], dtype=float)


def stickers(folder: RunFolder) -> StickerRun | None:
    """What the run's recipe and log tell of stickers; None for a run on other data."""
    return StickerRun(folder) if kind(folder) == KIND else None


def kind(folder: RunFolder) -> str:
    """The kind of data that the run is about: `images`, `sequences`, `clips` or `stickers`."""
    name = folder.recipe["data"]["type"] if folder.has("recipe.yaml") else "digits"
    return choice("data", name).section.kind


def draw_sticker_plots(folder: RunFolder) -> dict[str, Path]:
    """Draw odds and nats of the tasks into the run's `assets/`; returns `{name: path}`, empty without a curriculum."""
    run = stickers(folder)
    if run is None or not run.logged:
        return {}
    plots = {"task_odds": plot_odds}
    if any(np.isfinite(run.column("nats", task)).any() for task in run.tasks):
        plots["task_nats"] = plot_nats
    return {name: draw(folder.assets / f"{name}.png", plot, run, height=3.6) for name, plot in plots.items()}


def plot_odds(axes: Axes, run: StickerRun) -> None:
    """How likely each task was to be drawn: bands of a stack that adds up to one."""
    shares = [100 * run.column("odds", task) for task in run.tasks]
    colours = [COLOURS[task] for task in run.tasks]
    seen = _seen(run)
    if len(seen) == 1:  # a band needs two ends
        seen, shares = [0, seen[0]], [share.repeat(2) for share in shares]
    axes.stackplot(seen, shares, colors=colours, labels=run.tasks, edgecolor="white", linewidth=0.6)
    axes.set(title="Odds of the tasks", ylabel="share of the draws in %", ylim=(0, 100), xlim=(seen[0], seen[-1]))
    axes.grid(False)
    _finish(axes)


def plot_nats(axes: Axes, run: StickerRun) -> None:
    """How hard each task was found, by the model's own error."""
    every = []
    for task in run.tasks:
        nats = run.column("nats", task)
        marks = {"marker": "o", "markersize": 3} if len(nats) <= 25 else {}
        axes.plot(_seen(run), nats, color=COLOURS[task], linewidth=1.6, label=task, **marks)
        every.append(nats)
    log_scale_where_wide(axes, np.concatenate(every))
    axes.set(title="Difficulty of the tasks", ylabel="nats per unit log sigma")
    _finish(axes)


def _finish(axes: Axes) -> None:
    """The x axis, and the legend below."""
    from matplotlib.ticker import FuncFormatter

    axes.set_xlabel("clips seen")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda clips, _: short(clips)))
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3, len(labels))
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, columnspacing=1.2)


def _seen(run: StickerRun) -> list[int]:
    return [row["images"] for row in run.logged]


def _ends(values: Iterable[float]) -> list[str]:
    values = list(values)
    return [number(values[0]), number(values[-1])] if values else ["", ""]
