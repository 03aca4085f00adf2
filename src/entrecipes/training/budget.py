"""How many images each arm of a comparison gets, so that all train for the same seconds on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrecipes.errors import UserError
from entrecipes.recipe.changes import HARMLESS, differences
from entrecipes.report.comparison.conditions import Budget, Timed
from entrecipes.training.bases import Tell
from entrecipes.training.planning import Planned, file_name
from entrecipes.training.processes import Processes

FILE = "budget.json"
ROUNDS = 2
"""How often each arm is timed, the arms in turns; the faster round counts, so that a busy moment does not decide."""

SHARE, LONGEST = 1 / 20, 10.0
"""A round takes this share of the budget, at most so many seconds."""

SPEED = ("training.cpu_threads", "data.num_workers", "data.on_device")
UNTIMED = (*(key for key in HARMLESS if key not in SPEED), "training.images", "training.seed")
"""Beginnings of the keys that leave the speed of training as it is."""


def first_of_arms(plans: Sequence[Planned]) -> list[Planned]:
    """Each arm's run with the first seed."""
    return list({planned.arm: planned for planned in reversed(plans)}.values())[::-1]


def untimed(plans: Sequence[Planned], output: Path) -> list[Planned]:
    """The first run of every arm whose speed `output/budget.json` does not know, or knows for another recipe."""
    known = _read(output)
    return [each for each in first_of_arms(plans) if not _same(known.get(each.arm, {}).get("recipe"), each.resolved)]


def time_arms(plans: Sequence[Planned], output: Path, seconds: float, jobs: int, tell: Tell) -> None:
    """Time arms and add their speeds to `output/budget.json`.

    Each is trained for a moment in a process of its own (`entrecipes run --dry-run`), the arms in turns. Where several
    runs are to go at a time, as many copies of an arm are timed beside each other, and their mean speed counts.

    Args:
        plans: One run of each arm.
        output: The comparison's folder.
        seconds: The budget.
        jobs: Runs at a time.
        tell: Called with what was found.

    Raises:
        UserError: When an arm can't be timed, naming its log.
    """
    rounds = {planned.arm: [] for planned in plans}
    processes, found = Processes(jobs), {}
    for _ in range(ROUNDS):
        for planned in plans:
            logs = [output / "logs" / f"{file_name(planned.arm)}-timing-{copy}.log" for copy in range(1, jobs + 1)]
            tried = processes.each(lambda log, planned=planned: _try(processes, planned, log, seconds), logs)
            rounds[planned.arm].append(sum(each["images_per_second"] for each in tried) / jobs)
            found[planned.arm] = tried[0]
    arms = _read(output)
    for planned in plans:
        speeds = rounds[planned.arm]
        tell(f"{planned.arm}: timed at {' and '.join(f'{speed:.4g}' for speed in speeds)} images/second")
        arms[planned.arm] = {
            "images_per_second": max(speeds),
            "rounds": speeds,
            "jobs": jobs,
            "begins": _begins(found[planned.arm]),
            "recipe": planned.resolved,
        }
    (output / FILE).write_text(json.dumps({"seconds": seconds, "arms": arms}, indent=1) + "\n")


def budget(plans: Sequence[Planned], output: Path, seconds: float) -> Budget:
    """What `output/budget.json` gives each arm for these seconds, rounded to its batches, at least one; written there.

    Raises:
        UserError: For an arm that has not been timed.
    """
    if missing := untimed(plans, output):
        names = ", ".join(each.arm for each in missing)
        raise UserError(f"{output / FILE}: {names} not timed yet for --seconds; run once without --report-only")
    arms = _read(output)
    for planned in first_of_arms(plans):
        size, row = planned.resolved["training"]["batch_size"], arms[planned.arm]
        row["images"] = size * max(1, round(row["images_per_second"] * seconds / size))
    (output / FILE).write_text(json.dumps({"seconds": seconds, "arms": arms}, indent=1) + "\n")
    return Budget(seconds, {each.arm: _timed(arms[each.arm]) for each in first_of_arms(plans)})


def _timed(row: dict[str, Any]) -> Timed:
    return Timed(row["images_per_second"], tuple(row["rounds"]), row["jobs"], row["images"], row["begins"])


def _read(output: Path) -> dict[str, dict[str, Any]]:
    """The arms that were timed, by name."""
    try:
        return json.loads((output / FILE).read_text())["arms"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output / FILE}: damaged ({error}); remove it, and the arms are timed again") from error


def _same(recipe: Any, resolved: dict[str, Any]) -> bool:
    changes = differences(recipe, resolved) if recipe else [("", None, None)]
    return all(key.startswith(UNTIMED) for key, _, _ in changes)


def _try(processes: Processes, planned: Planned, log: Path, seconds: float) -> dict[str, Any]:
    """What a dry run found."""
    moment = min(LONGEST, SHARE * seconds)
    why = processes.call(
        ["run", str(planned.recipe), *planned.overrides, "--dry-run", "--json", "--timed", f"{moment:g}"], log
    )
    if why:
        raise UserError(f"{planned.arm} can't be timed: {why} (see {log})")
    return json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])


def _begins(tried: dict[str, Any]) -> str:
    """What the speed is of, where it changes as the run goes on."""
    experts = ["the base of experts"] if tried["experts"] else []
    return "; ".join(filter(None, [*experts, *tried["beginnings"], tried["pruning"]]))
