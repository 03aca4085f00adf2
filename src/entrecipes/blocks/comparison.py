"""Convergence efficiency: which number of open blocks lowers the loss most for its time (Ent-Prog, CVPR 2026).

CE(m) is the drop of a fixed held-out loss over the time of the steps that earned it. The published formula sums the
changes of the loss measured for a candidate; on shared weights that loss is the same network's for all candidates, so
that a drop has to be credited to the steps between two measurements. Candidates therefore take turns of a few steps,
with a measurement between turns (where the sources draw the candidate of every step at random), in an order that is
turned round in every other round: the loss falls faster early in a round than late. The first turn of each counts for
nothing, as in the published sum, which starts at the second measurement: an adaptive optimizer's first steps with
weights that have just been opened are large whatever their gradients, and often raise the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Clock = Literal["predicted", "measured"]


@dataclass
class Candidate:
    """A number of open blocks, and what it has earned."""

    m: int
    """Open blocks."""
    predicted: float
    """Predicted cost of a step, in forward passes of a mean block."""
    drop: float = 0.0
    """Sum of what the loss fell in its turns, the first apart."""
    steps: int = 0
    """In those turns."""
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """The loss after each of its turns."""

    def efficiency(self, clock: Clock) -> float:
        """Drop of the loss per predicted cost, or per second."""
        spent = self.steps * self.predicted if clock == "predicted" else self.seconds
        return self.drop / max(spent, 1e-9)


class Comparison:
    """Candidates in turns, at the start of a stage.

    Args:
        candidates: Two or more, the fewest blocks first.
        loss: The held-out loss before the first turn.
        start: Images seen now.
        until: Images seen when it should be over.
        burst: Steps of a turn on shared weights; None: snapshots, one turn each of equal length, all from the same
            weights, so that each is credited with the whole drop since the start.
    """

    def __init__(self, candidates: Sequence[Candidate], loss: float, start: int, until: int, burst: int | None) -> None:
        self.candidates = list(candidates)
        self.loss, self.start, self.until, self.burst = loss, start, until, burst
        self.first_loss = loss
        self.turn = self.taken = 0

    @property
    def current(self) -> Candidate:
        """The candidate whose turn it is."""
        round_, place = divmod(self.turn, len(self.candidates))
        return self.candidates[-1 - place if round_ % 2 else place]

    def step(self, images: int) -> bool:
        """Count a step, after which `images` are seen; says whether the turn is over."""
        self.taken += 1
        self.current.steps += 1
        if self.burst:
            return self.taken >= self.burst
        return images >= self.start + (self.until - self.start) * (self.turn + 1) / len(self.candidates)

    def credit(self, loss: float) -> None:
        """End the turn with the loss measured now."""
        candidate = self.current
        if self.burst and not candidate.losses:
            candidate.steps, candidate.seconds = 0, 0.0
        else:
            candidate.drop += self.loss - loss
        candidate.losses.append(loss)
        if self.burst:
            self.loss = loss
        self.turn, self.taken = self.turn + 1, 0

    def over(self, images: int) -> bool:
        """Whether all have had the same number of turns that count, and the time is up."""
        rounds, rest = divmod(self.turn, len(self.candidates))
        return not rest and (rounds >= 2 and images >= self.until if self.burst else rounds == 1)

    @property
    def compared(self) -> bool:
        """Whether all candidates have had a turn that counts."""
        return all(candidate.steps and candidate.losses for candidate in self.candidates)

    def best(self, clock: Clock) -> Candidate:
        """The most efficient candidate, the smallest of equal ones.

        Also the smallest, which opens nothing more, where not all were compared or none lowered the loss: of two that
        raise it, the formula would prefer the dearer.
        """
        if not self.compared or all(candidate.drop <= 0 for candidate in self.candidates):
            return self.candidates[0]
        return max(self.candidates, key=lambda candidate: candidate.efficiency(clock))

    def rows(self, clock: Clock) -> list[dict[str, Any]]:
        """What was found of each candidate, as plain values; `ce` is by the clock that decides."""
        return [asdict(c) | {"ce": c.efficiency(clock) if c.steps else None} for c in self.candidates]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return vars(self) | {"candidates": [asdict(candidate) for candidate in self.candidates]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Comparison:
        """What `state_dict` was taken from."""
        self = cls.__new__(cls)
        vars(self).update(state)
        self.candidates = [Candidate(**{**c, "losses": list(c["losses"])}) for c in state["candidates"]]
        return self
