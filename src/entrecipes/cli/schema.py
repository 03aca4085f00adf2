"""`entrecipes schema`: the JSON Schema from which editors complete and check recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from entrecipes.errors import UserError
from entrecipes.recipe.load import json_schema

HELP = "print the JSON Schema of recipes, for editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    text = json.dumps(json_schema(), indent=2)
    if args.output is None:
        print(text)
        return 0
    try:
        args.output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.output}: can't be written ({error.strerror})") from error
    print(f"written to {args.output}; recipes name it in a first line `# yaml-language-server: $schema={args.output}`")
    return 0
