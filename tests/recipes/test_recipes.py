"""Every recipe that we publish: valid, and its header's commands work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from entrecipes.recipe.load import load

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")


def commands(path: Path) -> list[list[str]]:
    """The commands in a recipe's header comment, as words; what follows two spaces and a # is a remark."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    found = [line for line in header if line.startswith(("entrecipes run ", "accelerate launch "))]
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_header_commands_name_this_recipe_and_load(path):
    assert commands(path), "a recipe's header says how to run it"
    for words in commands(path):
        arguments = words[2:] if words[0] == "entrecipes" else words[words.index("scripts/train.py") + 1 :]
        assert load(arguments[0], arguments[1:]).path.resolve() == path.resolve()


def test_every_topic_has_a_page():
    assert len(RECIPES) >= 4
    for folder in {path.parent for path in RECIPES}:
        assert (folder / "README.md").exists(), folder
