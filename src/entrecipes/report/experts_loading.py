"""How a pipeline of experts is loaded: as a whole, without entrecipes, one expert alone, as stock models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PIPELINE_CLASS = "ExpertsPipeline"
DENOISER, STOCK = "denoiser", "stock"


def routes(run: dict[str, Any]) -> bool:
    """Whether the pipeline holds several networks, each for its noise levels."""
    return run["pipeline"]["class"] == PIPELINE_CLASS


def ways_to_load(
    pipeline: Path, stock: Path, place: str, shown_stock: str | None, revision: str | None = None
) -> list[tuple[str, str]]:
    """What there is besides loading it whole with entrecipes, as pairs of a sentence and the Python that does it.

    Args:
        pipeline: The pipeline's folder.
        stock: The folder of the experts as stock models, if there is one.
        place: The pipeline's folder or Hub id, as the card's reader names it.
        shown_stock: The folder of stock models, likewise; None: it is `stock/` in the repository.
        revision: Of the Hub id.
    """
    found = []
    if (pipeline / "pipeline.py").is_file():
        sentence = "Where entrecipes is not installed, diffusers runs the source that lies beside the weights:"
        options = f"custom_pipeline=folder, trust_remote_code=True{at(revision)}{at(revision, 'custom_revision')}"
        lines = [f'folder = "{place}"', f"pipeline = DiffusionPipeline.from_pretrained(folder, {options})"]
        found.append((sentence, _code("from diffusers import DiffusionPipeline", *lines)))
    classes = {expert: _class_of(expert) for expert in experts_in(pipeline / DENOISER)}
    if classes:
        expert, of = next(iter(classes.items()))
        library = "diffusers" if _in_diffusers(of) else "entrecipes"
        load = f'expert = {of}.from_pretrained("{place}", subfolder="{DENOISER}/{expert.name}"{at(revision)})'
        found.append(("One expert alone:", _code(f"from {library} import {of}", load)))
    if copies := experts_in(stock):
        of = _class_of(copies[0])
        sentence = (
            f"In `{shown_stock or STOCK}` the experts are stock models of the base's size, missing channels zero: "
            "the same outputs in plain diffusers, not faster:"
        )
        where = f'"{place}", subfolder="{STOCK}/{copies[0].name}"{at(revision)}'
        load = f"expert = {of}.from_pretrained({where if shown_stock is None else _quoted(shown_stock, copies[0])})"
        found.append((sentence, _code(f"from diffusers import {of}", load)))
    return found


def experts_in(folder: Path) -> list[Path]:
    """The folders of experts, in their order."""
    found = [path for path in folder.glob("expert_*") if (path / "config.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("expert_")))


def at(revision: str | None, name: str = "revision") -> str:
    """The argument that names a revision on the Hub; nothing where that is None."""
    return f', {name}="{revision}"' if revision else ""


def _quoted(folder: str, copy: Path) -> str:
    return f'"{folder}/{copy.name}"'


def _class_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["_class_name"]


def _in_diffusers(name: str) -> bool:
    import diffusers

    return hasattr(diffusers, name)


def _code(first: str, *lines: str) -> str:
    return "\n".join([first, "", *lines])
