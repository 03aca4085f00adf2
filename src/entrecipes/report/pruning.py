"""What a pruned run says of itself: which blocks went, when, by which score, and how the votes ended."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import entrecipes.recipe.prune  # noqa: F401 (registers its choices)
from entrecipes.blocks.pruning import FILE
from entrecipes.blocks.scores import SCORES
from entrecipes.recipe.base import choice
from entrecipes.report.block_report import reasons
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import Rows, flops, number
from entrecipes.report.run_folder import RunFolder


class PrunedRun:
    """The `prune` rows that a run logged, one a stage, with its recipe's section and what is known of the dense model.

    Blocks have the numbers of the dense model throughout.

    Raises:
        UserError: When a file of the run is damaged.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.stages = folder.metrics("prune")
        self.section: dict[str, Any] = folder.recipe.get("prune", {}) if folder.has("recipe.yaml") else {}
        self.run: dict[str, Any] = folder.run if folder.has("run.json") else {}
        self.images: int = max(row["images"] for row in folder.metrics("train", "prune", "event", "start"))
        """Images seen so far."""
        self._record = json.loads((folder.path / FILE).read_text()) if folder.has(FILE) else {}

    @cached_property
    def count(self) -> int:
        """Blocks of the dense model."""
        first = self.stages[0]
        return first["left"] + len(first["remove"])

    @cached_property
    def removed(self) -> dict[int, dict[str, Any]]:
        """Each removed block with the row of its stage, the first to go first."""
        return {block: row for row in self.stages for block in row["remove"]}

    @cached_property
    def kept(self) -> list[int]:
        """The blocks that are left, in the order in which they run."""
        return [block for block in range(self.count) if block not in self.removed]

    @cached_property
    def stays(self) -> dict[int, str]:
        """Blocks that could not go, and why."""
        pinned = {block["index"]: block["pinned"] for block in self._record.get("blocks", ()) if block["pinned"]}
        named = {index % self.count: "named in prune.keep" for index in self.section.get("keep", ())}
        return named | pinned

    @cached_property
    def score(self) -> str | None:
        """The score that ranked the blocks; None where nothing was measured."""
        name = self.stages[0].get("score")
        return name if name in SCORES else None

    def rows(self) -> Rows:
        """What happened, at a glance."""
        how = self.section.get("type")
        entry = choice("prune", how) if how else None
        removed = f"{len(self.removed)} of {self.count}: {_numbered(self.removed)}" if self.removed else "none yet"
        kept = f"{_numbered(self.kept)}; they run in this order, now numbered 0 to {len(self.kept) - 1}"
        seconds = sum(row.get("seconds", 0) for row in self.stages)
        found = {
            "How": entry and f"{how}: {entry.summary}" + (f" [{entry.paper}]" if entry.paper else ""),
            "Ranked by": self.score and f"{self.score}: {SCORES[self.score]}; the lowest go first",
            "Votes": self._voting(),
            "Blocks removed, in order": removed,
            "Blocks kept, by their numbers in the dense model": kept,
            "Could not go": reasons(self.stays),
            "Parameters": self._parameters(),
            "Learned from the dense model": self._distilled(),
            "Scoring and voting": seconds and f"{number(seconds)} s, part of the time in training steps",
        }
        return [(label, text) for label, text in found.items() if text]

    def _parameters(self) -> str | None:
        before, after = self.run.get("parameters_before"), self.run.get("parameters")
        return f"{before:,} to {after:,} ({after / before - 1:+.1%})" if before else None

    def _distilled(self) -> str | None:
        distill = self.section.get("distill")
        return distill and f"{distill['teacher'] or 'as it was before the first removal'}, weight {distill['weight']:g}"

    def _voting(self) -> str | None:
        weights = self.section.get("vote")
        by = weights and ", ".join(f"{label} (weight {weights[key]:g})" for key, label in VOTERS.items())
        return by and f"by the ranks of {by}: 1 is the best, and the smallest sum wins"

    def tables(self) -> list[Table]:
        """What each stage removed, with each block's score, and the votes where there were any."""
        return [self._removals(), *([self._votes()] if any("vote" in row for row in self.stages) else [])]

    def _removals(self) -> Table:
        header = ["stage", "images seen", "block", *([self.score, "rank, 1 the lowest"] if self.score else [])]
        rows = []
        for stage in self.stages:
            place = [str(stage["stage"]), f"{stage['images']:,}"]
            rows += [[*place, str(block), *self._scored(stage, block)] for block in stage["remove"]]
            if not stage["remove"]:
                rows.append([*place, "none", *[""] * (len(header) - 3)])
        return Table("What was removed", header, rows)

    def _scored(self, stage: dict[str, Any], block: int) -> list[str]:
        """A block's score and its rank among all that were measured at that stage."""
        if not self.score:
            return []
        value, values = stage["scores"].get(str(block)), stage["scores"].values()
        return [number(value), f"{1 + sum(other < value for other in values)} of {len(values)}"]

    def _votes(self) -> Table:
        weights = self.section.get("vote", {})
        cost = flops if weights.get("measure", "flops") == "flops" else lambda value: f"{number(value)} s"
        rows = []
        for stage in (stage for stage in self.stages if "vote" in stage):
            vote = stage["vote"]
            for index, gone in enumerate(vote["remove"]):
                stood, ranks = vote["candidates"][index], vote["ranks"][index]
                values = [cost(stood["cost"]), *(_finite(stood[name]) for name in ("kappa", "zico"))]
                cells = [f"{value} ({rank})" for value, rank in zip(values, ranks, strict=True)]
                won = "won" if index == vote["winner"] else ""
                rows.append([str(stage["stage"]), _numbered(gone) or "none", *cells, f"{vote['totals'][index]:g}", won])
        header = ["stage", "would remove", *(f"{label} (rank)" for label in VOTERS.values()), "weighted sum", ""]
        return Table("The votes", header, rows)


VOTERS = {"cost": "cost", "ntk": "NTK condition", "zico": "ZiCo"}


def pruned(folder: RunFolder) -> PrunedRun | None:
    """What the run's pruning tells; None where no stage of any was carried out."""
    return PrunedRun(folder) if folder.metrics("prune") else None


def _numbered(blocks: Any) -> str:
    return ", ".join(map(str, blocks))


def _finite(value: float | None) -> str:
    return "not finite" if value is None else number(value)
