"""`entrecipes cp`: a recipe of your own to change."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from entrecipes.errors import UserError
from entrecipes.recipe.load import base_of, load, packaged

HELP = "copy a recipe into a file of your own, to change it there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that comes with entrecipes")
    parser.add_argument("destination", nargs="?", type=Path, default=Path("."), help="file or folder (default: here)")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    loaded = load(args.recipe)
    destination = args.destination / loaded.path.name if args.destination.is_dir() else args.destination
    if destination.exists() and not args.force:
        raise UserError(f"{destination} exists; give another name, or overwrite it with --force")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text(_with_base_in_reach(loaded.text, loaded.path, destination), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{destination}: can't be written ({error.strerror})") from error
    print(f"copied to {destination}; next: entrecipes validate {destination}")
    return 0


def _with_base_in_reach(text: str, source: Path, destination: Path) -> str:
    """The text whose `extends:`, if any, means the same file from `destination`: a packaged name or a relative path."""
    match = re.search(r"""^extends:[ ]*("[^"\n]*"|'[^'\n]*'|[^\s#]+)""", text, re.MULTILINE)
    if not match:
        return text
    base = base_of(source, match[1].strip("\"'")).resolve()
    names = {path.resolve(): name for name, path in packaged().items()}
    reachable = names.get(base) or Path(os.path.relpath(base, destination.parent.resolve())).as_posix()
    written = f'"{reachable}"' if " " in reachable else reachable
    return text[: match.start(1)] + written + text[match.end(1) :]
