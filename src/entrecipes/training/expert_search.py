"""Between the stages of TDC: what the base knows at which noise levels, and the network found for each group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entrecipes.data.opening import open_data
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.pipelines import load_components
from entrecipes.evaluation.drawing import draw_x0
from entrecipes.evaluation.evaluator import evaluating
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.heldout import HeldOutBundle
from entrecipes.evaluation.scoring import Scoring
from entrecipes.experts.costs import TRAINING_PASSES
from entrecipes.experts.criteria import rankings, scores, shares
from entrecipes.experts.grouping import Group, group_nats, make_groups
from entrecipes.experts.proxy_pruning import Each, Measured, MemoryBank, Proposer, Task, Trial, search
from entrecipes.experts.tdc import Found
from entrecipes.experts.units import Units, cut
from entrecipes.information.profile import Profile
from entrecipes.information.values import value_statistics
from entrecipes.noise.base import NoiseSampler, RunFacts
from entrecipes.recipe.base import build
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.schema import Recipe
from entrecipes.training.run import FACTS_IMAGES

Agree = Callable[[Callable[[], Any]], Any]
"""Calls in the first process, and gives what it returns to all."""


@dataclass(frozen=True)
class Batch:
    """One step of recovery: fixed, so that all candidates of a group see the same."""

    x0: Tensor
    noise: Tensor
    log_sigma: Tensor
    condition: Tensor | None
    weight: Tensor


class ExpertSearch:
    """Measures a trained base and searches its pruned networks.

    Args:
        recipe: The TDC recipe.
        base: Run folder of the base; its published (averaged) weights are cut.
        folder: The TDC run's `search/`.
        device: Where networks are tried.
        agree: So that all processes decide alike.
        each: Shares out the candidates; see `entrecipes.experts.proxy_pruning.search`.

    Raises:
        UserError: For a model whose units can't be told, or data that can't be asked for chosen images.
    """

    def __init__(
        self, recipe: Recipe, base: Path, folder: Path, device: torch.device, agree: Agree, each: Each = map
    ) -> None:
        self.recipe, self.section, self.folder = recipe, recipe.experts.search, folder
        self.device, self.agree, self.each = device, agree, each
        self.components = load_components(Pipeline(pretrained=str(base)), recipe.training.seed)
        self.path, self.family = self.components.path, self.components.family
        self.model = self.components.model.to(device).eval()
        self.data = open_data(recipe.data, self.components, device)
        self.objective = Objective(recipe.objective, self.path)
        self.units = Units.of(self.model, self.section.units, self.family.one_pass)
        self.batch_size = recipe.training.micro_batch_size or recipe.training.batch_size
        x0, _ = draw_x0(self.data, self.data.train, FACTS_IMAGES, 0, device)
        self.dimensions = x0[0].numel()
        self.facts = RunFacts(**value_statistics(x0), images=recipe.training.images, weight=self.objective.weight)
        self.flops = 0.0
        """Spent so far, beside what trials say of themselves."""

    @cached_property
    def profile(self) -> Profile:
        """x0 error of the base, mean over dimensions, on training images at the levels of `evaluation.held_out`."""
        section = self.recipe.evaluation.held_out
        x0, condition = draw_x0(self.data, self.data.train, section.images, section.seed, self.device)
        bundle = HeldOutBundle(section, x0, condition, self.path)
        error = Denoiser(self.model, self.family, self.path).x0_error
        measured = bundle.measure(error, self.batch_size, Shard.here()).x0_error
        self.flops += self.units.base_flops * len(x0) * section.noise_levels
        return Profile(bundle.log_sigma, measured / x0[0].numel())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, by the measured profile where the recipe says so."""
        pivot = self.recipe.evaluation.held_out.gate_pivot
        return make_groups(self.recipe.experts, self.path, self.profile, pivot)

    def find(self, group: Group, bank: MemoryBank, proposer: Proposer, stopped: Callable[[], None]) -> Found:
        """Search a group's network, and leave a pipeline to start from in `start-NUMBER/`.

        Args:
            group: The group.
            bank: Trials so far; those of this group are not measured again.
            proposer: Who proposes plans.
            stopped: Called before each trial; raises when the run is asked to stop.
        """
        trials = GroupTrials(self, group, stopped)
        target = group.ratio * self.units.base_flops
        full = tuple(unit.atoms for unit in self.units.units)
        order = [torch.arange(count) for count in full]
        if group.ratio == 1:
            whole = (1.0,) * len(full)
            best = Trial(group.number, 0, 0, "none", whole, full, target, trials.base_loss, 0.0, 0.0, 0.0, "")
        else:
            task = Task(
                group=group,
                units=self.units,
                importance=shares(trials.worth),
                target=target,
                base_loss=trials.base_loss,
                seed=self.recipe.training.seed,
            )
            best = search(self.section, task, trials.measure, bank, proposer, self.agree, self.each)
            order = trials.order
        network = cut(self.model, self.units, best.kept, order)
        self.agree(lambda: self.components.pipeline(network).save_pretrained(self.folder / f"start-{group.number}"))
        uniform = [trial.loss for trial in bank.trials(group.number) if trial.proposer == "uniform"]
        return Found(
            group=group,
            best=best,
            base_loss=trials.base_loss,
            uniform_loss=uniform[0] if uniform else None,
            trials=len(bank.trials(group.number)),
            parameters=sum(weight.numel() for weight in network.parameters()),
            nats=self.nats[group.number],
        )

    @cached_property
    def nats(self) -> list[float]:
        """Of the base, in each group."""
        return group_nats(self.groups, self.profile, self.dimensions, self.recipe.evaluation.held_out.gate_pivot)


