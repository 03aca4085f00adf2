"""The gallery: one HTML page of any number of runs and comparisons, with everything in it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrecipes.errors import UserError
from entrecipes.report import facts
from entrecipes.report.comparison.page import PLOTS
from entrecipes.report.gallery import images
from entrecipes.report.gallery.folder import ComparisonFolder, Place, find
from entrecipes.report.gallery.plots import UNITS, overlay
from entrecipes.report.gallery.run import GalleryRun
from entrecipes.report.gallery.table import Column, columns, comparison_table, summary
from entrecipes.report.report import template

HEAD = ("images", "images/s", "peak GiB", "parameters")
"""Headings between a run's method and its metrics."""
HEAVY = 25 * 2**20
"""Bytes from which a page is slow to open on a phone, and too large for most mail."""


@dataclass(frozen=True)
class Gallery:
    """What was written.

    Args:
        path: The page.
        bytes: Its size.
        runs: Runs in it.
        comparisons: Comparisons in it.
        pictures: Pictures and animations in it.
        problems: What was missing or damaged, each with its run.
    """

    path: Path
    bytes: int
    runs: int
    comparisons: int
    pictures: int
    problems: tuple[str, ...]


def write_gallery(folders: Sequence[str | Path], path: str | Path, title: str = "") -> Gallery:
    """Write one self-contained page about run folders, finished or not, and comparisons' folders.

    Nothing is written into the folders. What is missing or damaged in them is named in the page.

    Args:
        folders: Run folders, or folders that `entrecipes compare` wrote, whose runs are shown too.
        path: The page, `*.html`; a folder gets a `gallery.html`.
        title: Its heading; empty: the runs' names.

    Raises:
        UserError: For a folder that is neither, no folder at all, or a page that is not named `*.html`.
        OSError: When the page can't be written.
    """
    path = Path(path)
    path = path / "gallery.html" if path.is_dir() else path
    if path.suffix != ".html":
        raise UserError(f"{path}: the gallery is one HTML file; name it {path.stem}.html")
    places, comparisons = find([Path(folder) for folder in folders])
    with tempfile.TemporaryDirectory() as assets:
        runs = [
            GalleryRun(place, label, series, number, Path(assets) / str(number))
            for number, (place, (label, series)) in enumerate(zip(places, _labels(places), strict=True))
        ]
        shown = columns(runs)
        compared = [_compared(comparison) for comparison in comparisons]
        page: dict[str, Any] = {
            "title": title or _title(places, runs, comparisons),
            "runs": runs,
            "facts": facts,
            "counts": counted(run=len(runs), comparison=len(comparisons)),
            "head": HEAD,
            "columns": shown,
            "summary": summary(runs, shown),
            "overlays": _overlays(runs, shown, Path(assets)),
            "comparisons": compared,
        }
        html = template("gallery/gallery.html.jinja").render(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    problems = [f"{run.label}: {problem}" for run in runs for problem in run.folder.problems]
    problems += [f"{comparison.name}: {problem}" for comparison in comparisons for problem in comparison.problems]
    count = html.count("<img ")
    return Gallery(path, len(html.encode()), len(runs), len(comparisons), count, tuple(problems))


def counted(**counts: int) -> str:
    """`3 runs, 1 comparison`."""
    return ", ".join(f"{count:,} {word}{'s' * (count != 1)}" for word, count in counts.items() if count)


def _labels(places: Sequence[Place]) -> list[tuple[str, str]]:
    """For each run what it is called, unlike all others, and the series that it belongs to.

    A run is called by its path below `outputs`, or by the end of its path; by more of it where that does not tell it
    from the others.
    """
    own = {place.path.resolve(): _from_outputs(place.path.resolve()) for place in places if not place.arm}
    more = 0
    while len({path.parts[-depth - more :] for path, depth in own.items()}) < len(own):
        more += 1
    found = []
    for place in places:
        path = place.path.resolve()
        name = place.arm or "/".join(path.parts[-own[path] - more :])
        found.append((f"{name} seed {place.seed}" if place.arm else name, name))
    double = Counter(label for label, _ in found)  # arms of two comparisons
    tails = [f" ({number})" if double[label] > 1 else "" for number, (label, _) in enumerate(found, start=1)]
    return [(label + tail, series + tail) for (label, series), tail in zip(found, tails, strict=True)]


def _from_outputs(path: Path) -> int:
    """Parts of a path below the folder that runs go into; 1 where it is in none."""
    parts = path.parts[::-1]
    return max(1, parts.index("outputs")) if "outputs" in parts else 1


def _title(places: Sequence[Place], runs: Sequence[GalleryRun], comparisons: Sequence[ComparisonFolder]) -> str:
    names = [comparison.name for comparison in comparisons]
    names += [run.label for place, run in zip(places, runs, strict=True) if not place.arm]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _overlays(runs: Sequence[GalleryRun], shown: Sequence[Column], assets: Path) -> list[tuple[str, str, str]]:
    """Curves of all runs over one another, against images and seconds: the loss, then each metric of a data set."""
    styles = list(dict.fromkeys(run.series for run in runs))
    wanted: dict[tuple[str, str], dict[str, list[GalleryRun]]] = {("loss", ""): {"": list(runs)}}
    for column in shown:
        ways = wanted.setdefault((column.name, column.data), {})
        ways[column.note] = [run for run in runs if run.id in column.found]
    drawn = []
    for number, ((metric, data), ways) in enumerate(wanted.items()):
        whose = [run for found in ways.values() for run in found]
        curves = [(run.series, curve) for run in whose if (curve := run.folder.curve(metric))]
        if len(curves) < min(2, len(runs)) or not any(len(curve.images) > 1 for _, curve in curves):
            continue
        title = "Training loss" if metric == "loss" else f"{metric}, {data}" if data else metric
        note = f"Measured in {len(ways)} ways ({'; '.join(ways)}): compare shapes." if len(ways) > 1 else ""
        for unit, across in UNITS.items():
            file = overlay(assets / f"overlay-{number}-{unit}.png", title, curves, unit, styles)
            drawn += [(images.plot(file), f"{title} of all runs against {across}", note)] if file else []
    return drawn


def _compared(comparison: ComparisonFolder) -> dict[str, Any]:
    """A comparison's table, notes and pictures, as far as they are there."""
    pictures = []
    for name, alt in PLOTS.items():
        path = comparison.path / f"{name}.png"
        if path.is_file():
            try:
                pictures.append((images.plot(path), alt, f"{alt}."))
            except OSError as error:
                comparison.problems.append(f"{path.name} is damaged ({error})")
    try:
        table = comparison_table(comparison)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        table = None
        comparison.problems.append(f"comparison.json is damaged ({type(error).__name__}: {error})")
    return {"folder": comparison, "table": table, "pictures": pictures, "notes": comparison.record.get("notes", [])}
