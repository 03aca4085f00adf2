"""`entrecipes validate`: are these recipes right?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from entrecipes.errors import UserError
from entrecipes.recipe.load import display, find, is_recipe, load
from entrecipes.recipe.tree import RecipeError

HELP = "check recipe files and folders of them, and say everything that is wrong"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="recipe files or names, or folders of them")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    paths = [path for argument in args.paths for path in _recipes(Path(argument))]
    problems: list[str] = []
    for path in dict.fromkeys(paths):
        try:
            for warning in load(path).warnings:
                print(f"warning: {warning}", file=sys.stderr)
        except RecipeError as error:
            problems += error.problems
    if problems:  # variants repeat the problems of their base
        raise RecipeError(list(dict.fromkeys(problems)))
    count = len(set(paths))
    print(f"{count} {'recipe' if count == 1 else 'recipes'} valid")
    if count == 1:
        print("(`entrecipes run RECIPE --dry-run` also builds the model and opens the data)")
    return 0


def _recipes(path: Path) -> list[Path]:
    if not path.is_dir():
        return [find(path)]
    visible = (
        candidate
        for candidate in path.rglob("*.yaml")
        if not any(part.startswith(".") for part in candidate.relative_to(path).parts)
    )
    found = sorted(candidate for candidate in visible if is_recipe(candidate))
    if not found:
        raise UserError(f"{display(path)}: no recipe (*.yaml) in this folder; `entrecipes cp digits/demo` makes one")
    return found
