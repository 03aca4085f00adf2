"""One run as the gallery shows it: its state and method in words, its pictures, its numbers, its recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import entrecipes.recipe.schema  # noqa: F401 (it registers the choices)
from entrecipes.evaluation.result import Metric
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.changes import differences
from entrecipes.report import facts
from entrecipes.report.assets import DRAWERS
from entrecipes.report.blocks import PICTURES as BLOCKS
from entrecipes.report.blocks import BlockRun
from entrecipes.report.comparison.tables import Table
from entrecipes.report.experts import PICTURES as EXPERTS
from entrecipes.report.experts import experts
from entrecipes.report.gallery import images
from entrecipes.report.gallery.folder import Place, TolerantFolder
from entrecipes.report.gallery.plots import draw_profile
from entrecipes.report.pruning import pruned
from entrecipes.report.stickers import KIND, kind, stickers
from entrecipes.report.stickers import PICTURES as ODDS

EARLIER_GRIDS = 4
"""Sample grids shown beside the last one, spread evenly over the run."""
WINGS = {
    "noise": ("noise",),
    "blocks": ("blocks",),
    "adapter": ("blocks", "adapter"),
    "prune": ("prune",),
    "experts": ("experts",),
    "curriculum": ("curriculum",),
    "masks": ("masks",),
}
"""The wings in whose words a run's method is told, and where they stand in a recipe."""
PLAIN = ("all", "none", None)
CURVES = {
    "loss": "Training loss against images seen",
    "held_out_nats": "Denoising error in nats against images seen",
    "throughput": "Images per second against images seen",
}
NOISE = {
    "profile": "Nats at each noise level over the images seen, as colour; if learned, with the window of the draws",
    "noise_levels": "Nats per unit log sigma against log sigma",
    "noise_density": "Density of the trained noise levels against images seen",
    "noise_profile": "Information rate, learned density and base against sigma",
    "noise_convergence": "Change of the schedule at each rebuild, and its share below the pivot",
}
GROUPS = {
    "Curves": CURVES,
    "Noise": NOISE,
    "Blocks": {"block_map": "Life of each block over the training, and its scores"} | BLOCKS,
    "Experts": EXPERTS,
    "Curriculum": ODDS,
}
"""Pictures under their headings, each with what it shows."""


@dataclass
class Group:
    """A heading with pictures `(source, alternative text, caption)`, facts and tables below it."""

    title: str
    pictures: list[tuple[str, str, str]] = field(default_factory=list)
    rows: facts.Rows = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


