"""What a run says of itself as it goes: its log rows, and the measurements of its weights."""

from __future__ import annotations

import math
from dataclasses import asdict

from entrecipes.evaluation.heldout import HeldOutResult
from entrecipes.report.plots import save_grid, save_moving
from entrecipes.training.run import Run
from entrecipes.training.tracking import peak_memory_gib
from entrecipes.training.weights import evaluated


def begin(run: Run) -> None:
    """Write down how the run starts, and measure: the untrained model, or what a resumed run had due."""
    facts = {
        "world_size": run.world_size,
        "device": str(run.device),
        "precision": run.accelerator.mixed_precision,
    }
    run.log.write("start", run.images, **facts)
    if run.images:
        measure_when_due(run, run.images - run.recipe.training.batch_size)
        return
    if run.recipe.evaluation.every:
        with evaluated(run) as model:
            _log_nats(run, run.evaluator.nats(model))
    run.window.clear()
    run.advance_blocks()


def measure_when_due(run: Run, before: int) -> None:
    """Held-out nats, sample grid and sample-based metrics of the evaluated weights, each on its own cadence.

    Called after the checkpoint, so that whatever goes wrong here costs no training; a resumed run measures again.
    """
    evaluation, training, evaluator = run.recipe.evaluation, run.recipe.training, run.evaluator
    nats_due, metrics_due = run.due(evaluation.every, before), run.due(evaluation.metrics_every, before)
    samples_due = run.folder is not None and run.experts.samples and run.due(training.sample_every, before)
    if not (nats_due or metrics_due or samples_due):
        return
    with run.window.paused(), evaluated(run) as model:
        nats = evaluator.nats(model) if nats_due or metrics_due else {}
        if nats_due:
            _log_nats(run, nats)
        if samples_due:
            grid = evaluator.grid(model)
            if run.accelerator.is_main_process:
                save_grid(grid.pictures, run.grid_path, grid.columns, grid.scale, grid.texts)
                if grid.moving is not None:
                    save_moving(grid.moving, run.grid_path.with_suffix(".gif"), grid.scale)
        if metrics_due:
            origin = {"images": run.images, "training_seed": training.seed, "ema": training.ema is not None}
            for metric in evaluator.metrics(model, nats, origin):
                run.log.write("metric", run.images, **asdict(metric))


def _log_nats(run: Run, nats: dict[str, HeldOutResult]) -> None:
    run.log.write("held_out", run.images, **run.evaluator.nats_row(nats))


def log_when_due(run: Run, before: int) -> None:
    """Write the means over the steps since the last row: the one place where the loop waits for the device."""
    if not run.due(run.recipe.training.log_every, before):
        return
    window, training = run.window, run.recipe.training
    loss, x0_error, grad_norm = run.accelerator.reduce(window.sums / window.steps, "mean").tolist()
    run.check_finite(loss)
    window.stop_clock()
    values = {
        "loss": loss,
        "x0_error": x0_error,
        "grad_norm": grad_norm if training.clip_grad_norm and math.isfinite(grad_norm) else None,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "images_per_second": window.steps * training.batch_size / window.seconds,
        "peak_memory_gib": peak_memory_gib(run.device),
        "seconds": window.total_seconds,
        **run.curriculum.facts(lambda value: run.accelerator.reduce(value, "mean")),
    }
    run.log.write("train", run.images, **values)
    window.clear()
