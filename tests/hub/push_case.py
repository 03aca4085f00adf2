"""Tiny runs to push, and what is looked at afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from server import TOKEN, Hub

from entrecipes.cli import main
from entrecipes.recipe.load import load
from entrecipes.recipe.schema import Recipe


def trained(folder: Path, recipe: dict, *overrides: str) -> Path:
    """A run of the recipe, in this process."""
    path = folder / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), f"training.output={folder / 'run'}", *overrides]) == 0
    return folder / "run"


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path | str, revision: str | None = None) -> torch.Tensor:
    """The last of the weights of a pipeline, loaded by plain diffusers from a folder or from the Hub."""
    return list(DiffusionPipeline.from_pretrained(str(folder), revision=revision).transformer.parameters())[-1]


def asks(run: Path, *keys: str) -> Recipe:
    """Set keys of `hub:` in a run's recipe; the recipe."""
    loaded = load(run / "recipe.yaml", [f"hub.{key}" for key in keys])
    (run / "recipe.yaml").write_text(loaded.resolved_yaml())
    return loaded.recipe


def token_in(folder: Path, hub: Hub) -> list[str]:
    """Files of a folder and of the repository that the token is written in."""
    contents = {name: (folder / name).read_bytes() for name in hashes(folder)}
    return [
        name
        for files in (contents, hub.repository("me/tiny").files())
        for name in files
        if TOKEN.encode() in files[name]
    ]


def titles(hub: Hub, revision: str = "main") -> list[str]:
    """Of the commits after the one that the Hub makes itself."""
    return [one.title for one in hub.repository("me/tiny").history(revision)[:-1]]
