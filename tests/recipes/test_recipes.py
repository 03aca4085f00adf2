"""Every recipe that we publish: valid, its header's commands load it, and it builds and steps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from entrecipes.cli import main
from entrecipes.recipe.load import load
from entrecipes.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


def commands(path: Path) -> list[list[str]]:
    """The training commands in a recipe's header comment, as words."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    found = [line for line in header if line.startswith(("entrecipes run ", "accelerate launch "))]
    return [shlex.split(line, comments=True) for line in found]


def embedded(recipe: Recipe) -> list[str]:
    """What puts data that travels with the package in the place of what would have to be prepared or downloaded."""
    config = "pipeline.build.model.config"
    if recipe.data.type in ("sequences", "hub_sequences"):
        small = ["evaluation.held_out.images=4", f"{config}.num_layers=2"]
        return ["data={type: sequences, name: pride}", f"{config}.alphabet={' abcdefghijklmnopqrstuvwxyz'!r}", *small]
    if recipe.data.type == "digits":
        return []
    changes = ["data.type=digits", "data.held_out=0.1"]
    if recipe.pipeline.build.model.config.get("num_class_embeds"):
        changes.append(f"{config}.num_class_embeds=10")
    if recipe.evaluation.features.type != "efficientnet_lite0":
        changes.append("evaluation.features={type: efficientnet_lite0}")
    return changes


def narrow(recipe: Recipe) -> list[str]:
    """What makes a paper-sized UNet one that steps on a CPU: as deep, but narrow."""
    widths = recipe.pipeline.build.model.config.get("block_out_channels", [])
    if 256 not in widths:
        return []
    config = "pipeline.build.model.config"
    small = [f"{config}.block_out_channels={[32] * len(widths)}", f"{config}.attention_head_dim=8"]
    return [*small, "evaluation.held_out.images=4", "evaluation.held_out.noise_levels=4"]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_commands_name_this_recipe_and_dry_run(path, capsys, monkeypatch, tmp_path):
    """On the embedded digits at the recipe's own size where its data would have to be prepared first; small batches."""
    assert commands(path), "a recipe's header says how to run it"
    quick = ["training.batch_size=4", "training.precision=no"]
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        arguments = words[2:] if words[0] == "entrecipes" else words[words.index("scripts/train.py") + 1 :]
        loaded = load(arguments[0], arguments[1:])
        assert loaded.path.resolve() == path.resolve() and not loaded.warnings
        assert main(["run", *arguments, *quick, *embedded(loaded.recipe), *narrow(loaded.recipe), "--dry-run"]) == 0
        assert "nothing was written to the run folder" in capsys.readouterr().out


def test_all_recipes_validate_and_are_counted(capsys):
    assert main(["validate", str(ROOT / "recipes")]) == 0
    assert f"{len(RECIPES)} recipes" in capsys.readouterr().out


def test_every_topic_has_a_page():
    assert len(RECIPES) >= 5
    for folder in {path.parent for path in RECIPES}:
        assert (folder / "README.md").exists(), folder
