"""Verbs on several processes: through `accelerate launch`, or as one of those that a launcher has started."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

    from entrecipes.evaluation.generation import Shard


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--accelerate`."""
    parser.add_argument(
        "--accelerate", metavar="FILE", help="share the work: launch through Accelerate with this config (or: ddp)"
    )


def again(args: argparse.Namespace, verb: str) -> int:
    """The same command line in the processes of `--accelerate`; returns the launcher's exit code."""
    words = list(args.words)
    at = next(i for i, word in enumerate(words) if word.startswith("--accelerate"))
    return launch(args.accelerate, [verb, *words[:at], *words[at + (1 if "=" in words[at] else 2) :]])


def launch(config: str, words: Sequence[str]) -> int:
    """Start `entrecipes WORDS` through `accelerate launch`; returns its exit code.

    Args:
        config: A file, or the name of one that comes with entrecipes.
        words: A verb and its arguments.

    Raises:
        UserError: For a config that there isn't.
    """
    from entrecipes.recipe.load import RECIPES

    path = Path(config)
    if not path.exists():
        path = RECIPES / "accelerate" / f"{config}.yaml"
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"--accelerate {config}: no such file; the configs that come with entrecipes: {names}")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "-m", "entrecipes"]
    with subprocess.Popen([*start, *words]) as launcher:
        # Ctrl-C reaches the launcher from the terminal itself; what asks this process alone to end is passed on
        before = signal.signal(signal.SIGTERM, lambda number, frame: launcher.send_signal(number))
        try:
            return launcher.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def joined() -> Iterator[tuple[PartialState, Shard]]:
    """accelerate's state of this process, and its share of a measurement; all of it where nothing was launched.

    Raises:
        UserError: For processes that do not know of each other.
    """
    from accelerate import PartialState

    from entrecipes.diffusion.pipelines import best_device
    from entrecipes.evaluation.generation import Shard
    from entrecipes.training.launched import LONGEST_WAIT

    state = PartialState(cpu=best_device().type == "cpu", timeout=LONGEST_WAIT)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise UserError(
            f"{launched} processes were launched, but each believes to be one of {state.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true, or launch with --accelerate ddp"
        )
    try:
        yield state, Shard.here()
    finally:
        state.destroy_process_group()
