"""Which part of each sample is trained on as a function of images seen: the interface, the plain choice and phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.patterns import check_parameters, matches
from entrecipes.recipe.curriculum import NoCurriculumSection, Phase, PhasesSection


class Curriculum(Protocol):
    """Decides what of a batch is trained on, and what is asked of it.

    Called by the registry as `Choice(section, model=, kind=, tasks=, images=, frames=, device=)`: the model, the kind
    of data, the tasks that `masks:` draws from, the run's images, the frames of a clip (None without frames), and the
    device of all tensors. What is not overridden here does nothing.
    """

    records: ClassVar[bool] = False
    """Whether `record` does anything; the trainer gathers losses over processes only then."""

    def advance(self, images: int) -> list[dict[str, Any]]:
        """Enter what is due at `images`: a row for each change, `what` in one sentence. It follows from images seen."""
        return []

    def view(self, batch: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """The part of a batch [n, ...] to train on; `uniform()` gives random numbers [n] in [0, 1) to cut with."""
        return batch

    def eligible(self, name: str) -> bool:
        """Whether the weight of this name may be trained now."""
        return True

    def odds(self, images: int, n: int, motion: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """How likely each task is for each sample, without waiting for the device.

        Args:
            images: Seen so far.
            n: Samples of this process's batch.
            motion: How much each moves, its rank in [0, 1] [n]; None: not known.
            lengths: Frames that each has, int64 [n]; None: all.

        Returns:
            Odds float32 [n, len(tasks)], of any sum; None: all the same.
        """
        return None

    def record(self, task: Tensor, loss: Tensor, x0_error: Tensor, log_sigma: Tensor) -> None:
        """Take note of a batch over all processes, without waiting for the device.

        Args:
            task: int64 [n], index into `recipe.masks.TASKS`; those that are not among the curriculum's are ignored.
            loss: Losses of the objective [n].
            x0_error: Squared x0 errors, mean over the dimensions that count [n].
            log_sigma: Noise levels [n].
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a checkpoint must hold for an exact resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def facts(self, mean: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Any]:
        """What to log of it, as plain numbers (this waits for the device); empty when there is nothing to say.

        Args:
            mean: Over processes that hold a part of the batch each, and that all have to ask.
        """
        return {}


class WholeSamples(Curriculum):
    """Everything of every sample."""

    def __init__(self, section: NoCurriculumSection, model: nn.Module, kind: str, **context: Any) -> None:
        pass


class Phases(Curriculum):
    """Ent-Prog's three data stages, or any others, over clips uint8 [n, 3, 2F + 1, H, W] (frames, poses, reference).

    Raises:
        UserError: For data that are no clips, or a pattern that matches no parameter.
    """

    def __init__(self, section: PhasesSection, model: nn.Module, kind: str, **context: Any) -> None:
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
