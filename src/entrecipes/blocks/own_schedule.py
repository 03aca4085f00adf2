"""Ent-Prog, its baselines and our cost-aware order in a training loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from entrecipes.blocks.entprog import ProgressiveBlocks
from entrecipes.blocks.own_loop import denoiser_of
from entrecipes.blocks.scores import BlockScores
from entrecipes.errors import UserError, nearest
from entrecipes.recipe.blocks import EntProgSection

TRAINER_ONLY = ("type", "adapter", "closed", "mode", "rerank", "draws", "holdout")


class AppliedSchedule:
    """Weights that open and close as `step` says; a context manager, which gives all back as it found it.

    Attributes:
        rows: What has happened so far: `what` in one sentence, the open blocks, what candidates earned.
    """

    def __init__(self, blocks: ProgressiveBlocks) -> None:
        self.rows: list[dict[str, Any]] = []
        self._blocks, self._model = blocks, blocks.stack.model
        self._flags = [(weight, weight.requires_grad) for weight in self._model.parameters()]

    @property
    def open(self) -> list[int]:
        """The blocks that the next step trains, in the order in which they run."""
        return sorted(self._blocks.order[: self._blocks.focused])

    def step(self, images: int, optimizer: Optimizer | None = None) -> list[dict[str, Any]]:
        """Bring the model to the state due after so many images. Call it before every training step, 0 first.

        Args:
            images: Seen so far.
            optimizer: One over all weights, made once, that passes over weights without a gradient, as torch's do after
                `zero_grad()`; it loses its state of what is closed for good. None: when there are rows, make it (and
                any distributed wrapper, with find_unused_parameters) anew over the weights with `requires_grad`, then
                call `focus`.

        Returns:
            A row for each change, as in `rows`.
        """
        rows = self._blocks.advance(images)
        self.rows += rows
        if rows and optimizer is not None:
            for weight in self._model.parameters():
                if not weight.requires_grad:
                    optimizer.state.pop(weight, None)
        if optimizer is not None or not rows:
            self.focus()
        return rows

    def focus(self) -> None:
        """Close for the moment what the next step does not train."""
        self._blocks.focus()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values to go on from, at any step."""
        return self._blocks.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; nothing is measured again."""
        self._blocks.load_state_dict(state)
        self.focus()

    def undo(self) -> None:
        """Give every weight the `requires_grad` that it had before; weights stay as trained."""
        for weight, flag in self._flags:
            weight.requires_grad_(flag)

    def __enter__(self) -> AppliedSchedule:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def apply_block_schedule(
    pipeline: DiffusionPipeline | ModelMixin,
    images: int,
    *,
    loss: Callable[[], Tensor],
    scores: BlockScores | None = None,
    seed: int = 0,
    **options: Any,
) -> AppliedSchedule:
    """Open the blocks of a pipeline's denoiser while it is trained, the most important first.

    Args:
        pipeline: A diffusers pipeline with a `transformer` or `unet`, or such a model. Weights that require no gradient
            now stay closed, so that an adapter's (LoRA's) alone are opened.
        images: Length of the training, which the stages divide.
        loss: Calls the model (the raw one) on a fixed held-out batch, with fixed noise and noise levels, and returns
            the mean loss: what candidates are compared on. It must not switch gradients off itself.
        scores: What `score_blocks` gave for this model; not needed for the orders random, last_first and first_first.
        seed: Of the order `random`.
        options: Keys of `blocks: {type: entprog}`: order, score, growth, stages, step, candidates, largest, final,
            supernet, burst, clock, inputs.

    Raises:
        UserError: For an unknown option or value, missing scores or those of another model, or a model without blocks.
    """
    model = denoiser_of(pipeline)
    section = _section(options)
    if section.measured and scores is None:
        raise UserError(f"apply_block_schedule: order={section.order!r} needs `scores`, from score_blocks")
    before = {name for name, weight in model.named_parameters() if weight.requires_grad}
    subject = SimpleNamespace(  # what the schedule asks of a run
        components=SimpleNamespace(model=model),
        images=images,
        seed=seed,
        eligible=before.__contains__,
        agree=lambda value: value,
        clock=time.perf_counter,
    )
    blocks = ProgressiveBlocks(section, subject, _OwnYardstick(model, loss, scores))
    if scores is not None and scores.paths != tuple(block.paths[0] for block in blocks.stack.blocks):
        raise UserError(
            f"scores: of {len(scores.paths)} other blocks than the model's {len(blocks.stack)}; measure it again"
        )
    return AppliedSchedule(blocks)


class _OwnYardstick:
    """Scores and a loss that were given."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], scores: BlockScores | None) -> None:
        self.model, self.call, self.given = model, loss, scores

    def scores(self, name: str) -> list[float]:
        return self.given.score(name).tolist()

    def level_weights(self) -> list[float]:
        return []

    def loss(self, weights: list[float]) -> float:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            value = float(self.call())
        self.model.train(training)
        return value


def _section(options: dict[str, Any]) -> EntProgSection:
    """Raises UserError for what the section does not know, or the trainer alone can do."""
    known = [key for key in EntProgSection.model_fields if key not in TRAINER_ONLY]
    for key in options:
        if key not in known:
            raise UserError(f"apply_block_schedule: there is no option '{key}'{nearest(key, known)}")
    try:
        return EntProgSection(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "options"
        raise UserError(f"apply_block_schedule: {place}: {first['msg']}") from None