class GalleryRun:
    """A run folder, read as far as it can be.

    Args:
        place: Where it is.
        label: What the page calls it, unlike all others.
        series: What runs of one method share; they are drawn alike.
        number: Its place in the page, from 0.
        assets: Folder that its pictures are drawn into.
    """

    def __init__(self, place: Place, label: str, series: str, number: int, assets: Path) -> None:
        self.folder = TolerantFolder(place.path, assets)
        self.label, self.series, self.id = label, series, f"run-{number + 1}"
        self.recipe: dict[str, Any] = self.folder.recipe if self.folder.has("recipe.yaml") else {}
        self.about: dict[str, Any] = self.folder.run if self.folder.finished else {}
        self.metrics: list[Metric] = self.folder.attempt("metrics", lambda: facts.metrics(self.folder)) or []

    # -- words --------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.folder.finished

    @property
    def description(self) -> str:
        """Of its recipe."""
        return self.about.get("description") or self.recipe.get("description", "")

    @property
    def state(self) -> str:
        """Empty for a finished run, otherwise how far it has come."""
        if self.finished:
            return ""
        goal = (self.recipe.get("training") or {}).get("images")
        share = f" of {goal:,} ({self.folder.images / goal:.0%})" if goal else ""
        return f"unfinished: {self.folder.images:,}{share} images seen"

    @cached_property
    def method(self) -> list[tuple[str, str]]:
        """Pairs of a wing and its choice, the plain ones left out except for the noise."""
        found = []
        for wing, path in WINGS.items():
            section: Any = self.recipe
            for key in path:
                section = section.get(key) if isinstance(section, Mapping) else None
            name = section.get("type") if isinstance(section, Mapping) else None
            if name not in PLAIN:
                found.append((wing, str(name)))
        return found

    @property
    def method_rows(self) -> facts.Rows:
        """The same with what each choice means, and where it comes from."""
        rows = []
        for wing, name in self.method:
            entry = REGISTRY.get(wing, {}).get(name)
            said = f": {entry.summary}" + (f" [{entry.paper}]" if entry.paper else "") if entry else ""
            rows.append((wing.capitalize(), f"{name}{said}"))
        return rows

    @property
    def speed_rows(self) -> facts.Rows:
        """Size, speed and memory, as far as they are known."""
        return self.folder.attempt("run.json", lambda: facts.speed_rows(self.about)) or [] if self.about else []

    def number(self, key: str) -> float | None:
        """A number of run.json or, while the run goes on, of its last log line."""
        value = self.about.get(key)
        last = (self.folder.metrics("train") or [{}])[-1] if not self.about and self.folder.has("metrics.jsonl") else {}
        value = last.get(key) if value is None else value
        return value if isinstance(value, (int, float)) else None

    @property
    def held_out(self) -> str:
        """The last and best held-out nats in a sentence."""
        return self.folder.attempt("held-out rows", lambda: facts.held_out_text(self.folder)) or ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was opened, closed or removed, and every start."""
        return self.folder.metrics("event") if self.folder.has("metrics.jsonl") else []

    # -- pictures -----------------------------------------------------------------------------------------------------

    @cached_property
    def kind(self) -> str:
        """`images`, `sequences`, `clips` or `stickers`."""
        return (self.folder.attempt("recipe.yaml: data", lambda: kind(self.folder)) if self.recipe else "") or "images"

    @cached_property
    def samples(self) -> list[tuple[str, str]]:
        """Labels and sources of the sample grids that can be read, oldest first; earlier ones thinned out."""
        paths = self.folder.samples
        earlier, last = paths[:-1], paths[-1:]
        if last and last[0][0] == "final" and earlier and earlier[-1][1].read_bytes() == last[0][1].read_bytes():
            earlier = earlier[:-1]  # the final grid is a copy of it
        step = max(1, -(-len(earlier) // EARLIER_GRIDS))
        shown = [*earlier[::step], *last]
        read = [(label, self._read(path, images.still)) for label, path in shown]
        return [(label, source) for label, source in read if source]

    def _read(self, path: Path, read: Callable[[Path], str]) -> str | None:
        return self.folder.attempt(f"samples/{path.name}", lambda: read(path))

    @cached_property
    def thumb(self) -> str | None:
        """The corner of the last sample grid."""
        paths = self.folder.samples
        return self._read(paths[-1][1], images.thumb) if paths else None

    @cached_property
    def moving(self) -> str | None:
        """The newest samples in motion."""
        stems = [path.with_suffix("") for _, path in self.folder.samples[::-1]]
        paths = [found for stem in stems for ending in images.MOVING if (found := stem.with_suffix(ending)).is_file()]
        return self._read(paths[0], images.moving) if paths else None

    @property
    def sample_note(self) -> str:
        """What the grid shows."""
        return facts.FILM_STRIPS.get(self.kind, "Generated samples; all grids of a run start from the same noise") + "."

    @property
    def moving_note(self) -> str:
        """What the animation shows."""
        return facts.MOVING.get(self.kind, "Samples in motion") + "."

    @cached_property
    def captions(self) -> list[str]:
        """The texts of the grid's clips."""
        found = self.folder.attempt("captions", lambda: facts.captions(self.folder)) if self.kind == KIND else None
        return found or []

    @cached_property
    def groups(self) -> list[Group]:
        """Everything else that there is to see, under its headings."""
        groups = {title: Group(title) for title in GROUPS}
        for title, pictures in GROUPS.items():
            for name, alt in pictures.items():
                if name in self._drawn:
                    source = self.folder.attempt(f"{name}.png", lambda n=name: images.plot(self._drawn[n]))
                    caption = "" if title == "Curves" else f"{alt}."  # there the title says it
                    groups[title].pictures += [(source, f"{alt}, {self.label}", caption)] if source else []
        tellers: dict[str, list[Callable[[TolerantFolder], Any]]] = {
            "Blocks": [pruned, _blocks],
            "Experts": [experts],
            "Curriculum": [stickers],
        }
        for title, tell in ((title, tell) for title, found in tellers.items() for tell in found):
            what = f"{title.lower()} ({tell.__name__.strip('_')})"
            if told := self.folder.attempt(what, lambda tell=tell: tell(self.folder)):
                groups[title].rows += self.folder.attempt(what, told.rows) or []
                groups[title].tables += self.folder.attempt(what, told.tables) or []
        return [group for group in groups.values() if group.pictures or group.rows]

    @cached_property
    def _drawn(self) -> dict[str, Path]:
        drawn: dict[str, Path] = {}
        for drawer in (*DRAWERS, draw_profile):
            what = drawer.__name__.removeprefix("draw_").replace("_", " ")
            drawn |= self.folder.attempt(what, lambda drawer=drawer: drawer(self.folder)) or {}
        return drawn

    # -- recipe -------------------------------------------------------------------------------------------------------

    @property
    def recipe_text(self) -> str:
        """As its author wrote it, otherwise as it was resolved."""
        if self.folder.has("recipe.source.yaml"):
            return self.folder.recipe_text.strip()
        return self.folder.resolved_text.strip() if self.recipe else ""

    def changes(self, first: GalleryRun) -> list[tuple[str, str, str]]:
        """Dotted keys in which its resolved recipe differs from the first run's, with both values."""
        if first is self or not (self.recipe and first.recipe):
            return []
        return [(key, _text(old), _text(new)) for key, old, new in differences(first.recipe, self.recipe)]


def _blocks(folder: TolerantFolder) -> BlockRun | None:
    """What a block schedule tells; None where all weights were trained all the time."""
    run = BlockRun(folder)
    return run if run.title else None


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "not set"
    return json.dumps(value, ensure_ascii=False)
