"""Every recipe that we publish: valid, its header's commands load it, and it builds and steps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from entrecipes.cli import main
from entrecipes.recipe.load import load

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


def commands(path: Path) -> list[list[str]]:
    """The training commands in a recipe's header comment, as words."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    found = [line for line in header if line.startswith(("entrecipes run ", "accelerate launch "))]
    return [shlex.split(line, comments=True) for line in found]


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
        embedded = [] if loaded.recipe.data.type == "digits" else ["data.type=digits"]
        assert main(["run", *arguments, *quick, *embedded, "--dry-run"]) == 0
        assert "nothing was written to the run folder" in capsys.readouterr().out


def test_all_recipes_validate_and_are_counted(capsys):
    assert main(["validate", str(ROOT / "recipes")]) == 0
    assert f"{len(RECIPES)} recipes" in capsys.readouterr().out


def test_every_topic_has_a_page():
    assert len(RECIPES) >= 5
    for folder in {path.parent for path in RECIPES}:
        assert (folder / "README.md").exists(), folder
