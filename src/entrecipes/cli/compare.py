"""`entrecipes compare`: which recipe needs fewer images and seconds to the same quality."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.errors import UserError

if TYPE_CHECKING:
    from entrecipes.report.comparison.arms import ArmRun
    from entrecipes.report.comparison.comparison import Comparison

HELP = "train recipes under equal conditions and compare them: images and seconds to the same quality"
ARM = "--arm edm infonoise/text 'noise={type: log_normal}'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE | key=value",
        help="arms named like their recipe (or a run folder that is there already), and changes to all arms",
    )
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME RECIPE",
        help=f"a named arm, with changes of its own and finished run folders to reuse: {ARM}",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="N", help="how many (3: seeds 0, 1, 2), or which (0 1 2); default 3"
    )
    parser.add_argument("--baseline", metavar="NAME", help="the arm that the others are measured against (the first)")
    parser.add_argument("--metric", default="heldout_nats", help="what is compared (%(default)s)")
    parser.add_argument("--target", type=float, help="the quality to reach (the baseline's final one, seed by seed)")
    parser.add_argument("-o", "--output", type=Path, help="folder of runs and report (outputs/compare/FIRST_ARM)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="give each arm as many images as it trains on in S seconds, timed first (else: the images of the recipes)",
    )
    parser.add_argument("--unequal", action="store_true", help="compare arms of different budget, data or evaluation")
    parser.add_argument("--report-only", action="store_true", help="train nothing: report what has finished so far")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    seeds, spilled = _seeds(args.seeds or ())
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one run at a time")
    words = [*args.recipes, *spilled]
    arms = _arms([word for word in words if not _is_change(word)], args.arm)
    output = args.output or Path("outputs/compare") / next(iter(arms))

    from entrecipes.training.compare import compare

    with _interruptible():
        comparison = compare(
            arms,
            seeds,
            output=output,
            overrides=[word for word in words if _is_change(word)],
            baseline=args.baseline,
            metric=args.metric,
            target=args.target,
            jobs=args.jobs,
            unequal=args.unequal,
            seconds=args.seconds,
            train=not args.report_only,
            listener=_say,
            tell=functools.partial(print, flush=True),
            command=_command(args, words),
        )
    if not any(run.finished for run in comparison.runs):
        said = next((run.message for run in comparison.runs if run.message), "no run has finished yet")
        raise UserError(f"nothing to compare: {said} (see {output / 'logs'})")
    from entrecipes.report.comparison.page import write_comparison

    paths = write_comparison(comparison, output)
    _print(comparison, paths)
    failed = [run for run in comparison.runs if run.state == "failed"]
    return 1 if failed else 0


def _seeds(words: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """The seeds of `--seeds`, and the recipes and changes that argparse gave to it because they stood behind."""
    numbers = [int(word) for word in words if word.isdigit()]
    others = [word for word in words if not word.isdigit()]
    if words and not numbers:
        raise UserError("--seeds: say how many (--seeds 3), or which (--seeds 0 1 2)")
    if len(numbers) == 1 and not numbers[0]:
        raise UserError("--seeds 0: that is no seed at all; `--seeds 1` is seed 0 alone")
    return (list(range(numbers[0])) if len(numbers) == 1 else numbers or None), others


def _is_change(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _arms(recipes: Sequence[str], named: Sequence[Sequence[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """By name: sources and own changes, the unnamed recipes first."""
    from entrecipes.recipe.load import load

    found = []
    for recipe in recipes:
        path = Path(recipe)
        found.append((path.name if path.is_dir() else load(recipe).name, [recipe], []))
    for name, *words in named:
        changes = [word for word in words if _is_change(word)]
        sources = [word for word in words if not _is_change(word)]
        if _is_change(name) or not sources:
            raise UserError(f"--arm {' '.join([name, *words])}: an arm is a name, a recipe and changes, such as {ARM}")
        found.append((name, sources, changes))
    names = [name for name, _, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two arms are called {twice[0]}; name them, such as {ARM}")
    if not found:
        raise UserError(f"what is to be compared? Recipes, or named arms such as {ARM}")
    return {name: (sources, changes) for name, sources, changes in found}


def _command(args: argparse.Namespace, words: Sequence[str]) -> str:
    """The command line, to be repeated."""
    parts = ["entrecipes", "compare", *words]
    for arm in args.arm:
        parts += ["--arm", *arm]
    parts += ["--seeds", *[word for word in args.seeds if word.isdigit()]] if args.seeds else []
    for option, given in {
        "--baseline": args.baseline,
        "--metric": args.metric if args.metric != "heldout_nats" else None,
        "--target": args.target,
        "--output": args.output,
        "--seconds": f"{args.seconds:g}" if args.seconds is not None else None,
        "--jobs": args.jobs if args.jobs > 1 else None,
    }.items():
        parts += [option, str(given)] if given is not None else []
    return shlex.join(parts + ["--unequal"] * args.unequal)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A kill or a closed terminal counts as Ctrl-C: the runs are stopped and leave checkpoints."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) == signal.SIG_DFL]
    for name in names:
        signal.signal(name, interrupt)
    try:
        yield
    finally:
        for name in names:
            signal.signal(name, signal.SIG_DFL)


def _say(arm: str, run: ArmRun) -> None:
    """One line for each run as it ends."""
    if not run.finished:
        print(f"{arm}, seed {run.seed}: FAILED: {run.message}", flush=True)
        return
    nats = run.values.get("heldout_nats")
    quality = f"heldout_nats {nats:.4g} after " if nats is not None else ""
    seconds = run.facts["seconds_training"]
    how = "was there already" if run.reused else f"{seconds:.0f} s of training"
    print(f"{arm}, seed {run.seed}: {quality}{run.facts['images']:,} images, {how}", flush=True)


def _print(comparison: Comparison, paths: dict[str, Path]) -> None:
    from entrecipes.report.comparison.notes import notes
    from entrecipes.report.comparison.tables import headlines, tables

    for table in tables(comparison):
        print(f"\n{table.to_text()}")
    print()
    for sentence in headlines(comparison):
        print(sentence)
    for sentence in notes(comparison):
        print(f"note: {sentence}")
    for path in paths.values():
        print(f"  {path}")
