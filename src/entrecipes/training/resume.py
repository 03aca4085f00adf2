"""May a checkpoint be continued under the recipe at hand? What must be equal, and what is only worth a notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe

IDENTITY = ("pipeline.", "data.", "objective.", "noise.", "blocks.", "optimizer.type", "training.seed", "training.ema")
"""Keys that make a run what it is: a change of any is another run."""

HARMLESS = ("description", "license", "data.num_workers", "data.on_device", "evaluation.", "training.log_every",
            "training.checkpoint_every", "training.keep_checkpoints", "training.sample_every", "training.resume",
            "training.trackers", "training.output", "training.cpu_threads")  # fmt: skip
"""Keys that decide nothing about the weights."""


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
    changes = differences(state["recipe"], recipe.model_dump(mode="json", by_alias=True))
    harmful = [change for change in changes if change[0].startswith(IDENTITY) and not change[0].startswith(HARMLESS)]
    if harmful:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in harmful)
        raise UserError(
            f"{path}: belongs to another run ({listed}). Start this one afresh with training.resume=never, or give it "
            "another training.output."
        )
    notices = [
        f"{path.name}: {key} was {old!r} and is now {new!r}: the run goes on from the same image with the new value, "
        "so it will not repeat an uninterrupted one bit for bit"
        for key, old, new in changes
        if not key.startswith(HARMLESS) and key != "training.images"
    ]
    before = state["run"]["world_size"]
    if before != world_size:
        notices.append(
            f"{path.name}: written by {before} process{'es' * (before > 1)}, now {world_size}: every step still sees "
            "the same images and noise, and only the order of summation differs (about 1e-6 of the loss)"
        )
    return notices


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two nested recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in sorted(old.keys() | new.keys())
            for change in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [(key, old, new)]
