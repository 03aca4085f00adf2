"""What every way to prune shares: the interface, what a pruner works on, and the removal with its record.

Blocks are named by their index in the dense model throughout, whatever has been removed since.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from entrecipes.blocks.distill import Teacher
from entrecipes.blocks.scores import BlockScores
from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.pipelines import Components
from entrecipes.errors import UserError
from entrecipes.recipe.prune import NoPruningSection, PruneKeys, WrittenPruningSection

FILE = "pruning.json"


class Scoring(Protocol):
    """What blocks are scored on: the same draws every time (`evaluation.scoring.Scoring`)."""

    bundle: Any
    """Its `x0` [n, ...] and `condition` [n, ...] or None."""
    data_fingerprint: str

    def measure(
        self, model: nn.Module, gone: Collection[int] = (), gradients: bool = True, identify: bool = True
    ) -> BlockScores:
        """Score the model's blocks, those in `gone` skipped throughout."""

    def weights(self, sampler: NoiseSampler, levels: Tensor | None = None) -> Tensor:
        """Share of a sampler's draws at each of some noise levels [L]."""

    def loss(self, model: nn.Module, objective: Objective, weights: Tensor) -> float:
        """The training loss on the draws, each noise level by its weight [L]."""

    def call(self, model: nn.Module) -> Tensor:
        """Predict from a few of the images, with gradients where they are on."""


class NoiseSampler(Protocol):
    """The run's noise, as far as a pruner draws from it (`noise.base.NoiseSampler`)."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """log sigma [n], and the factor of each sample's loss [n]."""


@dataclass(frozen=True)
class Subject:
    """The run as pruners and block schedules see it."""

    components: Components
    """The model in training and its noise path."""
    copies: tuple[nn.Module, ...]
    """Models that must lose the same blocks (the average)."""
    images: int
    """Length of the run."""
    seed: int
    """Of random choices."""
    objective: Objective
    """The loss."""
    noise: NoiseSampler
    """Where training draws noise levels."""
    scoring: Callable[..., Scoring]
    """Makes what blocks are scored on from `Draws` or a `HoldOut`, and the `split` (train, or held_out); called only
    where that is needed."""
    agree: Callable[[Any], Any]
    """Makes all processes take what the first one found."""
    eligible: Callable[[str], bool] = lambda name: True
    """Whether the weight of a name may be trained at all."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds of training so far, without waiting for the device."""
    snapshot: Callable[[], dict[str, Any]] | None = None
    """Copies the weights, their average and the optimizer's state."""
    restore: Callable[[dict[str, Any]], None] | None = None
    """Goes back to what `snapshot` gave, the trained weights being the same."""


class Pruner(Protocol):
    """Removes blocks while training goes on. What is not overridden does nothing."""

    def advance(self, images: int) -> list[dict[str, Any]]:
        """Remove what is due after this many images.

        Returns:
            A record of each stage, plain values with `what` in one sentence. When there is any, the run rebuilds its
            optimizer (the state of what was removed is dropped), its average and its distributed wrapper.
        """
        return []

    @property
    def plan(self) -> str:
        """What it is going to do, in one line; empty where that is nothing."""
        return ""

    def rate(self, images: int) -> float:
        """Factor of the learning rate of the step that starts at `images`: below 1 shortly after a removal."""
        return 1.0

    def distillation(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, log_sigma: Tensor, condition: Tensor | None
    ) -> Tensor | float:
        """What is added to the losses [n] for the distance to the dense model's prediction."""
        return 0.0

    def facts(self) -> dict[str, Any]:
        """What the run's facts (`run.json`) say of it: `blocks` before and after, `parameters_before`."""
        return {}

    def publish(self, folder: Path) -> None:
        """Write `pruning.json` into a folder: what was removed, when and why."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restore what `state_dict` gave, by removing the same blocks; says whether that changed the model."""
        return False


class NoPruning(Pruner):
    """Keeps every block."""

    def __init__(self, section: NoPruningSection, subject: Subject) -> None:
        pass


