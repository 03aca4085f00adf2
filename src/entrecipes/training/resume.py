"""What a checkpoint holds, when it may be continued, and how a run goes on from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from entrecipes.errors import UserError
from entrecipes.recipe.changes import HARMLESS, differences
from entrecipes.recipe.curriculum import TaskCurriculumKeys
from entrecipes.recipe.schema import Recipe
from entrecipes.training import checkpoint
from entrecipes.training.run import Run
from entrecipes.training.weights import load_weights, weights

logger = logging.getLogger(__name__)

IDENTITY = (
    "pipeline.",
    "data.",
    "objective.",
    "noise.",
    "blocks.",
    "prune.",
    "curriculum.",
    "masks.",
    "experts.",
    "optimizer.type",
    "training.seed",
    "training.ema",
)
"""Keys that make a run what it is: a change of any is another run."""


def checkpoint_when_due(run: Run, before: int) -> None:
    """Save everything that decides what happens next, on the recipe's cadence, at the end and when asked to stop.

    Raises:
        UserError: When the loss has diverged, or the checkpoint can't be written.
    """
    training = run.recipe.training
    if run.folder and (run.stop_requested or run.due(training.checkpoint_every, before)):
        with run.window.paused():
            state = state_of(run)  # on all processes, since it averages over them
            run.check_finite(state["window"]["sums"][:2].sum().item())
            if run.accelerator.is_main_process:
                checkpoint.save(run.folder / "checkpoints", run.images, state, training.keep_checkpoints)
            run.accelerator.wait_for_everyone()


def state_of(run: Run) -> dict[str, Any]:
    """Everything that decides anything from here on."""
    scaler = run.accelerator.scaler
    return {
        **weights(run),
        "adapter": run.adapter.identity(),
        "noise": run.noise.state_dict(),
        "blocks": run.blocks.state_dict(),
        "prune": run.pruner.state_dict(),
        "curriculum": run.curriculum.state_dict(),
        "window": run.window.state_dict() | {"sums": run.accelerator.reduce(run.window.sums, "mean")},
        "run": {
            "images": run.images,
            "world_size": run.world_size,
            "scaler": scaler.state_dict() if scaler is not None else None,
        },
        "recipe": run.recipe.model_dump(mode="json", by_alias=True),
    }


def resume(run: Run) -> Path | None:
    """Go on from the checkpoint that `training.resume` means, if there is one.

    Returns:
        The checkpoint used, or None when the run starts from the beginning.

    Raises:
        UserError: When the named checkpoint is unusable or belongs to another recipe.
    """
    choice = run.recipe.training.resume
    if choice == "never" or run.folder is None:
        return None
    if choice == "auto":
        found = checkpoint.newest(run.folder / "checkpoints")
    else:
        found = Path(choice), checkpoint.load(Path(choice))
    check_all_see(run, found[1]["run"]["images"] if found else -1)
    if found is None:
        return None
    path, state = found
    for notice in check_continues(path, state, run.recipe, run.world_size):
        logger.warning(notice)
    run.adapter.check_continues(state.get("adapter", {}), path)
    _load(run, path, state)
    if run.accelerator.is_main_process:
        checkpoint.set_aside(run.folder / "checkpoints", beyond=run.images)
    run.log.rewind(run.images)
    return path


def check_all_see(run: Run, images: int) -> None:
    """Raises UserError in all processes where their newest checkpoints (-1: none) are not of the same image."""
    seen = run.accelerator.gather(torch.tensor([images], device=run.device)).tolist()
    if len(set(seen)) > 1:
        known = ", ".join("none" if one < 0 else f"image {one}" for one in sorted(set(seen)))
        raise UserError(
            f"{run.folder}: the processes find different checkpoints there ({known}); set training.output to a disk "
            "that all machines see"
        )


def _load(run: Run, path: Path, state: dict[str, Any]) -> None:
    run.images = state["run"]["images"]
    try:
        run.pruner.load_state_dict(state.get("prune", {}))
        run.curriculum.advance(run.images)  # what is written in the recipe follows from the images seen
        run.curriculum.load_state_dict(state.get("curriculum", {}))
        run.blocks.load_state_dict(state["blocks"])
        run.wrap()
        load_weights(run, state)
        run.noise.load_state_dict(state["noise"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: does not fit this recipe's model or optimizer ({reason}); name another checkpoint, or "
            "training.resume=never"
        ) from error
    if run.accelerator.scaler is not None and state["run"]["scaler"]:
        run.accelerator.scaler.load_state_dict(state["run"]["scaler"])
    run.window.load_state_dict(state["window"])
    run.blocks.focus()


def check_continues(path: Path, state: dict[str, Any], recipe: Recipe, world_size: int) -> list[str]:
    """Compare the checkpoint's recipe and process count with the present ones.

    Args:
        path: The checkpoint, for messages.
        state: What [`checkpoint.load`] gave.
        recipe: The recipe of this run.
        world_size: Its processes.

    Returns:
        Notices about changes under which the run goes on, though not as the uninterrupted one would have.

    Raises:
        UserError: When the checkpoint belongs to another run.
    """
    found = differences(as_now(state["recipe"]), recipe.model_dump(mode="json", by_alias=True))
    changes = [change for change in found if not change[0].startswith(HARMLESS)]
    if harmful := [change for change in changes if change[0].startswith(IDENTITY)]:
        raise UserError(
            f"{path}: belongs to another run ({_said(harmful)}). Start this one afresh with training.resume=never, or "
            "give it another training.output."
        )
    images = state["run"]["images"]
    if changes and images >= recipe.training.images:
        raise UserError(
            f"{path}: already trained to image {images}, with other settings ({_said(changes)}). Go on with a larger "
            "training.images, or start anew with another training.output or training.resume=never."
        )
    lasting = (  # what is a function of the run's length
        recipe.optimizer.schedule.decay in ("cosine", "linear")
        or recipe.prune.type not in ("none", "written")
        or recipe.blocks.type == "entprog"
        or (isinstance(recipe.curriculum, TaskCurriculumKeys) and recipe.curriculum.images is None)
    )
    notices = [
        f"{path.name}: {key} was {old!r} and is now {new!r}: the run goes on from the same image with the new value, "
        "so it will not repeat an uninterrupted one bit for bit"
        for key, old, new in changes
        if key != "training.images" or lasting
    ]
    before = state["run"]["world_size"]
    if before != world_size:
        same = "every step still sees the same images and noise, up to dropout inside the model and rounding"
        if getattr(recipe.data, "streaming", False):
            same = (
                "the stream goes on after as many images, but where each process reads shards of its own, their order "
                "depends on the number of processes: images of this epoch may come again or be left out"
            )
        notices.append(f"{path.name}: written by {before} process{'es' * (before > 1)}, now {world_size}: {same}")
    return notices


def as_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an older version wrote it, with the keys that have come since at their defaults; or as it is."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json", by_alias=True)
    except ValidationError:
        return recipe


def _said(changes: list[tuple[str, Any, Any]]) -> str:
    """In words; of a section that is of another type, only the type."""
    sections = [key.removesuffix("type") for key, _, _ in changes if key.endswith(".type")]
    said = [
        change
        for change in changes
        if not any(change[0].startswith(section) and change[0] != f"{section}type" for section in sections)
    ]
    return "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in said)
