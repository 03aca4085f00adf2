"""Run folders and comparisons' folders as a gallery reads them: whatever is damaged is named and passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from entrecipes.errors import UserError
from entrecipes.report.comparison.curve import Curve, read_curve
from entrecipes.report.run_folder import RunFolder

Read = TypeVar("Read")
PARTS = ("recipe.yaml", "metrics.jsonl", "run.json")
"""What makes a folder a run's: any of these."""
COMPARISON = "comparison.json"


class TolerantFolder(RunFolder):
    """A run folder of which a damaged file counts as missing, and a damaged line of metrics.jsonl is passed over.

    Args:
        path: The folder.
        assets: Where its pictures are drawn: nothing is written into the run folder.
    """

    def __init__(self, path: Path, assets: Path) -> None:
        super().__init__(path, assets)
        self.problems: list[str] = [] if self.has(PARTS[0]) else ["recipe.yaml is missing: the method is not known"]
        """What is missing or damaged, a sentence each."""
        self._damaged: set[str] = set()
        for name, read in {
            "recipe.yaml": lambda: self.recipe["training"],
            "recipe.source.yaml": lambda: self.recipe_text,
            "metrics.jsonl": lambda: self._records,
            "run.json": lambda: (self.run["data"]["name"], self.run["pipeline"]["class"]),
        }.items():
            if self.has(name) and self.attempt(name, read) is None:
                self._damaged.add(name)
        if not self.has("metrics.jsonl"):
            self.problems.append("metrics.jsonl is missing or damaged: there are no curves")

    def has(self, name: str) -> bool:
        """Whether the run has written that file, and it can be read."""
        return name not in self.__dict__.get("_damaged", ()) and super().has(name)

    def attempt(self, what: str, call: Callable[[], Read]) -> Read | None:
        """What the call returns; None where it fails for whatever reason, which is named."""
        try:
            return call()
        except Exception as error:  # a folder may be damaged in any way, and the others shall be shown
            self._name(what, error)
            return None

    def _refuse(self, damage: UserError) -> None:
        self._name("metrics.jsonl", damage)

    def _name(self, what: str, error: Exception) -> None:
        text = str(error) if isinstance(error, UserError) else f"{what}: {type(error).__name__}: {error}"
        text = text.replace(f"{self.path}/", "").replace(str(self.path), "this folder")
        if text not in self.problems:
            self.problems.append(text)

    @cached_property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.has("run.json")

    @cached_property
    def images(self) -> int:
        """Images seen so far."""
        if self.finished and self.run.get("images"):
            return self.run["images"]
        return max((row["images"] for row in self._records), default=0) if self.has("metrics.jsonl") else 0

    def curve(self, metric: str) -> Curve | None:
        """The curve of a metric, or None."""
        try:
            return read_curve(self, metric)
        except (UserError, KeyError, TypeError, ValueError):
            return None


class Place(NamedTuple):
    """A run folder that was asked for."""

    path: Path
    arm: str = ""
    """Its arm in a comparison, otherwise empty."""
    seed: str = ""


class ComparisonFolder:
    """What `entrecipes compare` leaves: comparison.json, its plots, and the runs where they are still there.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problems = path, []
        self.record: dict[str, Any] = {}
        if not (path / COMPARISON).is_file():
            self.problems.append("comparison.json is missing: the comparison has not finished; its command goes on")
            return
        try:
            self.record = json.loads((path / COMPARISON).read_text(encoding="utf-8"))
            self.record["name"], self.record["metric"], self.record["baseline"], self.record["arms"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.record = {}
            self.problems.append(f"comparison.json is damaged ({type(error).__name__}: {error})")

    @property
    def name(self) -> str:
        """Its title."""
        return self.record.get("name") or self.path.resolve().name

    @cached_property
    def places(self) -> list[Place]:
        """Its runs, arm by arm in the order of the comparison."""
        arms = {
            Path(run["folder"]).parent.name: arm
            for arm, about in self.record.get("arms", {}).items()
            for run in about.get("runs", {}).values()
        }
        order = list(arms)
        found = [path for path in self.path.glob("runs/*/seed-*") if is_run(path)]
        found.sort(key=lambda path: (order.index(path.parent.name) if path.parent.name in arms else 99, path.name))
        return [Place(path, arms.get(path.parent.name, path.parent.name), path.name[5:]) for path in found]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return any((path / name).is_file() for name in PARTS)


def is_comparison(path: Path) -> bool:
    """Whether a folder is a comparison's."""
    return (path / COMPARISON).is_file() or any(path.glob("runs/*/seed-*"))


def find(folders: list[Path]) -> tuple[list[Place], list[ComparisonFolder]]:
    """The runs and comparisons in the folders, each once, in the order in which they were named.

    Raises:
        UserError: For a folder that is neither; those below it that are runs are named.
    """
    places: dict[Path, Place] = {}
    comparisons: dict[Path, ComparisonFolder] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give run folders, such as outputs/digits")
        if is_comparison(folder):
            found = comparisons.setdefault(folder.resolve(), ComparisonFolder(folder))
            for place in found.places:
                places.setdefault(place.path.resolve(), place)
        elif is_run(folder):
            places.setdefault(folder.resolve(), Place(folder))
        else:
            raise UserError(f"{folder}: no run folder: none of {', '.join(PARTS)} is in it{_below(folder)}")
    return list(places.values()), list(comparisons.values())


def _below(folder: Path) -> str:
    runs = [path.parent for depth in ("*/", "*/*/") for path in sorted(folder.glob(f"{depth}recipe.yaml"))]
    named = " ".join(map(str, runs[:3]))
    return f"; there are runs below it: entrecipes report {named}{' ...' * (len(runs) > 3)}" if runs else ""
