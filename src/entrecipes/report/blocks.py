"""What a run says of the weights it trained: which blocks were open when, why, and what its steps took."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import groupby
from typing import Any

import entrecipes.recipe.blocks  # noqa: F401 (registers its choices)
from entrecipes.blocks.comparison import Candidate
from entrecipes.blocks.scores import SCORES
from entrecipes.recipe.base import choice
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import Rows, duration, number
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.spans import HELD, Compared, Row, Span, comparisons, held, spans

ORDERS = {
    "cost_aware": "the most {score} per added step cost first",
    "random": "by chance",
    "last_first": "from the last block down",
    "first_first": "from the first block up",
}
GROWTH = {
    "adaptive": "each stage keeps the number of the best convergence efficiency, {clock}",
    "linear": "the same number more at each stage",
    "none": "as many from the start as the recipe allows",
}
HEAVIEST = "The heaviest step held"
PICTURES = {
    "block_schedule": "Which blocks the steps trained; where candidates took turns, the held-out loss after each turn",
    "block_efficiency": "Convergence efficiency CE(m): the fall of the held-out loss for its cost, relative to the "
    "largest of a stage",
    "block_turns": "The held-out loss while candidates took turns, in the colour of the one whose turn it was",
    "step_costs": "What the heaviest step of each stretch held besides the weights, and what its steps took",
}
"""The pictures that there may be, and what they show."""
CLOCKS = {"predicted": "by predicted step cost", "measured": "by the clock"}


class BlockRun:
    """A run's `event` and `costs` rows, with its recipe's `blocks` and `curriculum` sections.

    Raises:
        UserError: When a file of the run is damaged.
    """

    pictures = PICTURES

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        recipe: dict[str, Any] = folder.recipe if folder.has("recipe.yaml") else {}
        self.section: dict[str, Any] = recipe.get("blocks") or {"type": "all"}
        self.adapter: dict[str, Any] = self.section.get("adapter") or {"type": "none"}
        self.run: dict[str, Any] = folder.run if folder.has("run.json") else {}
        self.spans: list[Span] = spans(folder)
        self.compared: list[Compared] = comparisons(folder)

    @property
    def progressive(self) -> bool:
        """Whether blocks were opened in an order."""
        return any("open" in span.blocks for span in self.spans)

    @property
    def title(self) -> str | None:
        """Heading of what there is to tell; None where all weights were trained all the time."""
        if not self.spans:
            return None
        if self.section["type"] != "all":
            return "Blocks"
        if self.adapter["type"] != "none":
            return "Adapter"
        return "Phases" if len(self.spans) > 1 else None

    @cached_property
    def ranking(self) -> Row:
        """The row that put the blocks in order, the last one of several."""
        return next((row for row in reversed(self.folder.metrics("event")) if "order" in row), {})

    @cached_property
    def full(self) -> Span | None:
        """The first span that trained every weight, better one in which candidates took no turns."""
        total = self.run.get("parameters")
        found = [span for span in self.spans if span.costs and span.costs["trained_parameters"] == total]
        return min(found, key=lambda span: span.compared is not None, default=None)

    @property
    def heaviest(self) -> Row | None:
        """The `costs` row of the step that held most."""
        return max((span.costs for span in self.spans if span.costs), key=held, default=None)

    def opened(self, span: Span) -> list[int]:
        """Blocks that every step of a span trained."""
        return self.order[: min(span.compared.numbers)] if span.compared else span.blocks["open"]

    @property
    def order(self) -> list[int]:
        """All blocks, the first to open first; with `rerank` the last order."""
        return self.ranking["order"]

    def rows(self) -> Rows:
        """What happened, at a glance."""
        how = self.section["type"]
        entry = choice("blocks", how)
        found = {
            "How": how != "all" and f"{how}: {entry.summary}" + (f" [{entry.paper}]" if entry.paper else ""),
            "Order": self.ranking and self._order(),
            "Growth": self.progressive and self._growth(),
            "Weights that blocks depend on": self.progressive and self.adapter["type"] == "none" and self._inputs(),
            "Adapter": self._adapter(),
            "Phases": self._phases(),
            "Time in training steps": self.progressive and self._time(),
            HEAVIEST: self.held_text(),
        }
        return [(label, text) for label, text in found.items() if text]

    def speed_rows(self) -> Rows:
        """What is told where there is nothing else to tell."""
        return [] if self.title else [(label, text) for label, text in self.rows() if label == HEAVIEST]

    def held_text(self) -> str | None:
        """What the heaviest step held besides the weights, as measured."""
        if not (row := self.heaviest):
            return None
        parts = ", ".join(f"{mib(row[key])} MiB of {label}" for key, label in HELD.items())
        return f"{mib(held(row))} MiB besides the weights: {parts}; it trained {row['trained_parameters']:,} weights"

    def _order(self) -> str:
        """The blocks in order with their scores, and what they mean."""
        order, score = self.section["order"], self.ranking.get("score")
        how = ORDERS.get(order, "the highest {score} first").format(score=score)
        if not score:
            return f"{how}: {', '.join(map(str, self.order))}"
        values = self.ranking["scores"]
        blocks = ", ".join(f"{block} ({number(values[block])})" for block in self.order)
        return f"{how}: {blocks}. In brackets {score}: {SCORES[score]}"

    def _growth(self) -> str:
        growth = self.section["growth"]
        return f"{growth}: {GROWTH[growth]}".format(clock=CLOCKS[self.section.get("clock", "predicted")])

    def _inputs(self) -> str:
        if self.section["inputs"] == "never":
            return "closed, so that no gradient flows below the lowest open block (floor)"
        return "trained, so that gradients flow through all blocks"

    def _adapter(self) -> str | None:
        kind = self.adapter["type"]
        if kind == "none":
            return None
        keys = ", ".join(f"{key} {value}" for key, value in self.adapter.items() if key != "type" and value is not None)
        parts = [f"{kind} ({keys})" if keys else kind]
        if trained := self.run.get("trainable_parameters"):
            parts.append(f"trains {trained:,} of {self.run['parameters']:,} weights ({_share(trained, self.run)})")
        for path in sorted(self.folder.path.glob("adapter/*.safetensors")):
            parts.append(f"adapter/{path.name} has {mib(path.stat().st_size)} MiB")
        return "; ".join(parts)

    def _phases(self) -> str | None:
        rows = [row for row in self.folder.metrics("event") if "phase" in row]
        return "; ".join(f"from {row['images']:,}: {_said(row)}" for row in rows)

    def _time(self) -> str:
        """All seconds, and the shares of scoring and comparing."""
        total = sum(span.seconds for span in self.spans)
        shares = {
            "scoring": sum(row.get("scoring_seconds", 0) for row in self.folder.metrics("event")),
            "comparing candidates, which trains too": sum(span.seconds for span in self.spans if span.compared),
            "measuring the held-out loss between their turns": sum(
                (found.ended or found.begun).get("measuring_seconds", 0) for found in self.compared
            ),
        }
        shares = {label: seconds / max(total, 1e-9) for label, seconds in shares.items() if seconds}
        parts = "".join(f"; {share:.0%} {label}" for label, share in shares.items())
        return f"{duration(total)}{parts}"

    # -- tables -------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """The spans where there are several, and the candidates where any were compared."""
        stages = [self._stages()] if len(self.spans) > 1 else []
        return stages + ([self._candidates()] if any(found.ended for found in self.compared) else [])

    def _stages(self) -> Table:
        """A row for each span."""
        if self.progressive:
            header = ["stage", "images seen", "blocks open", "floor", "step cost, predicted", "seconds a step"]
        else:
            header = ["images seen", "trained", "seconds a step"]
        header += [f"{label}, MiB" for label in HELD.values()] + ["seconds in all"]
        rows = []
        for span in self.spans:
            costs = [mib(span.costs[key]) if span.costs else "" for key in HELD]
            step = "" if span.step_seconds is None else number(span.step_seconds)
            place = f"{span.start:,} to {span.end:,}"
            cells = [str(span.blocks["stage"] + 1), place, *self._opened(span)] if self.progressive else []
            rows.append([*(cells or [place, self._trained(span)]), step, *costs, number(span.seconds)])
        return Table("What was trained, and what a step took", header, rows)

    def _opened(self, span: Span) -> list[str]:
        """Blocks, floor and predicted cost."""
        row, found = span.blocks, span.compared
        cost = "" if span.predicted is None else f"{span.predicted:.0%}"
        if found:
            *fewer, most = map(str, found.numbers)
            return [f"{', '.join(fewer)} or {most} of {row['blocks']}, in turns", "", cost]
        floor = str(row["floor"]) if row["floor"] < row["blocks"] else "none"
        return [f"{row['m']} of {row['blocks']}: {ranges(row['open'])}", floor, cost]

    def _trained(self, span: Span) -> str:
        parts = [_said(row) for row in (span.phase, span.blocks) if row]
        return "; ".join(parts) or "all weights"

    def _candidates(self) -> Table:
        header = ["stage", "blocks open", "turns", "steps that count", "loss fell by", "seconds a step"]
        header += ["fall per predicted cost", "fall per second", ""]
        rows = []
        for found in self.compared:
            stage = str(found.begun["stage"] + 1)
            fair = all(candidate.steps for candidate in found.candidates)
            chosen = "chosen" if fair else "kept: not all had a turn that counts"
            rows += [[stage, *_earned(c, chosen if c.m == found.chosen else "")] for c in found.candidates]
        title = f"Convergence efficiency: what the held-out loss fell for its cost (decided {CLOCKS[self.clock]})"
        return Table(title, header, rows)

    @property
    def clock(self) -> str:
        """By which time candidates are compared."""
        return self.section["clock"]


def ranges(blocks: Iterable[int]) -> str:
    """`0-3, 7`."""
    texts = []
    for _, pairs in groupby(enumerate(sorted(blocks)), key=lambda pair: pair[1] - pair[0]):
        run = [block for _, block in pairs]
        texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(texts)


def mib(size: float) -> str:
    """Bytes in MiB."""
    return number(size / 2**20)


def _earned(candidate: Candidate, verdict: str) -> list[str]:
    turns, steps = len(candidate.losses), candidate.steps
    efficiency = [f"{candidate.efficiency(clock):.3g}" if steps else "" for clock in CLOCKS]
    each = number(candidate.seconds / steps) if steps else ""
    return [str(candidate.m), str(turns), str(steps), number(candidate.drop), each, *efficiency, verdict]


def _said(row: Row) -> str:
    """The sentence of an event without its number: `stage 2 of 3: training ...`."""
    return row["what"].partition(": ")[2] or row["what"]


def _share(trained: int, run: dict[str, Any]) -> str:
    return f"{trained / run['parameters']:.1%}"
