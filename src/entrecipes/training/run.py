"""A run: everything the loop works on, built from a recipe."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor

from entrecipes.blocks.schedule import guard_group_norms
from entrecipes.data.loader import Batch, batches
from entrecipes.data.opening import open_data
from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.family import Condition
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.pipelines import Components, best_device, load_components
from entrecipes.diffusion.visiting import visiting
from entrecipes.errors import UserError
from entrecipes.evaluation.evaluator import Evaluator
from entrecipes.evaluation.generation import Shard
from entrecipes.information.values import value_statistics
from entrecipes.noise.base import RunFacts
from entrecipes.recipe.base import build
from entrecipes.recipe.schema import Recipe
from entrecipes.samples.masks import EVERYTHING, Frames
from entrecipes.training.checks import check_condition_is_learned, null_label
from entrecipes.training.costs import StepCosts
from entrecipes.training.ema import EmaModel
from entrecipes.training.launched import LONGEST_WAIT, check_engine, check_launch
from entrecipes.training.optimizer import build_optimizer
from entrecipes.training.randomness import StepRandom
from entrecipes.training.sharding import (
    ShardedEma,
    WholeCopy,
    asked_for,
    check_sharded,
    prepare_sharded,
    reshard,
    whole,
)
from entrecipes.training.subject import subject_of
from entrecipes.training.tracking import Listener, RunLog, check_trackers
from entrecipes.training.window import Window

FACTS_IMAGES = 512
"""Images that the scale of the data is measured on."""


class Run:
    """One training run.

    Args:
        recipe: What to do.
        folder: The run folder, or None to write nothing at all.
        listener: Called with every log row.
        parts: A pipeline that is trained already, to be measured and published as this run's.

    Raises:
        UserError: For whatever in the recipe, the data or the folder does not fit, before any training.
    """

    def __init__(
        self, recipe: Recipe, folder: Path | None, listener: Listener | None = None, parts: Components | None = None
    ) -> None:
        self.recipe, self.folder = recipe, folder
        training = recipe.training
        check_engine()
        check_trackers(training.trackers)
        if training.cpu_threads:
            torch.set_num_threads(training.cpu_threads)
        self.accelerator = Accelerator(
            mixed_precision=training.precision,
            cpu=best_device().type == "cpu",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop divides, not a variable
            log_with=list(training.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                # candidates in turns train parts of what the wrapper is built over
                DistributedDataParallelKwargs(find_unused_parameters=getattr(recipe.blocks, "searches", False)),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
        self.device = self.accelerator.device
        check_launch(recipe.training, self.device, self.world_size)

        self.components = parts or load_components(recipe.pipeline, training.seed)
        self.experts = build("experts", recipe.experts)
        self.components.path = self.experts.limited(self.components.path)
        with self.accelerator.main_process_first():  # what the first one caches the others find
            self.data = open_data(recipe.data, self.components, self.device)
        self.space = self.data.space
        self.sharded = asked_for()
        if self.sharded:
            check_sharded(recipe)
        self.model = self.components.model.to("cpu" if self.sharded else self.device)  # to the device shard by shard
        self.adapter = build("adapter", recipe.blocks.adapter, model=self.model, seed=training.seed)
        self._prepare_model()
        averaged = ShardedEma if self.sharded else EmaModel
        self.ema = averaged(training.ema, self.model, self.adapter.eligible) if training.ema and not parts else None
        self.copy = WholeCopy(self.model) if self.sharded else None
        self.objective = Objective(recipe.objective, self.components.path)
        place = self.accelerator.process_index, self.world_size
        self.random = StepRandom(training.seed, training.batch_size, *place, self.device, self.accelerator.gather)
        self.null_label = null_label(recipe, self.components)

        self.images, self.stop_requested = 0, False
        self.window = Window(3, self.device)
        self.optimizer: Any = None
        self.log = RunLog(folder, self.accelerator, listener)
        self.evaluator = Evaluator(recipe.evaluation, self.components, self.data, self.device, Shard.here())
        with visiting(self.device, tried := (self.ema or self).model):  # one that is to be sharded waits on the CPU
            self.evaluator.check(tried, self.accelerator.main_process_first)
        self.noise = build("noise", recipe.noise, path=self.components.path, device=self.device, facts=self._facts())
        kind = "latents" if self.space.latent else self.components.family.kind
        frames = getattr(recipe.data, "frames", None) if self.components.family.kind == "stickers" else None
        self.masks = build("masks", recipe.masks, frames=frames)
        self.curriculum = build(
            "curriculum",
            recipe.curriculum,
            model=self.model,
            kind=kind,
            tasks=self.masks.tasks,
            images=training.images,
            frames=frames,
            device=self.device,
        )
        self.costs = StepCosts(self.model)
        subject = subject_of(self)
        self.pruner = build("prune", recipe.prune, subject=subject)
        self.blocks = build("blocks", recipe.blocks, subject=subject)
        check_condition_is_learned(recipe, self.components.family, self.model, self.adapter)
        self.wrap()

    # -- building ---------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.accelerator.num_processes

    def _facts(self) -> RunFacts:
        """What noise samplers may know, from a few hundred images."""
        known = value_statistics(self.evaluator.clean(FACTS_IMAGES))
        return RunFacts(**known, images=self.recipe.training.images, weight=self.objective.weight)

    def _prepare_model(self) -> None:
        training = self.recipe.training
        if training.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if training.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()

    def wrap(self) -> None:
        """(Re)build what depends on the trained set: the optimizer and the distributed wrapper."""
        if self.sharded:
            reshard(self.model)
        elif self.optimizer is not None:  # undo accelerate's wrapping, autocast included
            self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
            self.accelerator._optimizers.clear()
        if self.device.type == "cpu" and not all(p.requires_grad for p in self.model.parameters()):
            guard_group_norms(self.model)
        previous = getattr(self.optimizer, "optimizer", None)
        optimizer = build_optimizer(self.recipe.optimizer, self.model, previous)
        prepare = partial(prepare_sharded, self.accelerator) if self.sharded else self.accelerator.prepare
        self.wrapped, self.optimizer = prepare(self.model, optimizer)
        self.trainable = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        if self.recipe.training.compile and previous is None:
            self.model.compile()
        for follower in filter(None, (self.ema, self.copy)):
            follower.follow(self.model)  # preparing may have given the weights new storage
        self.denoiser = Denoiser(self.wrapped, self.components.family, self.components.path)
        self.costs.begin(self.model)

    # -- one step ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """This process's share of every batch from the current position on."""
        training = self.recipe.training
        return batches(
            self.data.train,
            seed=training.seed,
            batch_size=training.batch_size,
            start_images=self.images,
            rank=self.accelerator.process_index,
            world_size=self.world_size,
            device=self.device,
            flip=getattr(self.recipe.data, "horizontal_flip", False),
            num_workers=getattr(self.recipe.data, "num_workers", 0),
        )

    def draw_frames(self, batch: Batch) -> Frames:
        """Which frames of each clip are given, and which count; of other data, everything."""
        odds = self.curriculum.odds(self.images, len(batch.images), batch.motion, batch.lengths)
        return self.masks.draw(batch.lengths, odds, self.random)

    def condition(self, samples: Tensor, batch: Batch, x0: Tensor, frames: Frames) -> Condition:
        """What a batch is conditioned on: labels [n] or maps [n, C, ...], a share of them replaced by the null one; of
        stickers the given frames and the text."""
        if frames is not EVERYTHING:
            text, hidden = batch.text, getattr(self.recipe.masks, "token_dropout", 0)
            if hidden and text is not None:
                text = text * (self.random.uniform(text.shape[1]) >= hidden)[..., None]
            return Asked.of(x0, frames.given, text, frames.text)
        condition = self.space.condition(samples)
        condition = batch.labels if condition is None else condition
        if not self.recipe.training.label_dropout:
            return condition
        dropped = self.random.uniform() < self.recipe.training.label_dropout
        return torch.where(dropped.view(-1, *[1] * (condition.dim() - 1)), self.null_label, condition)

    def micro_batches(self) -> Iterator[tuple[slice, Callable[[], Any]]]:
        """Rows of each forward pass, and the context that holds gradients back until the last one."""
        share = self.recipe.training.batch_size // self.world_size
        size = self.recipe.training.micro_batch_size or share
        for start in range(0, share, size):
            last = start + size == share
            yield slice(start, start + size), contextlib.nullcontext if last else self._no_sync

    def _no_sync(self) -> Any:
        return self.accelerator.no_sync(self.wrapped)

    def clip_gradients(self) -> Tensor | None:
        """Clip the gradient's norm if the recipe says so; returns the norm before, on the device."""
        limit = self.recipe.training.clip_grad_norm
        return whole(self.accelerator.clip_grad_norm_(self.trainable, limit)) if limit else None

    def update_ema(self) -> None:
        """Move the averaged model."""
        if self.ema:
            self.ema.update(self.images, self.recipe.training.batch_size)

    def record(
        self,
        frames: Frames,
        log_sigma: Tensor,
        weight: Tensor,
        losses: list[Tensor],
        x0_errors: list[Tensor],
        grad_norm: Tensor | None,
    ) -> None:
        """Tell the noise sampler, the curriculum and the log window what this step saw; all stays on the device."""
        loss, x0_error = torch.cat(losses), torch.cat(x0_errors)
        if self.noise.records or self.curriculum.records:
            task = torch.zeros_like(loss) if frames.task is None else frames.task.to(loss.dtype)
            gathered = self.accelerator.gather(torch.stack([loss, x0_error, task], dim=1))
            if self.noise.records:
                self.noise.record(log_sigma, gathered[:, 1], gathered[:, 0])
            if self.curriculum.records:
                self.curriculum.record(gathered[:, 2].long(), gathered[:, 0], gathered[:, 1], log_sigma)
        norm = loss.new_zeros(()) if grad_norm is None else grad_norm
        self.window.add(torch.stack([(loss * weight).mean(), x0_error.mean(), norm]))

    def refresh_noise(self) -> None:
        """Let the noise sampler rebuild its table where due, and write down what it says of it."""
        if row := self.noise.refresh(self.images):
            self.log.write("noise", self.images, **row)

    def advance_blocks(self) -> None:
        """Let blocks be removed, opened or closed; rebuild what depends on them when any was."""
        if costs := self.costs.take(self.optimizer):
            self.log.write("costs", self.images, **costs)
        phases = self.curriculum.advance(self.images)
        removals = self.pruner.advance(self.images)
        events = self.blocks.advance(self.images)
        if phases and not events:  # other weights are eligible now
            self.blocks.load_state_dict(self.blocks.state_dict())
        if phases or events or any(row["remove"] for row in removals):
            self.wrap()
        self.blocks.focus()
        for row in removals:
            self.log.write("prune", **row)
            self.log.write("event", self.images, what=row["what"])
        for row in phases + events:
            self.log.write("event", self.images, seconds=self.window.elapsed, **row)

    # -- when due ---------------------------------------------------------------------------------------------------

    def due(self, every: int | None, before: int) -> bool:
        """Whether a multiple of `every` images was passed since `before`, or training has just ended."""
        if self.images >= self.recipe.training.images:
            return True
        return every is not None and self.images // every > before // every

    def check_finite(self, loss: float) -> None:
        """Stop a run whose loss (or sum of losses) is no number any more. Raises UserError."""
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} within the {self.window.steps} steps before image {self.images}. The "
                "checkpoints are older than that: lower optimizer.learning_rate, or train without fp16, and run again "
                "to go on from there."
            )

    @property
    def grid_path(self) -> Path:
        """The sample grid drawn at the images seen so far."""
        return self.folder / "samples" / f"images-{self.images:012d}.png"
