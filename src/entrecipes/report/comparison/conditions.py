"""What arms were given before their runs: as many images as fit into the same seconds, a model to start from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """What one arm can do in the seconds that all arms get.

    Args:
        images_per_second: Its speed, timed before the first run: the faster of the rounds.
        rounds: The speed in each round.
        jobs: Copies of it that were timed at the same time, as many as runs were to go beside each other.
        images: Its budget.
        begins: What the speed is of, where it changes later; empty where it does not.
    """

    images_per_second: float
    rounds: tuple[float, ...]
    jobs: int
    images: int
    begins: str = ""


@dataclass(frozen=True)
class Budget:
    """Images for each arm that take the same seconds of training.

    Args:
        seconds: How many.
        arms: By name.
    """

    seconds: float
    arms: dict[str, Timed]


@dataclass(frozen=True)
class Base:
    """A model that arms start from, trained by a recipe of its own.

    Args:
        recipe: Its recipe.
        folder: Its run folder.
        arms: The arms that start from it, at once or by way of another base.
        images: Images that it was trained on; None while it has not finished.
        seconds: Seconds of training that it took, which are in no arm's budget.
        changed: Keys in which its recipe is another now than the one that it was trained with.
    """

    recipe: str
    folder: str
    arms: tuple[str, ...]
    images: int | None = None
    seconds: float | None = None
    changed: tuple[str, ...] = ()