class GroupTrials:
    """Tries networks on one group: cut, recover shortly, measure the loss on fixed draws."""

    def __init__(self, search: ExpertSearch, group: Group, stopped: Callable[[], None]) -> None:
        self.search, self.section, self.stopped = search, search.section, stopped
        self.served = search.path.within(*group.log_sigma)
        part = replace(search.components, path=self.served)
        self.scoring = Scoring.on_images(self.section.draws, part, search.data, search.device, search.batch_size)
        self.weights = self.scoring.weights(self._noise(self.served))
        self.trained = self._noise(search.path.within(*group.train))
        self.seed = search.recipe.training.seed * 1009 + group.number
        self.draws = len(self.scoring.bundle.x0) * len(self.scoring.bundle.log_sigma)
        self.base_loss = search.agree(lambda: self._loss(search.model))
        search.flops += search.units.base_flops * self.draws

    def _noise(self, path: Any) -> NoiseSampler:
        """The recipe's sampler as it begins: a learned one has learned nothing here, and draws its warm-up's levels."""
        return build("noise", self.search.recipe.noise, path=path, device=self.search.device, facts=self.search.facts)

    def _loss(self, model: nn.Module) -> float:
        with self._autocast():
            return self.scoring.loss(model, self.search.objective, self.weights)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.search.recipe.training.precision
        if precision != "bf16":  # float16 would need its gradients scaled
            return contextlib.nullcontext()
        return torch.autocast(self.search.device.type, torch.bfloat16)

    @cached_property
    def worth(self) -> list[Tensor]:
        """What each channel, head and feature is worth to the base in this group, by the criterion."""
        search, section = self.search, self.section
        if section.criterion not in ("magnitude", "random"):
            search.flops += TRAINING_PASSES * search.units.base_flops * self.draws
        return search.agree(
            lambda: scores(search.units, search.model, section.criterion, self._losses(), section.threshold, self.seed)
        )

    @cached_property
    def order(self) -> list[Tensor]:
        """Of each unit's channels, heads or features, the best first."""
        return rankings(self.worth)

    def _losses(self) -> list[Callable[[], Tensor]]:
        """The base's loss at each noise level, from the cleanest, with gradients; weighted as training draws levels
        (but for Diff-Pruning, which compares the levels' own losses)."""
        bundle, denoiser = self.scoring.bundle, Denoiser(self.search.model, self.search.family, self.served)
        levels: list[list[Any]] = [[] for _ in bundle.log_sigma]
        for level, batch in bundle.batches(self.search.batch_size):
            levels[level].append(batch)

        def loss(level: int) -> Tensor:
            parts = [self.search.objective(*denoiser(*batch), batch[2])[0].sum() for batch in levels[level]]
            weight = 1.0 if self.section.criterion == "diff_pruning" else self.weights[level]
            return sum(parts) * weight / len(bundle.x0)

        return [lambda level=level: loss(level) for level in range(len(levels))]

    def measure(self, kept: tuple[int, ...]) -> Measured:
        """The loss of a plan after a short recovery, and the operations spent on it."""
        self.stopped()
        network = cut(self.search.model, self.search.units, kept, self.order)
        self._recover(network)
        loss = self._loss(network)
        recovery = self.section.recovery
        passes = TRAINING_PASSES * recovery.steps * recovery.batch_size + self.draws
        return Measured(loss, self.search.units.flops(kept) * passes)

    @cached_property
    def batches(self) -> list[Batch]:
        """The batches of the recovery."""
        recovery, search = self.section.recovery, self.search
        if not recovery.steps:
            return []
        wanted = recovery.steps * recovery.batch_size
        x0, condition = draw_x0(search.data, search.data.train, wanted, self.seed, search.device)
        generator = torch.Generator(search.device).manual_seed(self.seed)
        found = []
        for step in range(recovery.steps):
            rows = torch.arange(step * recovery.batch_size, (step + 1) * recovery.batch_size, device=x0.device) % len(
                x0
            )
            level, weight = self.trained.sample(recovery.batch_size, generator)
            noise = torch.randn(x0[rows].shape, generator=generator, device=x0.device, dtype=x0.dtype)
            asked = None if condition is None else condition[rows]
            found.append(Batch(x0[rows], noise, level, asked, weight.to(x0.dtype)))
        return found

    def _recover(self, network: nn.Module) -> None:
        """Train for a few steps, in eval mode: no dropout, so that candidates differ by their plans alone."""
        recovery, denoiser = self.section.recovery, Denoiser(network, self.search.family, self.search.path)
        optimizer = torch.optim.AdamW(network.parameters(), lr=recovery.learning_rate, weight_decay=0.0, fused=True)
        with evaluating(network):
            for batch in self.batches:
                with self._autocast():
                    prediction, target = denoiser(batch.x0, batch.noise, batch.log_sigma, batch.condition)
                loss = self.search.objective(prediction, target, batch.log_sigma)[0]
                (loss * batch.weight).mean().backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
