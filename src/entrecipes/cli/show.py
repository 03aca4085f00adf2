"""`entrecipes show`: a recipe as it is written, or in full."""

from __future__ import annotations

import argparse
import sys

from entrecipes.recipe.load import load

HELP = "print a recipe: as written, or with every default and change in place"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that comes with entrecipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, shown in the full recipe")
    parser.add_argument("--resolved", action="store_true", help="the full recipe, defaults included")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    loaded = load(args.recipe, args.overrides)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(loaded.resolved_yaml() if args.resolved or args.overrides else loaded.text, end="")
    return 0
