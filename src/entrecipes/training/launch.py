"""From a loaded recipe to a finished run folder."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path

from entrecipes.errors import UserError
from entrecipes.recipe.load import LoadedRecipe
from entrecipes.training.loop import train
from entrecipes.training.publish import publish
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.tracking import Listener

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop, and left a checkpoint."""


def run_folder(loaded: LoadedRecipe) -> Path:
    """Where a recipe's run goes: `training.output`, or `outputs/` and the recipe's name."""
    return Path(loaded.recipe.training.output or f"outputs/{loaded.name}")


def run_recipe(loaded: LoadedRecipe, listener: Listener | None = None) -> Path:
    """Train, measure, publish.

    Args:
        loaded: The recipe with its name and text.
        listener: Called with every log row, in the main process.

    Returns:
        The run folder.

    Raises:
        UserError: For whatever does not fit, before training; or a diverged loss, or a disk that is full.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint.
    """
    recipe, folder = loaded.recipe, run_folder(loaded)
    run = Run(recipe, folder, listener)
    resumed = resume(run)
    if run.accelerator.is_main_process:
        if resumed is None:
            _make_room(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(loaded.resolved_yaml())
            (folder / "recipe.source.yaml").write_text(loaded.text)
        except OSError as error:
            raise UserError(f"{folder}: can't write there ({error}); set training.output") from error
    run.accelerator.wait_for_everyone()
    if recipe.training.trackers:
        run.log.start_trackers(loaded.name, recipe.model_dump(mode="json"), folder)
    if resumed:
        logger.info("going on from %s", resumed)
    with _stopping_at_signals(run):
        train(run)
    if run.stop_requested and run.images < recipe.training.images:
        raise Interrupted(f"stopped at image {run.images}; the same command goes on from there")
    publish(run, loaded.name)
    run.accelerator.end_training()
    return folder


def _make_room(folder: Path) -> None:
    """Move what an earlier run left aside, so that nothing is mixed and nothing is lost."""
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
            number += 1
        folder.rename(aside)
        logger.warning("%s held an earlier run, which is now %s", folder, aside)


class _stopping_at_signals:
    """Turn the first SIGINT or SIGTERM into a stop after the current step. Several processes are left alone: they would
    not stop at the same step, so their launcher ends them and the last checkpoint holds."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.previous: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> None:
        if self.run.world_size == 1:
            for name in (signal.SIGINT, signal.SIGTERM):
                self.previous[name] = signal.signal(name, self._stop)

    def __exit__(self, *_: object) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.run.stop_requested = True
        for name, handler in self.previous.items():  # a second signal stops at once
            signal.signal(name, handler)