class Pruning(Pruner):
    """Removes the blocks that `choose` names, and keeps the record.

    Raises:
        UserError: For a model without a stack of blocks, or a teacher that can't be had.
    """

    def __init__(self, section: PruneKeys, subject: Subject, trained: bool = False) -> None:
        """Args: `trained` says whether training goes on before the last removal."""
        self.section, self.subject = section, subject
        try:
            self.stack = BlockStack(subject.components.model, trained)
        except UserError as error:
            raise UserError(f"prune: {error}") from error
        self.dense = self.stack.blocks
        self.dense_parameters = sum(p.numel() for p in self.stack.model.parameters())
        self.kept = list(range(len(self.dense)))
        self.stages: list[dict[str, Any]] = []
        self.teacher = Teacher(section.distill, subject.components, subject.objective)

    def choose(self, images: int) -> list[dict[str, Any]]:
        """What to remove after this many images: a record for each stage due, with `remove`, the blocks in order."""
        raise NotImplementedError

    def here(self, blocks: Collection[int]) -> list[int]:
        """Indices in the model as it is now of blocks of the dense model."""
        return [self.kept.index(block) for block in blocks]

    def advance(self, images: int) -> list[dict[str, Any]]:
        rows = [self._carry_out(images, stage) for stage in self.choose(images)]
        self.stages += rows
        return rows

    def _carry_out(self, images: int, stage: dict[str, Any]) -> dict[str, Any]:
        gone = stage["remove"]
        if gone:
            self.teacher.before_removal()
            self._remove(gone)
        what = f"removed block{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}" if gone else "removed no block yet"
        said = f"{what}; {len(self.kept)} of {len(self.dense)} are left"
        return {"images": images, **stage, "left": len(self.kept), "what": said}

    def _remove(self, gone: Collection[int]) -> None:
        here = self.here(gone)
        for model in self.subject.copies:
            BlockStack(model).remove(here)
        self.stack.remove(here)
        self.kept = [block for block in self.kept if block not in gone]

    def rate(self, images: int) -> float:
        last = max((row["images"] for row in self.stages if row["remove"]), default=None)
        warmup = self.subject.images // 100 if self.section.rewarmup is None else self.section.rewarmup
        return 1.0 if last is None or not warmup else min(1.0, (images - last + 1) / warmup)

    def distillation(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, log_sigma: Tensor, condition: Tensor | None
    ) -> Tensor | float:
        return self.teacher.loss(prediction, x0, noise, log_sigma, condition)

    def facts(self) -> dict[str, Any]:
        blocks = {"before": len(self.dense), "after": len(self.kept)}
        return {"blocks": blocks, "parameters_before": self.dense_parameters}

    def publish(self, folder: Path) -> None:
        removed = {block: row["images"] for row in self.stages for block in row["remove"]}
        record = {
            "model": type(self.subject.components.model).__name__,
            "section": self.section.model_dump(mode="json"),
            "blocks": [asdict(block) | {"removed_at": removed.get(block.index)} for block in self.dense],
            "kept": self.kept,
            "removed": list(removed),
            "stages": self.stages,
        }
        (folder / FILE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "stages": self.stages, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        gone = [block for block in self.kept if block not in state["kept"]]
        self.teacher.load_state_dict(state["teacher"])
        if gone:
            self._remove(gone)
        self.stages = list(state["stages"])
        return bool(gone)


class WrittenPruning(Pruning):
    """Removes the blocks that the recipe names before the first step.

    Raises:
        UserError: For blocks that there are not, or that are pinned, with the reason.
    """

    def __init__(self, section: WrittenPruningSection, subject: Subject) -> None:
        super().__init__(section, subject)
        try:
            self.stack.check_removable(section.remove)
        except UserError as error:
            raise UserError(f"prune.remove: {error}") from error

    @property
    def plan(self) -> str:
        return f"removes blocks {', '.join(map(str, self.section.remove))} of {len(self.dense)} before the first step"

    def choose(self, images: int) -> list[dict[str, Any]]:
        return [] if self.stages else [{"stage": 1, "remove": list(dict.fromkeys(self.section.remove))}]
