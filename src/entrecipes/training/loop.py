"""The training loop: everything that happens to a model, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Iterator

from entrecipes.data.loader import Batch
from entrecipes.training.optimizer import learning_rate, set_learning_rate
from entrecipes.training.resume import checkpoint_when_due
from entrecipes.training.run import Run
from entrecipes.training.telling import begin, log_when_due, measure_when_due


def train(run: Run) -> None:
    """Train until the recipe's images are seen, or the run is asked to stop (it then leaves a checkpoint)."""
    begin(run)
    batches = run.batches()
    while run.images < run.recipe.training.images and not run.stop_requested:
        before = run.images
        step(run, batches)
        log_when_due(run, before)
        checkpoint_when_due(run, before)
        measure_when_due(run, before)


def step(run: Run, batches: Iterator[Batch]) -> None:
    """One optimizer step over `batch_size` images.

    No line waits for the device. All methods are called through their interface whatever the recipe chose; the plain
    choices do nothing. Every random number is a function of (seed, images).
    """
    training, random = run.recipe.training, run.random
    random.begin(run.images)

    batch = next(batches)
    samples = run.curriculum.view(batch.images, random.uniform)
    frames = run.draw_frames(batch)
    x0 = frames.of(run.space.encode(samples, random.normal))
    condition = run.condition(samples, batch, x0, frames)

    log_sigma, weight = run.noise.sample(training.batch_size, random.generator)
    level, weight = log_sigma[random.rows], weight[random.rows].to(x0.dtype) * frames.weight
    noise = random.normal(*x0.shape[1:])

    rate = learning_rate(run.recipe.optimizer, run.images, training.images) * run.pruner.rate(run.images)
    set_learning_rate(run.optimizer, rate)
    losses, x0_errors = [], []
    for rows, synchronise in run.micro_batches():
        with synchronise(), run.costs.watch():
            asked = condition if condition is None else condition[rows]
            prediction, target = run.denoiser(x0[rows], noise[rows], level[rows], asked)
            loss, x0_error = run.objective(prediction, target, level[rows], frames[rows].counted)
            taught = run.pruner.distillation(prediction, x0[rows], noise[rows], level[rows], asked)
            run.accelerator.backward(((loss + taught) * weight[rows]).sum() / len(x0))
        losses.append(loss.detach())
        x0_errors.append(x0_error)
    grad_norm = run.clip_gradients()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    run.images += training.batch_size
    run.update_ema()
    run.record(frames, log_sigma, weight, losses, x0_errors, grad_norm)
    run.refresh_noise()
    run.advance_blocks()
