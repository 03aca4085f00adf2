"""The report of a run: one HTML file with everything in it, for a finished run or one that is still going on."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2

from entrecipes.report import facts
from entrecipes.report.assets import draw_assets
from entrecipes.report.blocks import BlockRun
from entrecipes.report.experts import experts
from entrecipes.report.pruning import pruned
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.stickers import KIND, kind, stickers

EARLIER_GRIDS = 5
"""Sample grids shown beside the last one, spread evenly over the run."""


def write_report(folder: str | Path) -> Path:
    """Write `report.html` from whatever the run folder holds so far.

    The file embeds its images and style, asks for nothing outside it, and reads on a phone.

    Raises:
        UserError: When a file that is there is damaged (a missing one only leaves its section out).
    """
    folder = RunFolder(folder)
    run = folder.run if folder.has("run.json") else None
    plots = draw_assets(folder)
    samples = [(label, embedded(path)) for label, path in folder.samples]
    html = template("report.html.jinja").render(
        name=run["name"] if run else folder.path.resolve().name,
        description=run["description"] if run else _description(folder),
        run=run,
        facts=facts,
        metrics=facts.metrics(folder),
        held_out=facts.held_out_text(folder),
        noise_schedule=facts.noise_schedule_text(folder),
        samples=samples[-1:],
        earlier_samples=_spread(samples[:-1], EARLIER_GRIDS),
        moving=embedded(folder.moving) if folder.moving else None,
        pruning=pruned(folder),
        blocks=BlockRun(folder),
        experts=experts(folder),
        stickers=stickers(folder),
        kind=kind(folder),
        captions=facts.captions(folder) if kind(folder) == KIND else [],
        plots={name: embedded(path) for name, path in plots.items()},
        events=folder.metrics("start", "event"),
        last=(folder.metrics("train") or [None])[-1],
        recipe=folder.recipe_text.strip() if folder.has("recipe.source.yaml") else None,
        resolved=folder.resolved_text if folder.has("recipe.yaml") else None,
        card=folder.has("README.md"),
    )
    path = folder.path / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def template(name: str) -> jinja2.Template:
    """A template of this folder; pages in HTML are escaped, others are not."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    escape = name.endswith(".html.jinja")
    return jinja2.Environment(loader=folder, autoescape=escape, trim_blocks=True, lstrip_blocks=True).get_template(name)


def _description(folder: RunFolder) -> str:
    return folder.recipe.get("description", "") if folder.has("recipe.yaml") else ""


def embedded(path: Path) -> str:
    """A PNG or GIF as the source of an `<img>`, so that the page needs no other file."""
    return f"data:image/{path.suffix[1:]};base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first among them."""
    step = max(1, -(-len(items) // count))
    return items[::step]
