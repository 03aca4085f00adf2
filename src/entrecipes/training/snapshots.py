"""A run's weights, put aside and taken back in mid-run, for schedules that try what they may not keep."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrecipes.training.run import Run


def snapshot(run: Run) -> dict[str, Any]:
    """A copy of what training moves."""
    return copy.deepcopy(run.weights())


def restore(run: Run, state: dict[str, Any]) -> None:
    """Go back to a snapshot, which stays as it is; the optimizer must be over the same weights as then."""
    run.load_weights(copy.deepcopy(state))
