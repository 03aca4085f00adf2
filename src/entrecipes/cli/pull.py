"""`entrecipes pull`: a pushed run, or any pipeline of the Hub, as a folder here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "download a pushed run, or any pipeline of the Hub, into a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("repository", help="owner/name, or owner/name@revision (branch, tag or commit)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="the folder (outputs/owner--name)")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    from entrecipes.hub.pull import pull

    folder, pulled, changed = pull(args.repository, args.output)
    size = sum(pulled.files.values()) / 2**20
    print(
        f"{len(pulled.files)} files, {size:,.1f} MiB, of {pulled.repo_id} at commit {pulled.commit[:8]} in {folder}"
        + ("" if changed else ": there already")
    )
    for line in _contents(folder):
        print(f"  {line}")
    if any((folder / name).is_file() for name in ("model_index.json", "base.json")):
        print(f"\nentrecipes generate {folder}")
    if (folder / "recipe.yaml").is_file():
        print(f"entrecipes evaluate {folder}")
    return 0


def _contents(folder: Path) -> list[str]:
    """What is in it, for people."""
    lines = []
    if (folder / "model_index.json").is_file():
        lines.append(f"a {json.loads((folder / 'model_index.json').read_text()).get('_class_name')}")
    if (folder / "base.json").is_file():
        lines.append(f"an adapter of {json.loads((folder / 'base.json').read_text()).get('source')}")
    if (folder / "infonoise").is_dir():
        lines.append("a learned noise schedule, infonoise/")
    if (folder / "run.json").is_file():
        facts = json.loads((folder / "run.json").read_text())
        lines.append(f"the run {facts['name']}: {facts['images']:,} images of {facts['data']['name']}")
    return lines
