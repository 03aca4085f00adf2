"""What a progressive schedule measures its model by: the scores of its blocks, and a fixed held-out loss."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from entrecipes.blocks.pruning import Scoring, Subject
from entrecipes.blocks.scores import BlockScores
from entrecipes.recipe.blocks import EntProgSection


class Yardstick(Protocol):
    """Measures one model. Nothing here changes the model or a random state."""

    def scores(self, name: str) -> list[float]:
        """A score of every block; higher: open it earlier."""

    def level_weights(self) -> list[float]:
        """What each noise level counts in `loss`, as training draws them now."""

    def loss(self, weights: list[float]) -> float:
        """The training loss on fixed images, noise levels and noise."""

    def call(self) -> Any:
        """Run the model once, with gradients where they are on."""


class RunYardstick:
    """A run's own: blocks are scored on training images, the loss is measured on held-out ones.

    Raises:
        UserError: For data without what the section measures on.
    """

    def __init__(self, section: EntProgSection, subject: Subject) -> None:
        self.section, self.subject = section, subject
        if section.measured:
            _ = self.drawn
        if section.searches:
            _ = self.holdout

    @property
    def model(self) -> nn.Module:
        """The raw weights."""
        return self.subject.components.model

    @cached_property
    def drawn(self) -> Scoring:
        """What blocks are scored on."""
        return self.subject.scoring(self.section.draws)

    @cached_property
    def holdout(self) -> Scoring:
        """What candidates are compared on."""
        return self.subject.scoring(self.section.holdout, split="held_out")

    def scores(self, name: str) -> list[float]:
        scores: BlockScores = self.drawn.measure(self.model, gradients=name == "taylor", identify=False)
        return scores.score(name, self.drawn.weights(self.subject.noise, scores.log_sigma)).tolist()

    def level_weights(self) -> list[float]:
        return self.holdout.weights(self.subject.noise).tolist()

    def loss(self, weights: list[float]) -> float:
        return self.holdout.loss(self.model, self.subject.objective, torch.tensor(weights, dtype=torch.float64))

    def call(self) -> Any:
        return (self.holdout if self.section.searches else self.drawn).call(self.model)
