"""Pruning by a score, at once or in stages: EntPruner and its baselines.

EntPruner (arXiv 2511.21122) ranks blocks by the change of the output's entropy when each is dropped (CED, lowest
first), and removes them in stages during transfer training; at each stage zero-shot proxies decide between candidate
sub-networks, which differ in how many more of the lowest blocks they lack, none included. What the paper's public
sources leave open is a recipe key: the candidates are no more blocks, one step more and two steps more (a step is
target / stages), the last stage removes what is left to the target, and the vote is AutoProg-Zero's rank sum (cost 1,
NTK 1/2, ZiCo 1/2), a tie going to the candidate that removes least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from entrecipes.blocks.pruning import Pruning, Scoring, Subject
from entrecipes.blocks.scores import BlockScores, model_fingerprint
from entrecipes.blocks.selection import Selection
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.errors import UserError
from entrecipes.information.proxies import Candidate, Vote, flops, ntk_condition, vote, zico
from entrecipes.recipe.prune import UNMEASURED, EntPrunerSection, RankedKeys, StagedKeys


class StagedPruning(Pruning):
    """Removes the lowest-ranked blocks: all at once, evenly in stages, or as the vote says.

    Raises:
        UserError: When the ratio asks for more blocks than may go, or given scores belong to another model or data.
    """

    def __init__(self, section: RankedKeys, subject: Subject) -> None:
        staged = isinstance(section, StagedKeys)
        stages = section.stages if staged else 1
        self.due = [section.until * k / stages for k in range(1, stages + 1)] if staged else [section.at]
        super().__init__(section, subject, trained=self.due[-1] > 0)
        try:
            self.selection = Selection(self.dense, section.keep, section.cap)
            self.target = self.selection.target(section.ratio)
        except UserError as error:
            raise UserError(f"prune.{error}") from error
        self.values: dict[int, float] = {}
        """The score of each block when it was last measured."""
        if section.score not in UNMEASURED or isinstance(section, EntPrunerSection):
            _ = self.scoring  # refuses data that can't be scored on
        self.given = self._given() if section.scores else None

    # -- when and how many ------------------------------------------------------------------------------------------

    @property
    def plan(self) -> str:
        count, section = len(self.dense), self.section
        when = ", ".join(f"{round(share * self.subject.images):,}" for share in self.due)
        how = "by a vote at images" if isinstance(section, EntPrunerSection) else "at images"
        return f"removes {self.target} of {count} blocks, the lowest by {section.score}, {how} {when}"

    def choose(self, images: int) -> list[dict[str, Any]]:
        due = sum(images >= share * self.subject.images for share in self.due)  # a long step may pass several
        done = self.stages[-1]["stage"] if self.stages else 0
        met = len(self.dense) - len(self.kept) == self.target
        return [self._stage(due)] if due > done and not met else []

    def _stage(self, stage: int) -> dict[str, Any]:
        """Rank, and let the candidates stand; the first process's finding counts for all."""
        start = time.perf_counter()
        numbers = self._numbers(stage)
        order = self._order(max(numbers))
        scores = {str(index): value for index, value in sorted(self.values.items())} if order else {}
        record: dict[str, Any] = {"stage": stage, "score": self.section.score, "scores": scores}
        found = order[: numbers[0]]
        if len(numbers) > 1:
            candidates = [order[:number] for number in numbers]
            ballot = self._vote(candidates)
            record["vote"] = {"remove": candidates, **ballot.to_row()}
            found = candidates[ballot.winner]
        record |= {"remove": found, "seconds": time.perf_counter() - start}
        record = self.subject.agree(record)
        self.values = _values([record]) or self.values
        return record

    def _numbers(self, stage: int) -> list[int]:
        """How many blocks each candidate of a stage removes, the fewest first."""
        gone, stages = len(self.dense) - len(self.kept), len(self.due)
        left = self.target - gone
        if stage == stages:
            return [left]
        if not isinstance(self.section, EntPrunerSection):
            return [round(self.target * stage / stages) - gone]
        step = max(1, round(self.target / stages))
        return sorted({min(number, left) for number in (0, step, 2 * step)})

    # -- which ------------------------------------------------------------------------------------------------------

    def _order(self, number: int) -> list[int]:
        """The blocks to remove, the first to go first."""
        again = getattr(self.section, "rerank", "stage")
        gone = [block.index for block in self.dense if block.index not in self.kept]
        order: list[int] = []
        while len(order) < number:
            if again != "never" or not self.values:
                before = self.values if order else {}  # what those scored that have gone since this stage began
                self.values = {**before, **self._rank(order)}
            order += self.selection.lowest(self.values, 1 if again == "block" else number, [*gone, *order])
        return order

    def _rank(self, going: list[int]) -> dict[int, float]:
        """The score of every block of the dense model that is left; the lowest go first."""
        section, count = self.section, len(self.dense)
        if section.score == "random":
            places = torch.randperm(count, generator=torch.Generator().manual_seed(self.subject.seed)).tolist()
            return dict(enumerate(map(float, places)))
        if section.score == "spread":
            return spread(count, self.target)
        if self.given and not self.stages and not going:
            scores = self.given
        else:
            gone, gradients = self.here(going), section.score == "taylor"
            scores = self.scoring.measure(self.stack.model, gone, gradients, identify=False)
        weights = self.scoring.weights(self.subject.noise, scores.log_sigma)
        values = scores.score(section.score, weights).tolist()
        return {index: values[here] for here, index in enumerate(self.kept) if index not in going}

    def _given(self) -> BlockScores:
        """The scores of the recipe's file, if they are of this model and data."""
        scores, model = BlockScores.from_json(self.section.scores), self.stack.model
        place = f"prune.scores: {self.section.scores}"
        scores.check_fits(model_fingerprint(model), self.scoring.data_fingerprint, place)
        gate = self.section.draws.gate_pivot
        if self.section.score == "information" and scores.gate_pivot != gate:
            raise UserError(
                f"{place}: measured with the gate's pivot at {scores.gate_pivot}, not {gate}; set "
                "prune.draws.gate_pivot, or measure them again"
            )
        if scores.origin.get("gone") or self.section.score not in scores.names:
            raise UserError(f"{place}: without {self.section.score} of every block; `entrecipes score` them again")
        return scores

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        changed = super().load_state_dict(state)
        self.values = _values(self.stages)
        return changed

    @cached_property
    def scoring(self) -> Scoring:
        """What blocks are scored on."""
        return self.subject.scoring(self.section.draws)

    # -- the vote ---------------------------------------------------------------------------------------------------

    def _vote(self, candidates: list[list[int]]) -> Vote:
        """Rank the sub-networks that lack these blocks, by cost, NTK and ZiCo."""
        weights, model = self.section.vote, self.stack.model
        samples, batches = self._losses(weights.samples, 1), self._losses(weights.batches, weights.batch_size)
        found = []
        for candidate in candidates:
            with self.stack.skipped(*self.here(candidate)):
                cost = _seconds(model, batches) if weights.measure == "seconds" else float(flops(batches[0]))
                found.append(Candidate(cost, ntk_condition(model, samples), zico(model, batches)))
        return vote(found, (weights.cost, weights.ntk, weights.zico))

    def _losses(self, count: int, size: int) -> list[Callable[[], Tensor]]:
        """Losses of that many batches of training images, at noise levels as training draws them; always the same."""
        bundle, subject = self.scoring.bundle, self.subject
        generator = torch.Generator(bundle.x0.device).manual_seed(subject.seed)
        log_sigma, factor = subject.noise.sample(count * size, generator)
        rows = torch.arange(count * size, device=bundle.x0.device) % len(bundle.x0)
        noise = torch.randn((len(rows), *bundle.x0.shape[1:]), generator=generator, device=generator.device)
        return [
            partial(self._loss, rows[part], noise[part], log_sigma[part].float(), factor[part].float())
            for part in torch.arange(count * size).split(size)
        ]

    def _loss(self, rows: Tensor, noise: Tensor, log_sigma: Tensor, factor: Tensor) -> Tensor:
        bundle, components = self.scoring.bundle, self.subject.components
        condition = None if bundle.condition is None else bundle.condition[rows]
        denoiser = Denoiser(self.stack.model, components.family, components.path)
        prediction, target = denoiser(bundle.x0[rows], noise, log_sigma, condition)
        return (self.subject.objective(prediction, target, log_sigma)[0] * factor).mean()


def spread(count: int, target: int) -> dict[int, float]:
    """Every so-manieth block goes: the "oracle" pattern of BK-SDM (Kim et al. 2024), which keeps them evenly spaced."""
    kept = {round(place * (count - 1) / max(1, count - target - 1)) for place in range(count - target)}
    gone = [index for index in range(count) if index not in kept]
    order = gone[::2] + gone[1::2] + sorted(kept)  # neighbours go in different stages
    return {index: float(place) for place, index in enumerate(order)}


def _values(stages: list[dict[str, Any]]) -> dict[int, float]:
    """The latest scores in the stages' records, by block."""
    latest = next((row["scores"] for row in reversed(stages) if row["scores"]), {})
    return {int(index): value for index, value in latest.items()}


def _seconds(model: nn.Module, losses: list[Callable[[], Tensor]]) -> float:
    """Median time of a forward and backward pass, after one to warm up; no gradient is left behind."""
    weights, times = [weight for weight in model.parameters() if weight.requires_grad], []
    for loss in [losses[0], *losses]:
        start = time.perf_counter()
        torch.autograd.grad(loss(), weights, materialize_grads=True)[-1].sum().item()  # which waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
