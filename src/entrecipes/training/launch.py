"""From a loaded recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torch.distributed import DistError

from entrecipes.errors import UserError
from entrecipes.recipe.load import LoadedRecipe
from entrecipes.training.checkpoint import listed
from entrecipes.training.loop import train
from entrecipes.training.publish import publish
from entrecipes.training.pushing import push_when_asked
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.tracking import Listener

logger = logging.getLogger(__name__)

LOCK = ".training"
"""Held while a run is trained into the folder."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
"""What torch says when a process that it waits for is gone."""


class Interrupted(Exception):
    """The run was asked to stop, and left a checkpoint."""


def run_folder(loaded: LoadedRecipe) -> Path:
    """Where a recipe's run goes: `training.output`, or `outputs/` and the recipe's name."""
    return Path(loaded.recipe.training.output or f"outputs/{loaded.name}")


def run_recipe(loaded: LoadedRecipe, listener: Listener | None = None, last: bool = True) -> Path:
    """Train, measure, publish.

    Args:
        loaded: The recipe with its name and text.
        listener: Called with every log row, in the main process.
        last: Whether processes part after it; otherwise another run follows in them.

    Returns:
        The run folder.

    Raises:
        UserError: For whatever does not fit, before training; or a diverged loss, or a disk that is full.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint.
    """
    recipe, folder = loaded.recipe, run_folder(loaded)
    run = Run(recipe, folder, listener)
    with _begun(run, loaded):
        with stopping_at_signals(run), naming_losses(run):
            train(run)
        if run.stop_requested and run.images < recipe.training.images:
            how = "" if recipe.training.resume == "auto" else " with training.resume=auto"
            raise Interrupted(f"stopped at image {run.images}; the same command{how} goes on from there")
        publish(run, loaded.name)
    if last:
        run.accelerator.end_training()
        if run.accelerator.is_main_process:
            push_when_asked(recipe, folder)
    else:  # which would end the processes' connection, too
        for tracker in run.accelerator.trackers:
            tracker.finish()
    return folder


@contextlib.contextmanager
def _begun(run: Run, loaded: LoadedRecipe) -> Iterator[None]:
    """Resume or make room, write the recipe down, and keep others out of the folder. Raises UserError."""
    recipe, folder, main, lock = loaded.recipe, run.folder, run.accelerator.is_main_process, None
    if main:
        check_free(folder)
    resumed = resume(run)
    if main:
        try:
            if resumed is None:
                make_room(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder)
            (folder / "recipe.yaml").write_text(loaded.resolved_yaml())
            (folder / "recipe.source.yaml").write_text(loaded.text)
        except OSError as error:
            raise UserError(f"{folder}: can't write there ({error}); set training.output") from error
    run.accelerator.wait_for_everyone()
    if recipe.training.trackers:
        run.log.start_trackers(loaded.name, recipe.model_dump(mode="json"), folder)
    if resumed and main:
        logger.info("going on from %s", resumed)
    try:
        yield
    finally:
        if lock:
            lock.close()


def hold(folder: Path) -> IO[str] | None:
    """A lock on a run folder, which ends with this process; None where another process has it."""
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a disk without locks
        pass
    return file


def check_free(folder: Path) -> None:
    """Raises UserError where another process trains into the folder."""
    if not (folder / LOCK).exists():
        return
    lock = hold(folder)
    if lock is None:
        raise UserError(
            f"{folder}: another process is still training into it (perhaps what is left of a launch that was killed: "
            "`pgrep -f entrecipes` finds it); wait for it or stop it, or set training.output"
        )
    lock.close()


def make_room(folder: Path) -> None:
    """Move an earlier run that left anything of worth aside: nothing is mixed, nothing is lost."""
    worth = ("pipeline", "adapter", "base", "search")
    if listed(folder / "checkpoints") or any((folder / name).exists() for name in worth):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
            number += 1
        folder.rename(aside)
        logger.warning("%s held an earlier run, which is now %s", folder, aside)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "samples", ignore_errors=True)


@contextlib.contextmanager
def naming_losses(run: Run) -> Iterator[None]:
    """Say in words that another process is gone, where torch would show the trace of this one, which waited for it.

    Raises:
        UserError: Then.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistError) or any(sign in str(error) for sign in LOST)
        if run.world_size == 1 or not lost:
            raise
        reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise UserError(
            f"another of this run's {run.world_size} processes has ended or hangs; what it said last, above or in its "
            f"own log, tells why. The checkpoints in {run.folder} are whole, and the same command goes on from the "
            f"newest ({reason})"
        ) from error


@contextlib.contextmanager
def stopping_at_signals(run: Run) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a stop after the current step; a second one stops at once.

    Several processes are left alone: they would not stop at the same step, so their launcher ends them and the last
    checkpoint holds.
    """
    names = (signal.SIGINT, signal.SIGTERM) if run.world_size == 1 else ()
    previous = {name: signal.getsignal(name) for name in names}

    def restore() -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)

    def stop(number: int, frame: object) -> None:
        run.stop_requested = True
        restore()

    for name in names:
        signal.signal(name, stop)
    try:
        yield
    finally:
        restore()
