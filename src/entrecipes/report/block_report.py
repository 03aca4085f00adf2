"""What block scores say of a model, and what each would remove: for the terminal, as a page, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from torch import Tensor

from entrecipes.blocks.scores import SCORES, BlockScores
from entrecipes.blocks.selection import Selection
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import number

SPREAD = [name for name in SCORES if name.startswith(("cei", "ced"))]
TABLES = {
    "What is lost without a block": [name for name in SCORES if name not in SPREAD],
    "Spread of the prediction without a block": SPREAD,
}


@dataclass(frozen=True)
class BlockReport:
    """Measured scores with what is asked of them.

    Args:
        scores: What was measured.
        facts: What is known beside their origin (`path`, `prediction_type`), for the first line and the JSON.
        weights: Share of the training's draws at each noise level [L].
        weights_note: Where these come from.
        selection: Which blocks may go.
        count: How many blocks to remove.
        score: The score that the warnings are about.
    """

    scores: BlockScores
    facts: Mapping[str, Any]
    weights: Tensor
    weights_note: str
    selection: Selection
    count: int
    score: str

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """Every measured score of every block."""
        return {name: self.scores.score(name, self.weights).tolist() for name in self.scores.names}

    def removes(self, name: str) -> list[int]:
        """The blocks that a score would remove, the first to go first."""
        return self.selection.lowest(dict(enumerate(self.values[name])), self.count)

    def headline(self) -> str:
        """What was measured, and what it cost."""
        origin, facts = self.scores.origin, self.facts
        how = f"{origin['passes']:,} passes in {origin['seconds']:.1f} s"
        return (
            f"{facts['class']} ({facts['path']}, {facts['prediction_type']}), {len(self.scores.paths)} blocks, on "
            f"{origin['images']} training {facts['samples']} of {origin['data']}, each at {origin['noise_levels']} "
            f"noise levels: {how} ({origin['passes'] / origin['seconds']:,.0f}/s)"
        )

    def about(self) -> dict[str, str]:
        """The facts that the tables rest on, each with its label."""
        lists = []
        for name, blocks in groupby(enumerate(self.scores.paths), key=lambda pair: pair[1].rpartition(".")[0]):
            numbers = [index for index, _ in blocks]
            lists.append(f"{numbers[0]} to {numbers[-1]} are {name}")
        pivot = self.scores.gate_pivot
        return {
            "blocks": ", ".join(lists),
            "stay": reasons(self.selection.protected) or "none",
            "noise levels": f"weighted as the training draws them: {self.weights_note}",
            "information": f"gated at sigma {pivot:g}; its noise levels have no other weights"
            if pivot
            else "not gated",
        }

    def tables(self) -> list[Table]:
        """Every block with its scores, and what follows from each score."""
        ranks = {name: _ranks(values) for name, values in self.values.items()}
        found = []
        for title, names in TABLES.items():
            names = [name for name in names if name in self.values]
            columns = [
                _aligned([f"{value:.3g} {f'({rank})':>4}" for value, rank in zip(*pair, strict=True)])
                for pair in ((self.values[name], ranks[name]) for name in names)
            ]
            labels = [f"{index}{'*' * (index in self.selection.protected)}" for index in range(len(self.scores.paths))]
            rows = [list(row) for row in zip(labels, *columns, strict=True)]
            found.append(Table(f"{title} (rank, 1 the highest; * stays)", ["block", *names], rows))
        return [*found, self._removals()]

    def _removals(self) -> Table:
        correlations = self.scores.correlations(weights=self.weights)
        rows = [
            [name, "-" if math.isnan(rho := correlations[name]) else f"{rho:5.2f}", " ".join(map(str, sorted(gone)))]
            for name, gone in ((name, self.removes(name)) for name in self.values)
        ]
        title = f"Which {self.count} of {len(self.scores.paths)} blocks each score would remove"
        return Table(title, ["score", "rank correlation with loss_rise", "removes"], rows)

    def warnings(self) -> list[str]:
        """What speaks against removing by `score`."""
        return self.scores.warnings(self.score, self.removes(self.score), self.weights)

    def to_text(self) -> str:
        """All of it for a terminal."""
        facts = "\n".join(f"{label:13} {text}" for label, text in self.about().items())
        warnings = "\n".join(f"warning: {text}" for text in self.warnings())
        parts = [self.headline(), facts, *(table.to_text() for table in self.tables()), warnings]
        return "\n\n".join(part for part in parts if part)

    def to_markdown(self, picture: str) -> str:
        """The same as a page, with the picture and what each score means."""
        facts = "\n".join(f"- {label}: {text}" for label, text in self.about().items())
        warnings = "\n".join(f"- {text}" for text in self.warnings())
        tables = "\n\n".join(f"## {table.title}\n\n{table.to_markdown()}" for table in self.tables())
        meanings = "\n".join(f"- `{name}`: {SCORES[name]}" for name in self.values)
        origin = {key: value for key, value in self.scores.origin.items() if value not in (None, [])}
        origin = "\n".join(f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in origin.items())
        return "\n\n".join(
            [
                f"# Block scores of {self.scores.origin['model']}",
                f"{self.headline()}.",
                f"![Every block at every noise level]({picture})",
                "Above, every block at every noise level; of CED with its sign: orange where the prediction narrows "
                "without the block, blue where it spreads. Below, the scores over all levels.",
                facts,
                *([f"Warnings:\n\n{warnings}"] if warnings else []),
                tables,
                f"## What the scores mean\n\nA high one says: keep the block.\n\n{meanings}",
                f"## Origin\n\n{origin}\n",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """What `BlockScores.from_json` reads, and what is printed beside it."""
        correlations = self.scores.correlations(weights=self.weights)
        return {
            **self.scores.to_json(),
            **self.facts,
            "noise": {"weights": self.weights.tolist(), "note": self.weights_note},
            "stays": {str(index): why for index, why in self.selection.protected.items()},
            "scores": self.values,
            "correlations": {name: None if math.isnan(rho) else rho for name, rho in correlations.items()},
            "removes": {name: self.removes(name) for name in self.values},
            "warnings": self.warnings(),
        }


def reasons(stays: Mapping[int, str]) -> str:
    """Blocks that can't go, and why, one reason after another."""
    found: dict[str, list[int]] = {}
    for index, why in sorted(stays.items()):
        found.setdefault(why, []).append(index)
    return "; ".join(f"{', '.join(map(str, indices))}: {why}" for why, indices in found.items())


def _ranks(values: list[float]) -> list[int]:
    """1 for the highest."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return [order.index(index) + 1 for index in range(len(values))]


def _aligned(cells: list[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
