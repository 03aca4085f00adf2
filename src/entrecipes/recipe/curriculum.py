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


CurriculumSection = union("curriculum")
