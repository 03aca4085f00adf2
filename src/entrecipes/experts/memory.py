"""The memory bank of a search: its plans and trials, in a file that a killed process leaves usable."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from entrecipes.errors import UserError
from entrecipes.recipe.experts import Memory

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


@dataclass(frozen=True)
class Plan:
    """A candidate before it is measured; fields as in `Trial`."""

    group: int
    round: int
    number: int
    proposer: str
    shares: tuple[float, ...]
    kept: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """A candidate and what it gave.

    Args:
        group: Number of the group.
        round: Round in which it was proposed, from 0.
        number: Its place in the round, from 0.
        proposer: Who proposed it.
        shares: Share of each unit, as proposed.
        kept: Atoms that each unit keeps, after projection onto the budget.
        flops: FLOPs of one forward pass of one sample.
        loss: Inside the group; None where it was not finite.
        reward: Of that loss; None where it was not finite.
        seconds: Wall clock of the measurement.
        compute: FLOPs spent on it.
        note: What is to be said of the proposal.
    """

    group: int
    round: int
    number: int
    proposer: str
    shares: tuple[float, ...]
    kept: tuple[int, ...]
    flops: float
    loss: float | None
    reward: float | None
    seconds: float
    compute: float
    note: str = ""


class MemoryBank:
    """The trials of a run's searches, in a file with one JSON object a line, each on the disk before the next begins.

    `search` lines say of each group what is searched, `round` lines hold the plans of a round before the first of them
    is measured, `trial` lines the trials. A process may die at any moment: a last line that was cut short is dropped
    with a warning, and only its round's plan or its trial is done again.

    Args:
        path: The file; it need not exist. None: in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] | None = None
        self._end = 0

    def begin(self, identity: dict[str, Any]) -> None:
        """Write what is searched in `identity["group"]`, or check that the file's trials belong to it.

        Raises:
            UserError: If they belong to another search.
        """
        identity = json.loads(json.dumps(identity))
        held = self._of("search", identity["group"])
        if not held:
            return self._append({"kind": "search", **identity})
        names = [name for name in identity if not _same(identity[name], held[0].get(name))]
        if names:
            raise UserError(
                f"{self.path}: group {identity['group']} holds trials of another search (of other {', '.join(names)}); "
                "delete the file to search anew, or go back to the recipe and base that it was begun with"
            )

    def add(self, trial: Trial) -> Trial:
        """Append a trial; returns when it is on the disk."""
        self._append({"kind": "trial", **asdict(trial)})
        return trial

    def add_plans(self, plans: Sequence[Plan], dialogue: Sequence[dict[str, str]] = ()) -> None:
        """Append the plans of a round, and what was said to find them; returns when they are on the disk."""
        plan = plans[0]
        rows = [asdict(plan) for plan in plans]
        line = {"kind": "round", "group": plan.group, "round": plan.round, "plans": rows}
        self._append(line | ({"dialogue": list(dialogue)} if dialogue else {}))

    def plans(self, group: int, round: int) -> list[Plan]:
        """The plans of a round; none if it has not begun."""
        rounds = [line for line in self._of("round", group) if line["round"] == round]
        return [_thaw(Plan, row) for line in rounds for row in line["plans"]]

    def trials(self, group: int) -> list[Trial]:
        """A group's trials in the order they were measured."""
        return [_thaw(Trial, line) for line in self._of("trial", group)]

    def shown(self, group: int, memory: Memory | None) -> list[Trial]:
        """What a proposer is shown: the best trials, the best first, then the latest that are not among them.

        Trials without a finite loss are not shown; nothing is where `memory` is None.
        """
        if memory is None:
            return []
        trials = [trial for trial in self.trials(group) if trial.reward is not None]
        best = sorted(trials, key=lambda trial: -trial.reward)[: memory.best]
        return best + [trial for trial in trials[max(0, len(trials) - memory.last) :] if trial not in best]

    def _of(self, kind: str, group: int) -> list[dict[str, Any]]:
        if self._lines is None:
            self._lines = self._read()
        return [line for line in self._lines if line["kind"] == kind and line["group"] == group]

    def _read(self) -> list[dict[str, Any]]:
        """All lines of the file; what a killed process left of its last one is dropped."""
        content = self.path.read_bytes() if self.path and self.path.exists() else b""
        *rows, torn = content.split(b"\n")
        self._end = len(content) - len(torn)
        if torn:
            logger.warning("%s: dropped its last line, which was cut short", self.path)
        lines = []
        for number, row in enumerate(rows, 1):
            try:
                lines.append(json.loads(row))
                lines[-1]["kind"], lines[-1]["group"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}:{number}: no record of a search; delete the file to search anew"
                ) from None
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False)
        if self._lines is None:
            self._lines = self._read()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._end)
                file.write(text.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._end += len(text) + 1
        self._lines.append(json.loads(text))


def _same(a: Any, b: Any) -> bool:
    """Equal; measured numbers may differ in what another machine's kernels round differently."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4)
    return a == b


def _thaw(record: type[Record], row: dict[str, Any]) -> Record:
    """A frozen record of what JSON made of it."""
    return record(
        **{name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in record.__dataclass_fields__}
    )
