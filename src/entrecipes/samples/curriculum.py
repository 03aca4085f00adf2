"""Which part of each sample is trained on as a function of images seen: the interface, the plain choice and phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.patterns import check_parameters, matches
from entrecipes.recipe.curriculum import NoCurriculumSection, Phase, PhasesSection


class Curriculum(Protocol):
    """Decides what of a batch is trained on. All of it follows from images seen, so that there is no state to keep."""

    def advance(self, images: int) -> list[dict[str, Any]]:
        """Enter what is due at `images`: a row for each change, `what` in one sentence."""

    def view(self, batch: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """The part of a batch [n, ...] to train on; `uniform()` gives random numbers [n] in [0, 1) to cut with."""

    def eligible(self, name: str) -> bool:
        """Whether the weight of this name may be trained now."""


class WholeSamples:
    """Everything of every sample."""

    def __init__(self, section: NoCurriculumSection, model: nn.Module, kind: str) -> None:
        pass

    def advance(self, images: int) -> list[dict[str, Any]]:
        return []

    def view(self, batch: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        return batch

    def eligible(self, name: str) -> bool:
        return True


class Phases:
    """Ent-Prog's three data stages, or any others, over clips uint8 [n, 3, 2F + 1, H, W] (frames, poses, reference).

    Raises:
        UserError: For data that are no clips, or a pattern that matches no parameter.
    """

    def __init__(self, section: PhasesSection, model: nn.Module, kind: str) -> None:
        if kind != "clips":
            raise UserError(f"curriculum.type: phases cuts clips, and the data are {kind}; take none")
        self.section = section
        self.number = -1
        for i, phase in enumerate(section.phases):
            check_parameters(model, phase.train, f"curriculum.phases.{i}.train")

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self.section.phases[max(self.number, 0)]

    def advance(self, images: int) -> list[dict[str, Any]]:
        due = sum(phase.from_images <= images for phase in self.section.phases) - 1
        if due == self.number:
            return []
        self.number = due
        phase = self.phase
        frames = "whole clips" if phase.frames is None else f"{phase.frames} frame(s) of each clip"
        parts = [frames, "with poses" if phase.poses else "without poses"]
        parts += [f"training {', '.join(phase.train)}"] * (phase.train != ("*",))
        what = f"phase {due + 1} of {len(self.section.phases)}: {', '.join(parts)}"
        return [{"what": what, "phase": due, "frames": phase.frames, "poses": phase.poses}]

    def view(self, batch: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        whole, phase = batch.shape[2] // 2, self.phase
        frames = min(phase.frames or whole, whole)
        first = (uniform() * (whole - frames + 1)).long()
        taken = first[:, None] + torch.arange(frames, device=batch.device)
        slices = torch.cat([taken, taken + whole, torch.full_like(first, 2 * whole)[:, None]], dim=1)
        batch = batch[torch.arange(len(batch), device=batch.device)[:, None], :, slices].transpose(1, 2).contiguous()
        if not phase.poses:
            batch[:, :, frames:-1] = 0  # black, as where no limb is drawn
        return batch

    def eligible(self, name: str) -> bool:
        return matches(name, self.phase.train)
