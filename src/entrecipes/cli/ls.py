"""`entrecipes ls`: the recipes that come along, and what a recipe can choose from."""

from __future__ import annotations

import argparse

from entrecipes.errors import UserError, nearest
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.load import load, packaged

HELP = "list the recipes, and the choices of every section that has a `type:`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("what", nargs="?", help=f"only these: recipes, {', '.join(REGISTRY)}")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    topics = {"recipes": _recipes, **{wing: _choices for wing in REGISTRY}}
    if args.what and args.what not in topics:
        hint = nearest(args.what, topics) or "."
        raise UserError(f"there is nothing called '{args.what}' to list{hint} Try: {', '.join(topics)}")
    tables = [(topic, topics[topic](topic)) for topic in ([args.what] if args.what else topics)]
    width = max((len(name) for _, rows in tables for name, _ in rows), default=0)
    blocks = ["\n".join([topic, *(f"  {name:{width}}  {text}" for name, text in rows)]) for topic, rows in tables]
    print("\n\n".join(blocks))
    return 0


def _recipes(topic: str) -> list[tuple[str, str]]:
    return [(name, _description(name)) for name in packaged()]


def _description(name: str) -> str:
    try:
        return load(name).recipe.description
    except UserError:
        return f"(broken: `entrecipes show {name}` says how)"


def _choices(wing: str) -> list[tuple[str, str]]:
    return [
        (entry.name, entry.summary + (f" [{entry.paper}]" if entry.paper else "")) for entry in REGISTRY[wing].values()
    ]
