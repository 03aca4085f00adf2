"""Build everything a recipe names, take a few steps, and say what the run would cost; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from entrecipes.data.loader import Batch
from entrecipes.diffusion.quantised import size
from entrecipes.errors import UserError
from entrecipes.information.proxies import flops
from entrecipes.recipe.schema import Recipe
from entrecipes.training.costs import state_bytes
from entrecipes.training.loop import step
from entrecipes.training.memory import Prediction, measured
from entrecipes.training.rehearsal import rehearsing
from entrecipes.training.run import Run
from entrecipes.training.skeleton import skeleton
from entrecipes.training.tracking import peak_memory_gib

TIMED_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """What a dry run found."""

    parameters: int
    trainable_parameters: int
    weights_gib: float
    """Weights, their average, gradients and optimizer state after a step."""
    peak_memory_gib: float
    """The most memory held during the steps (on a CPU: of the whole process)."""
    images_per_second: float
    """Over the steps after the first."""
    training_seconds: float
    """For the recipe's images at that speed, evaluations not counted."""
    evaluations: list[str]
    """What would be measured, and how often."""
    pruning: str
    """Which blocks would be removed, and when; empty for none. The speed is that before any goes."""
    beginnings: list[str]
    """How the curriculum and the block schedule begin, where they change: the speed and the memory are of that."""
    world_size: int
    train_images: int
    held_out_images: int
    predicted: Prediction | None
    """What had been predicted of the memory, by component."""
    measured: dict[str, float]
    """GiB of the same components where they can be measured, and of the `peak`."""


def dry_run(recipe: Recipe, seconds: float = 0.0, predicted: Prediction | None = None) -> Estimate:
    """Take one step to warm up and two to time.

    Args:
        recipe: What would be run.
        seconds: Time steps for so long, after a quarter of it to warm up, where two take less.
        predicted: Its memory; what only the opened data tells is added.

    Raises:
        UserError: For all that a real run would refuse.
    """
    costs: dict[str, float] = {}
    run = Run(recipe, None, lambda row: costs.update(row) if row["kind"] == "costs" and not costs else None)
    batches = run.batches()
    beginnings = [row["what"] for row in run.curriculum.advance(0) + run.blocks.advance(0)]
    run.wrap()
    run.blocks.focus()
    step(run, batches)
    if seconds:
        _images_per_second(run, batches, seconds / 4)
    rate = _images_per_second(run, batches, seconds)
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    weights = set(run.model.parameters()) | set(run.ema.model.parameters() if run.ema else ())  # they may share some
    held = sum(weight.nbytes for weight in [*weights, *trainable]) + state_bytes(run.optimizer.optimizer.state.values())
    peak = peak_memory_gib(run.device)
    return Estimate(
        parameters=sum(size(p) for p in run.model.parameters()),
        trainable_parameters=sum(p.numel() for p in trainable),
        weights_gib=held / 2**30,
        peak_memory_gib=peak,
        images_per_second=rate,
        training_seconds=recipe.training.images / rate,
        evaluations=planned(recipe),
        pruning=run.pruner.plan,
        beginnings=beginnings,
        world_size=run.world_size,
        train_images=len(run.data.train),
        held_out_images=len(run.data.held_out or ()),
        predicted=predicted and predicted.beside(run),
        measured=measured(run, costs) | {"peak": peak},
    )


@dataclass(frozen=True)
class Outline:
    """What is known of a run without weights, data or any file but the recipe."""

    model: str
    parameters: int
    forward_gflops: float
    """Billions of operations of a forward pass of one sample."""


def outline(recipe: Recipe) -> Outline:
    """Build the recipe's model without memory and pass one sample of zeros through it.

    Of a pre-trained pipeline the configuration is read.

    Raises:
        UserError: For a model that can't be built, or is known only when it is loaded.
    """
    with rehearsing(torch.device("cpu")):
        found = skeleton(recipe.pipeline)
        try:
            operations = flops(lambda: found.family.one_pass(found.model))
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            why, name = str(error).strip().splitlines()[0], found.family.model_class
            raise UserError(f"--meta: no sample passes through {name} ({why}); leave --meta out") from error
        count = sum(parameter.numel() for parameter in found.model.parameters())
    return Outline(found.family.model_class, count, operations / 1e9)


def _images_per_second(run: Run, batches: Iterator[Batch], seconds: float) -> float:
    """The speed of the next steps, never beyond the recipe's images: schedules know nothing after them."""
    started, steps = time.perf_counter(), 0
    while steps < TIMED_STEPS or (time.perf_counter() - started < seconds and run.images < run.recipe.training.images):
        step(run, batches)
        steps += 1
    run.window.sums.tolist()  # wait for the device
    return steps * run.recipe.training.batch_size / (time.perf_counter() - started)


def planned(recipe: Recipe) -> list[str]:
    """The measurements of a recipe in words."""
    total, evaluation = recipe.training.images, recipe.evaluation

    def times(every: int | None) -> str:
        return f"every {every:,} images ({max(1, total // every)} times)" if every else "at the end"

    plans = [f"held-out nats, {times(evaluation.every)}", f"sample grid, {times(recipe.training.sample_every)}"]
    if evaluation.metrics:
        names = ", ".join(evaluation.metrics)
        plans.append(
            f"{names} on {evaluation.samples:,} samples of {evaluation.steps} steps, {times(evaluation.metrics_every)}"
        )
    return plans
