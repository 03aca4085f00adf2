"""Ent-Prog (CVPR 2026): blocks open in stages, the most important first; measured efficiency decides how many.

The order comes from a score (Conditional Entropy Inflation as published), once, before training. At the start of each
stage candidates for the number of open blocks take turns, and the one whose turns lowered a held-out loss most for
their cost is kept; the number never falls, and open blocks stay open. Closed blocks run as always but get no gradient,
no optimizer state and, below the lowest open one, no backward pass at all. What the sources leave open (stages, steps,
candidates, lengths, what of the rest is trained) is a recipe key, with AutoProg's values as defaults.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from entrecipes.blocks.closed import ClosedLayers
from entrecipes.blocks.comparison import Candidate, Comparison
from entrecipes.blocks.cost import CostModel, cost_model, weight_names
from entrecipes.blocks.ordering import by_score, cost_aware, without_scores
from entrecipes.blocks.outside import inputs_and_head
from entrecipes.blocks.pruning import Subject
from entrecipes.blocks.schedule import train_only
from entrecipes.blocks.stack import BlockStack
from entrecipes.blocks.yardstick import RunYardstick, Yardstick
from entrecipes.errors import UserError
from entrecipes.recipe.blocks import EntProgSection


class ProgressiveBlocks:
    """The schedule of `blocks: {type: entprog}`, its baselines among them.

    Attributes:
        order: All blocks, in the order in which they are opened; empty before the first `advance`.
        held: How many of them may be trained now; all that are compared, while they are.
        m: How many are open by decision.

    Raises:
        UserError: For a model without a stack of blocks, or data without what the section measures on.
    """

    def __init__(self, section: EntProgSection, subject: Subject, yardstick: Yardstick | None = None) -> None:
        self.section, self.subject = section, subject
        try:
            self.stack = BlockStack(subject.components.model, trained=True)
        except UserError as error:
            raise UserError(f"blocks: {error}") from error
        self.yardstick = yardstick or RunYardstick(section, subject)
        self.closed = ClosedLayers(section.closed.quantise, self.stack.model, getattr(subject, "copies", ()))
        self.stages = 1 if section.growth == "none" else section.stages
        self.stage, self.m, self.held = -1, 0, 0
        self.order: list[int] = []
        self.scores: list[float] = []
        self.inputs: set[str] = set()
        """Weights outside the blocks that blocks depend on."""
        self.comparison: Comparison | None = None
        self.level_weights: list[float] = []
        self.start: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.mark = self.measuring_seconds = 0.0

    # -- when ---------------------------------------------------------------------------------------------------------

    def advance(self, images: int) -> list[dict[str, Any]]:
        due = min(images * self.stages // self.subject.images, self.stages - 1)
        ended = due > self.stage or images >= self.subject.images
        rows = self._compare(images, ended) if self.comparison else []
        if due > self.stage:
            rows.append(self._enter(due, images))
        return rows

    def focus(self) -> None:
        if self.comparison:
            if self.section.mode == "snapshot" and self.start is None:
                self.start = self.subject.snapshot()  # now that the optimizer is that of the held set
            self._focus(self.comparison.current.m)
        self.mark = self.subject.clock()

    def _enter(self, stage: int, images: int) -> dict[str, Any]:
        """Begin a stage: decide, or begin to compare."""
        with self.whole():
            ranking = self._rank() if not self.order or self.section.rerank else {}
        self.stage = stage
        numbers = self._numbers(stage)
        if len(numbers) == 1:
            self.m = numbers[0]
            self._hold(self.m)
            said = f"trains {self.m} of {len(self.order)} blocks"
            return self._row(said) | ranking
        self._hold(numbers[-1])
        begun = self.subject.clock()
        self.level_weights = self.subject.agree(self.yardstick.level_weights())
        loss = self._loss()
        self.measuring_seconds = self.subject.clock() - begun
        ends = (stage + 1) * self.subject.images / self.stages
        until = images + round(self.section.supernet * (ends - images))
        burst = self.section.burst if self.section.mode == "supernet" else None
        candidates = [Candidate(m, self._cost(m)) for m in numbers]
        self.comparison = Comparison(candidates, loss, images, until, burst)
        said = f"compares {', '.join(map(str, numbers))} of {len(self.order)} blocks"
        measured = {"compares": numbers, "loss": loss, "measuring_seconds": self.measuring_seconds}
        return self._row(said) | ranking | measured

    def _numbers(self, stage: int) -> list[int]:
        """Numbers of open blocks that may follow, the fewest first."""
        section, count = self.section, len(self.order)
        top = max(1, round(section.largest * count))
        last = stage == self.stages - 1
        if section.growth == "none" or (last and section.growth == "adaptive" and section.final == "all"):
            return [top]
        if section.growth == "linear":
            return [max(1, round(top * (stage + 1) / self.stages))]
        step = max(1, round(section.step * count))
        steps = [self.m + step * k for k in range(section.candidates)] if self.m else [step, math.ceil(top / 2)]
        return sorted({min(number, top) for number in steps})

    # -- which candidate ----------------------------------------------------------------------------------------------

    def _compare(self, images: int, ended: bool) -> list[dict[str, Any]]:
        """Count the step that was taken; end turns, and the comparison."""
        found = self.comparison
        over = found.step(images) or ended
        if over and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.subject.clock()
        found.current.seconds += now - self.mark
        if not over:
            return []
        candidate = found.current
        found.credit(self._loss())
        ended = ended or found.over(images)
        best = self.subject.agree(found.best(self.section.clock).m)
        if self.section.mode == "snapshot":
            if best == candidate.m:
                self.best = self.subject.snapshot()
            self.subject.restore(self.best if ended else self.start)
        self.measuring_seconds += self.subject.clock() - now
        return [self._choose(best)] if ended else []

    def _loss(self) -> float:
        """The held-out loss; raises UserError when it is no number any more."""
        loss = self.subject.agree(self.yardstick.loss(self.level_weights))
        if not math.isfinite(loss):
            raise UserError(
                f"blocks: the held-out loss that candidates are compared on became {loss}; lower the learning rate, or "
                "train without fp16, and go on from a checkpoint"
            )
        return loss

    def _choose(self, m: int) -> dict[str, Any]:
        """Keep the best candidate for the rest of the stage."""
        found, self.comparison, self.start, self.best = self.comparison, None, None, None
        self.m = m
        self._hold(m)
        clock = self.section.clock
        facts = {"candidates": found.rows(clock), "clock": clock, "loss": found.first_loss}
        why = "the most efficient"
        if not found.compared:
            why = "not all candidates having had a turn that counts: give stages more images, or lower blocks.burst"
        elif all(candidate.drop <= 0 for candidate in found.candidates):
            why = "since no candidate lowered the loss"
        row = self._row(f"opens {m} of {len(self.order)} blocks, {why}")
        return row | facts | {"measuring_seconds": self.measuring_seconds}

    # -- which blocks -------------------------------------------------------------------------------------------------

    def _rank(self) -> dict[str, Any]:
        """Measure, and put the blocks in order; those that are open stay in front. For the log, what was found."""
        section, begun = self.section, self.subject.clock()
        if not self.order:
            self.inputs, _ = inputs_and_head(self.stack, self.yardstick.call)
        if section.measured is None:
            self.order = without_scores(section.order, len(self.stack), self.subject.seed)
            return {"order": self.order}
        opened = self.order[: self.m]
        self.scores = self.subject.agree(self.yardstick.scores(section.measured))
        if section.order == "cost_aware":
            self.order = cost_aware(self.scores, self._costs(), self._below(), opened)
        else:
            self.order = by_score(self.scores, opened)
        seconds = self.subject.clock() - begun
        return {"order": self.order, "score": section.measured, "scores": self.scores, "scoring_seconds": seconds}

    def _costs(self) -> CostModel:
        names = {name for name, _ in self.stack.model.named_parameters()}
        return cost_model(self.stack, set(filter(self.subject.eligible, names)))

    def _below(self) -> bool:
        """Whether anything before the blocks is trained."""
        return self.section.inputs == "always" and any(map(self.subject.eligible, self.inputs))

    def _cost(self, m: int) -> float:
        """Predicted cost of a step that trains so many blocks."""
        return self._costs().cost(self.order[:m], self._below()).total

    def _row(self, said: str) -> dict[str, Any]:
        """What every row of the log says."""
        costs, opened = self._costs(), sorted(self.order[: self.held])
        cost = costs.cost(opened, self._below())
        return {
            "what": f"stage {self.stage + 1} of {self.stages}: {said}",
            "stage": self.stage,
            "open": opened,
            "m": self.held,
            "blocks": len(self.order),
            "floor": costs.floor(opened, self._below()),
            "predicted_cost": cost.total,
            "predicted_speed_up": cost.speed_up,
            "predicted_activations": cost.activations,
        }

    # -- flags --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.stack.model.parameters()).device

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        return self.closed.whole(changed)

    def _hold(self, number: int, held_quantised: list[str] | None = None) -> None:
        """Let the first blocks of the order be trained, and of the rest what the section says."""
        self.held = self.focused = number
        names = weight_names(self.stack)
        closed = {name for block in self.order[number:] for name in names[block]}
        if self.section.inputs == "never":
            closed |= self.inputs

        def trained(name: str) -> bool:
            return name not in closed and self.subject.eligible(name)

        self.closed.open(trained, held_quantised)
        train_only(self.stack.model, trained)

    def _focus(self, number: int) -> None:
        """Close the held blocks beyond that many for the moment; the optimizer keeps their state."""
        if number == self.focused:
            return
        self.focused = number
        names = weight_names(self.stack)
        for place, block in enumerate(self.order[: self.held]):
            for name in names[block]:
                weight: nn.Parameter = self.stack.model.get_parameter(name)
                weight.requires_grad_(place < number and self.subject.eligible(name))
                weight.grad = None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in _STATE},
            "inputs": sorted(self.inputs),
            "comparison": self.comparison.state_dict() if self.comparison else None,
            "closed": self.closed.names(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({key: state[key] for key in _STATE})
        self.inputs = set(state["inputs"])
        self.comparison = Comparison.from_state(state["comparison"]) if state["comparison"] else None
        if self.order:
            self._hold(self.held, state.get("closed"))


_STATE = ("stage", "m", "held", "order", "scores", "level_weights", "start", "best", "measuring_seconds")
"""Attributes that a checkpoint holds as they are."""
