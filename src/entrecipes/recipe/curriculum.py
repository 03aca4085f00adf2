"""`curriculum:` which part of each sample is trained on, and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Count, PositiveCount, Section, check_starts, register, union


@register("curriculum", implementation="entrecipes.samples.curriculum:WholeSamples")
class NoCurriculumSection(Section):
    """Every sample is trained on as it is, from the first to the last."""

    type: Literal["none"] = "none"


class Phase(Section):
    """What is trained on from some moment on."""

    from_images: Count = 0
    """Clips seen when the phase begins."""
    frames: PositiveCount | None = None
    """Neighbouring frames cut from each clip at random; null: all."""
    poses: bool = True
    """Whether the pose maps are shown; without them the person of the reference is drawn in any pose."""
    train: tuple[str, ...] = ("*",)
    """Patterns over parameter names (`*` matches anything): the only weights that `blocks:` may train in this phase."""


@register(
    "curriculum", implementation="entrecipes.samples.curriculum:Phases", paper="Ent-Prog (CVPR 2026): three data stages"
)
class PhasesSection(Section):
    """Phases of clip training: single frames of a subject, frames in a pose, then whole clips."""

    type: Literal["phases"] = "phases"
    phases: tuple[Phase, ...] = Field(min_length=1)
    """In the order of `from_images`, the first from 0."""

    @model_validator(mode="after")
    def _in_order(self) -> PhasesSection:
        check_starts([phase.from_images for phase in self.phases], "phases")
        return self


class TaskCurriculumKeys(Section):
    """Which of the tasks of `masks:` is drawn, from easy to hard."""

    images: PositiveCount | None = None
    """Clips seen when the curriculum has arrived at its end; null: the whole run."""


@register(
    "curriculum", implementation="entrecipes.samples.tasks:LinearTasks", paper="RDTF (arXiv 2503.17735), table 4: LCL"
)
class LinearTasksSection(TaskCurriculumKeys):
    """A written schedule: interpolation first, then prediction and generation (RDTF's baseline, LCL)."""

    type: Literal["linear"] = "linear"


@register("curriculum", implementation="entrecipes.samples.tasks:AdaptiveTasks", paper="RDTF (arXiv 2503.17735): DCL")
class AdaptiveTasksSection(TaskCurriculumKeys):
    """RDTF's: a written part, and one that follows a PID controller on the training loss."""

    type: Literal["adaptive"] = "adaptive"
    proportional: float = Field(5.0, ge=0)
    """Weight of the present loss."""
    integral: float = Field(3.0, ge=0)
    """Weight of its mean over the history."""
    derivative: float = Field(1.3, ge=0)
    """Weight of its last change."""
    history: int = Field(1000, ge=10)
    """Steps that the controller remembers, and among which it ranks the present one."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Of the loss, by an exponential mean (our own; 0: as published)."""
    scores: Literal["task", "raw"] = "task"
    """task: each task's losses relative to their own mean and deviation, so that the controller does not react to the
    mix that it makes itself (our own); raw: as published."""


@register("curriculum", implementation="entrecipes.samples.tasks:EntropyTasks")
class EntropyTasksSection(TaskCurriculumKeys):
    """Our own: each sample gets the task whose measured difficulty for it fits the moment, from easy to hard."""

    type: Literal["entropy"] = "entropy"
    static: float = Field(0.5, ge=0, le=1)
    """Share of what is known of a sample (motion, length, share of frames to be made) in its difficulty; the rest is
    the model's own error in nats on each task."""
    width: float = Field(0.25, gt=0)
    """How far, in units of the range of difficulties, a task may lie from what fits the moment."""
    floor: float = Field(0.05, ge=0, lt=1)
    """Odds that every task keeps, relative to uniform ones, so that none is forgotten."""


CurriculumSection = union("curriculum")
