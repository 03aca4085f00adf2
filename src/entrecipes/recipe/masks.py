"""`masks:` which frames of a sticker are given to the model, and which count in the loss."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from entrecipes.recipe.base import Section, register, union

Task = Literal["i2v", "t2v", "it2v", "interpolation", "pre_frame_prediction", "post_frame_prediction", "uncond"]
"""What a model can be asked for: a clip from a frame, a text, both; the frames between, before or after; anything."""
TASKS: tuple[Task, ...] = get_args(Task)
GIVEN: dict[Task, str] = {
    "i2v": "one frame",
    "t2v": "no frame",
    "it2v": "one frame",
    "interpolation": "frames on both sides of those to be made",
    "pre_frame_prediction": "the last frames",
    "post_frame_prediction": "the first frames",
    "uncond": "no frame",
}
"""What of a clip each task is given, in words."""


@register("masks", implementation="entrecipes.samples.masks:WholeSamples")
class NoMasksSection(Section):
    """Nothing is given but the text, and every frame that there is counts in the loss."""

    type: Literal["none"] = "none"


@register("masks", implementation="entrecipes.samples.masks:DualMasks", paper="RDTF (arXiv 2503.17735)")
class DualMasksSection(Section):
    """RDTF's dual masks: which frames are given, and which count, so that clips of any length can be used."""

    type: Literal["dual"] = "dual"
    tasks: tuple[Task, ...] = Field(TASKS[:-1], min_length=1)
    """Tasks that are trained; how often each is drawn is the curriculum's choice."""
    uncond: float = Field(0.1, ge=0, lt=1)
    """Share of the samples that are given nothing at all, for guidance (our own addition; 0: as published)."""
    draw: Literal["sample", "batch"] = "sample"
    """One task for each sample, or one for the whole batch (as published)."""
    lengths: tuple[int, int] = (3, 8)
    """Fewest and most frames, spread evenly over the clip, that are shown of one; drawn afresh each time."""
    normalize: Literal["valid", "paper"] = "valid"
    """valid: the loss is the mean over the frames that count; paper: over all, so that a short clip weighs less."""
    given_frames: Literal["learn", "skip"] = "learn"
    """Whether given frames count in the loss (as published), or are left out of it."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the caption's tokens that are hidden (for the published words replaced by '#', with 0.2)."""

    @model_validator(mode="after")
    def _possible(self) -> DualMasksSection:
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths: {list(self.lengths)} is no range of 1 or more frames; give [fewest, most]")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: one is named twice")
        return self


MasksSection = union("masks")


def given_at(task: Task, frames: int) -> tuple[bool, ...]:
    """Which of `frames` frames are given when a task is measured or shown (in training the choice is drawn).

    The first; every other one; the later half (`pre_frame_prediction`); the earlier half; or none.
    """
    rules = {
        "i2v": lambda i: i == 0,
        "it2v": lambda i: i == 0,
        "interpolation": lambda i: i % 2 == 0,
        "pre_frame_prediction": lambda i: i >= frames - frames // 2,
        "post_frame_prediction": lambda i: i < frames // 2,
    }
    return tuple(rules.get(task, lambda i: False)(i) for i in range(frames))


def follows_text(task: Task) -> bool:
    """Whether a text is given."""
    return task not in ("i2v", "uncond")
