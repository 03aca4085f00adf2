"""A small task, and how a language model is asked about it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from diffusers import UNet2DModel

from entrecipes.experts.llm import LanguageModel
from entrecipes.experts.memory import Trial
from entrecipes.experts.proxy_pruning import Task
from entrecipes.experts.units import Unit, Units

LEVELS = (1.0, 0.75, 0.5, 0.25)
PLAN = (0.5, 0.75, 1.0)
GOOD = '{"plans": [[0.5, 0.75, 1.0]]}'


def task() -> Task:
    """Three units, a budget of half."""
    rows = [
        Unit("down.0", "widths", 8, 4, 50.0),
        Unit("mid", "blocks", 1, 0, 200.0),
        Unit("mid.ff", "feed_forward", 4, 8, 25.0, parent=1),
    ]
    units = Units(tuple(rows), base_flops=1000.0, model_class=UNet2DModel)
    group = SimpleNamespace(number=1, log_sigma=(-math.log(10), math.log(10)))
    return Task(group, units, (0.9, 0.3, 0.25), target=500.0, base_loss=0.0625, seed=0, levels=LEVELS)


def trial(round: int, loss: float, kept: tuple[int, ...] = (4, 1, 3)) -> Trial:
    """One of a round."""
    return Trial(1, round, 0, "llm", PLAN, kept, flops=505.0, loss=loss, reward=-loss, seconds=1.0, compute=1.0)


SHOWN = [trial(1, 0.1), trial(0, 0.08, (8, 0, 1)), trial(2, 0.09)]


def ask(proposer: LanguageModel, shown: list[Trial] = SHOWN, count: int = 1, seed: int = 0) -> list[tuple[float, ...]]:
    """One round."""
    return proposer.propose(task(), 3, shown, count, np.random.default_rng(seed))
