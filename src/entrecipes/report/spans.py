"""The time of a run from one change of what is trained to the next, and what its steps took."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from entrecipes.blocks.comparison import Candidate, Comparison
from entrecipes.report.run_folder import RunFolder

Row = dict[str, Any]
HELD = {"saved_bytes": "saved activations", "gradient_bytes": "gradients", "optimizer_bytes": "optimizer state"}
"""What a step holds besides the weights, by the keys of a `costs` row."""


@dataclass(frozen=True)
class Span:
    """The steps between two changes."""

    start: int
    """Images seen at its first step."""
    end: int
    """Images seen when it ended, or so far."""
    seconds: float | None
    """All that it took, measurements too."""
    steps: float
    step_seconds: float | None
    """Of a training step alone; of candidates in turns the mean."""
    costs: Row | None
    """What the heaviest of its steps held."""
    blocks: Row
    """What the block schedule said last; empty where it said nothing."""
    phase: Row
    """What the curriculum said last."""
    compared: Compared | None = None
    """The candidates that took turns."""

    @property
    def predicted(self) -> float | None:
        """Predicted cost of a step relative to one that trains all blocks; of candidates the mean."""
        row = self.blocks
        costs = [candidate.predicted for candidate in self.compared.candidates] if self.compared else []
        if "predicted_cost" not in row or (self.compared and not costs):
            return None
        costs = costs or [row["predicted_cost"]]
        return sum(costs) / len(costs) / (row["predicted_cost"] * row["predicted_speed_up"])


@dataclass(frozen=True)
class Compared:
    """A comparison of candidates at the start of a stage."""

    begun: Row
    """The row that began it."""
    ended: Row
    """The row that chose; empty while it goes on."""

    @property
    def numbers(self) -> list[int]:
        """Open blocks of the candidates, the fewest first."""
        return self.begun["compares"]

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What was found of each."""
        fields = Candidate.__dataclass_fields__
        rows = self.ended.get("candidates", ())
        return [Candidate(**{key: value for key, value in row.items() if key in fields}) for row in rows]

    @cached_property
    def turns(self) -> list[tuple[Candidate, float]]:
        """Whose turn it was, and the held-out loss after it, in the order in which they were taken."""
        found = Comparison(self.candidates, self.begun["loss"], 0, 0, 1)
        left = {candidate.m: list(candidate.losses) for candidate in self.candidates}
        turns = []
        for found.turn in range(sum(map(len, left.values()))):
            turns.append((found.current, left[found.current.m].pop(0)))
        return turns

    @property
    def chosen(self) -> int | None:
        """Open blocks of the best one."""
        return self.ended.get("m")

    @property
    def step_seconds(self) -> float | None:
        """The mean over all its steps."""
        steps = sum(candidate.steps for candidate in self.candidates)
        return sum(candidate.seconds for candidate in self.candidates) / steps if steps else None


def comparisons(folder: RunFolder) -> list[Compared]:
    """Every comparison, in order."""
    found: list[Compared] = []
    for row in folder.metrics("event"):
        if "compares" in row:
            found.append(Compared(row, {}))
        elif "candidates" in row:
            found[-1] = Compared(found[-1].begun, row)
    return found


def spans(folder: RunFolder) -> list[Span]:
    """The run from change to change; a single span where nothing changed. Before the first log row none."""
    ends = [row for row in folder.metrics("train", "event") if row.get("seconds") is not None]
    if not ends:
        return []
    batch = folder.recipe["training"]["batch_size"] if folder.has("recipe.yaml") else 1
    compared = {found.begun["images"]: found for found in comparisons(folder)}
    changes = _changes(folder)
    end = _Change(ends[-1]["images"], ends[-1]["seconds"], ends[-1]["seconds"], {}, {})
    found = []
    for this, following in zip(changes, [*changes[1:], end], strict=True):
        steps = (following.images - this.images) / batch
        if not steps:
            continue
        costs = [row for row in folder.metrics("costs") if this.images < row["images"] <= following.images]
        turns = compared[this.blocks["images"]] if "compares" in this.blocks else None
        step_seconds = turns.step_seconds if turns else (following.reached - this.left) / steps
        span = Span(
            this.images,
            following.images,
            following.reached - this.reached,
            steps,
            step_seconds,
            max(costs, key=held, default=None),
            this.blocks,
            this.phase,
            turns,
        )
        found.append(span)
    return found


class _Change(NamedTuple):
    images: int
    reached: float
    """Seconds when it was due, before anything was measured for it."""
    left: float
    """Seconds when training went on."""
    blocks: Row
    phase: Row


def _changes(folder: RunFolder) -> list[_Change]:
    """All that changed at one time taken together, the beginning of the run first."""
    found = {0: _Change(0, 0.0, 0.0, {}, {})}
    blocks, phase = {}, {}
    for row in folder.metrics("event"):
        if not row.keys() & {"stage", "phase", "trained_parameters"}:
            continue
        if "phase" in row:
            phase = row
        else:
            blocks = row
        images, seconds = row["images"], row["seconds"]
        reached = found[images].reached if images in found else seconds
        if images:
            reached -= row.get("scoring_seconds", 0) + ("compares" in row and row.get("measuring_seconds", 0))
        found[images] = _Change(images, reached, seconds, blocks, phase)
    return list(found.values())


def held(costs: Row) -> int:
    """Bytes that a step held besides the weights."""
    return sum(costs[key] for key in HELD)
