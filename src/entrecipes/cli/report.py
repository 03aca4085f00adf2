"""`entrecipes report`: one HTML page about any number of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "one HTML page about any number of runs and comparisons: samples, curves, tables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    what = "run folders, finished or not, and folders that `entrecipes compare` wrote"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
    page = Path("gallery.html")
    parser.add_argument("-o", "--output", type=Path, default=page, help=f"the page (default: {page})")
    parser.add_argument("--title", default="", help="its heading (default: the runs' names)")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    from entrecipes.report.gallery.page import HEAVY, counted, write_gallery

    gallery = write_gallery(args.runs, args.output, args.title)
    for problem in gallery.problems:
        print(f"warning: {problem}", file=sys.stderr)
    counts = counted(run=gallery.runs, comparison=gallery.comparisons, picture=gallery.pictures)
    print(f"{gallery.path}: {counts}, {gallery.bytes / 2**20:.1f} MB")
    if gallery.bytes > HEAVY:
        print(
            f"warning: above {HEAVY / 2**20:.0f} MB, which opens slowly on a phone: give fewer runs to a page",
            file=sys.stderr,
        )
    return 0
