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


def ways_to_load(pipeline: Path, stock: Path, place: str, shown_stock: str) -> list[tuple[str, str]]:
    """What there is besides loading it whole with entrecipes, as pairs of a sentence and the Python that does it.

    Args:
        pipeline: The pipeline's folder.
        stock: The folder of the experts as stock models, if there is one.
        place: The pipeline's folder or Hub id, as the card's reader names it.
        shown_stock: The folder of stock models, likewise.
    """
    found = []
    if (pipeline / "pipeline.py").is_file():
        sentence = "Where entrecipes is not installed, diffusers runs the source that lies beside the weights:"
        options = "custom_pipeline=folder, trust_remote_code=True"
        lines = [f'folder = "{place}"', f"pipeline = DiffusionPipeline.from_pretrained(folder, {options})"]
        found.append((sentence, _code("from diffusers import DiffusionPipeline", *lines)))
    classes = {expert: _class_of(expert) for expert in experts_in(pipeline / DENOISER)}
    if classes:
        expert, of = next(iter(classes.items()))
        library = "diffusers" if _in_diffusers(of) else "entrecipes"
        load = f'expert = {of}.from_pretrained("{place}", subfolder="{DENOISER}/{expert.name}")'
        found.append(("One expert alone:", _code(f"from {library} import {of}", load)))
    if copies := experts_in(stock):
        of = _class_of(copies[0])
        sentence = (
            f"In `{shown_stock}` the experts are stock models of the base's size, their missing channels zero: the "
            "same outputs in plain diffusers, not faster:"
        )
        load = f'expert = {of}.from_pretrained("{shown_stock}/{copies[0].name}")'
        found.append((sentence, _code(f"from diffusers import {of}", load)))
    return found


def experts_in(folder: Path) -> list[Path]:
    """The folders of experts, in their order."""
    found = [path for path in folder.glob("expert_*") if (path / "config.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("expert_")))


def _class_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["_class_name"]


def _in_diffusers(name: str) -> bool:
    import diffusers

    return hasattr(diffusers, name)


def _code(first: str, *lines: str) -> str:
    return "\n".join([first, "", *lines])
