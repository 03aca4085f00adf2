"""A run as pruners and block schedules see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from entrecipes.blocks.pruning import Subject
from entrecipes.evaluation.scoring import Scoring
from entrecipes.training.weights import restore, snapshot

if TYPE_CHECKING:
    from entrecipes.training.run import Run


def subject_of(run: Run) -> Subject:
    """What a pruner may know and touch."""
    training = run.recipe.training
    batch_size = training.micro_batch_size or training.batch_size // run.world_size
    return Subject(
        components=run.components,
        copies=tuple(copy.model for copy in (run.ema, run.copy) if copy),
        images=training.images,
        seed=training.seed,
        objective=run.objective,
        noise=run.noise,
        scoring=lambda draws, split="train": Scoring.on_images(
            draws, run.components, run.data, run.device, batch_size, split=split, shard=run.evaluator.shard
        ),
        agree=lambda value: broadcast_object_list([value])[0],
        eligible=lambda name: run.adapter.eligible(name) and run.curriculum.eligible(name),
        clock=lambda: run.window.elapsed,
        snapshot=lambda: snapshot(run),
        restore=lambda state: restore(run, state),
    )
