"""What a run with several experts says of itself: its groups, how their networks were found, and what that cost."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers

from entrecipes.errors import UserError
from entrecipes.experts.costs import TRAINING_PASSES
from entrecipes.experts.grouping import Group, calls, row_nats
from entrecipes.experts.tdc import MEMORY, PLAN, read_plan
from entrecipes.recipe.base import choice
from entrecipes.recipe.experts import Search
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import Rows, duration, flops, number
from entrecipes.report.run_folder import RunFolder

GROUPED = {
    "timestep": "equal shares of the scheduler's training time",
    "snr": "equal range of log SNR",
    "information": "equal information: nats of the base's measured profile",
}
PICTURES = {
    "expert_groups": "Where the base's error lies (dark) and what the experts leave of it (orange), with the share of "
    "the base's FLOPs that each group's network has",
    "expert_plans": "Share of each unit that each group's network keeps, in percent; 0 is a branch left out",
    "expert_search": "Reward of every plan that was measured, and of the best so far; thin lines part the rounds",
    "expert_costs": "FLOPs of training against the budget, and of sampling against the base, by expert",
}
"""The pictures that there may be, and what they show."""
TRAINING = {"base": "base", "search": "search", "experts": "experts"}
COUNTED = f"forward and backward pass of an image counted as {TRAINING_PASSES} forward passes"

Row = dict[str, Any]


class ExpertRun:
    """The plan, the trials and the costs of a run that trained experts, with its recipe's `experts` section.

    Experts are numbered along the denoising direction, 0 serving the noisiest levels.

    Raises:
        UserError: When a file of the run is damaged.
    """

    pictures = PICTURES

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.section: Row = folder.recipe.get("experts") or {} if folder.has("recipe.yaml") else {}
        self.run: Row = folder.run if folder.has("run.json") else {}
        self.plan: Row = read_plan(folder.path)
        self._finished: Row = self.run.get("experts") or {}
        self.costs: Row = {**self.plan.get("costs", {}), **self._finished.get("costs", {})}
        known = zip(self.plan["groups"], self._finished.get("groups") or [{}] * len(self.plan["groups"]), strict=True)
        self.groups: list[Row] = [{**planned, **measured} for planned, measured in known]

    @cached_property
    def trials(self) -> list[Row]:
        """What the search measured, in that order."""
        path, trials = self.folder.path / MEMORY, []
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        for place, line in enumerate(lines, start=1):
            try:
                trials += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError:
                if place < len(lines):  # the last one has no newline at its end where the run was stopped within it
                    raise UserError(f"{path}:{place}: no JSON; put back a good copy, or remove the line") from None
        return [row for row in trials if row.get("kind", "trial") == "trial"]

    def trials_of(self, group: int) -> list[Row]:
        """The trials of one group."""
        return [trial for trial in self.trials if trial["group"] == group]

    @cached_property
    def base_row(self) -> Row | None:
        """The base's last held-out measurement."""
        rows = _held_out(Path(self.section.get("base") or self.folder.path / "base"))
        return rows[-1] if rows else None

    @cached_property
    def expert_rows(self) -> list[Row | None]:
        """For each group the measurement that tells of its expert: of all of them together where there is one."""
        routed = self.folder.metrics("held_out") if self.run else []
        if routed:
            return [routed[-1]] * len(self.groups)
        own = [_held_out(self.folder.path / "experts" / str(group["number"])) for group in self.groups]
        return [rows[-1] if rows else None for rows in own]

    def nats(self, number: int) -> tuple[float | None, float | None]:
        """Held-out nats inside a group: of the base, and of the group's expert."""
        groups, rows = plan_groups(self.plan), (self.base_row, self.expert_rows[number])
        return tuple(None if row is None else row_nats(groups, row)[number] for row in rows)

    @cached_property
    def calls(self) -> list[int] | None:
        """Calls of each expert for one image with the recipe's sampler; None before there is a pipeline."""
        path = self.folder.path / "pipeline" / "scheduler" / "scheduler_config.json"
        if not (self.run and path.is_file()):
            return None
        config = json.loads(path.read_text())
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(self.run["pipeline"]["steps"])
        return calls(self.plan["boundaries"], scheduler.timesteps)

    # -- words --------------------------------------------------------------------------------------------------------

    def rows(self) -> Rows:
        """What happened, at a glance."""
        how = self.section.get("type")
        entry = choice("experts", how) if how else None
        found = {
            "How": entry and f"{how}: {entry.summary}" + (f" [{entry.paper}]" if entry.paper else ""),
            "Groups": f"{len(self.groups)} of {GROUPED.get(self.plan.get('by'), 'their own borders')}",
            "Budgets": self._budgets(),
            "Search": self._search(),
            "Measured": self._measured(),
            "Training FLOPs": self._training(),
            "Sampling FLOPs": self._sampling(),
            "Where samples come from": self._served(),
        }
        return [(label, text) for label, text in found.items() if text]

    def _budgets(self) -> str:
        shares = ", ".join(_share(group["ratio"]) for group in self.groups)
        return (
            f"{shares} of the base's {flops(self.plan['base_flops'])} a forward pass of one sample, the noisiest first"
        )

    def _search(self) -> str | None:
        if not self.trials:
            return None
        section = Search.model_validate(self.section.get("search") or {})  # a resolved recipe leaves idle keys out
        proposer, memory = section.proposer.type, section.memory
        parts = [f"{proposer}: {choice('proposer', proposer).summary}"]
        if proposer != "uniform":
            parts[0] += f" {section.rounds} rounds of {section.candidates} plans for each group that loses anything"
        if proposer in ("evolution", "llm"):
            parts.append(f"shown the best {memory.best} and last {memory.last}" if memory else "without a memory")
        parts.append(f"{section.recovery.steps} steps of recovery before each is measured")
        return "; ".join([*parts, f"what stays in a unit by {section.criterion}"])

    def _measured(self) -> str | None:
        if not self.trials:
            return None
        by = Counter(trial["proposer"] for trial in self.trials)
        said = ", ".join(f"{count} by {name}" for name, count in by.most_common())
        return f"{len(self.trials)} plans ({said}) in {duration(sum(trial['seconds'] for trial in self.trials))}"

    def _training(self) -> str | None:
        costs = self.costs.get("training_flops")
        if not costs:
            return None
        parts = ", ".join(f"{label} {flops(costs[key])}" for key, label in TRAINING.items())
        share = _share(costs["total"] / costs["budget"])
        return f"{flops(costs['total'])}, {share} of the budget of {flops(costs['budget'])}: {parts}; {COUNTED}"

    def _sampling(self) -> str | None:
        costs = self.costs.get("sampling_flops")
        if not costs:
            return None
        share = f"{_share(costs['ratio'])} of the base's {flops(costs['base'])}"
        return f"{flops(costs['experts'])} a call of the network, the mean with the recipe's sampler, {share}"

    def _served(self) -> str | None:
        if not self.calls:
            return None
        about = self.run["pipeline"]
        parts = ", ".join(f"{count} by expert {number}" for number, count in enumerate(self.calls))
        return f"{about['scheduler_class']}, {about['steps']} steps: {sum(self.calls)} calls, {parts}"

    # -- tables -------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """The groups with their networks, what search and training made of them, and the costs."""
        found = [self._groups(), self._found()]
        return found + ([self._costs()] if "training_flops" in self.costs else [])

    def _groups(self) -> Table:
        header = ["expert", "log sigma", "timesteps", "share of steps", "budget", "FLOPs found", "parameters", "images"]
        rows = []
        for group in self.groups:
            network = group.get("flops")
            shown = "" if network is None else f"{flops(network)} ({_share(network / self.plan['base_flops'])})"
            rows.append(
                [
                    str(group["number"]),
                    "{:.2f} to {:.2f}".format(*group["log_sigma"]),
                    self._timesteps(group["number"]),
                    _share(group["steps"]),
                    _share(group["ratio"]),
                    shown,
                    _count(group.get("parameters")),
                    _count(group.get("images")),
                ]
            )
        return Table("The groups of noise levels and their networks", header, rows)

    def _timesteps(self, number: int) -> str:
        """What the network is called with there; a border belongs to its noisier side."""
        borders = [f"{border:.4g}" for border in self.plan["boundaries"]]
        lower, upper = borders[number : number + 1], borders[number - 1 : number] if number else []
        texts = [*(f"from {border}" for border in lower), *(f"below {border}" for border in upper)]
        return ", ".join(texts) or "all"

    def _found(self) -> Table:
        header = ["expert", "plans measured", "loss of the base", "uniform plan", "best plan", "best - uniform"]
        header += ["nats of the base", "of the expert", "expert - base"]
        rows = []
        for group in self.groups:
            before, after = self.nats(group["number"])
            uniform, best = group.get("uniform_loss"), group.get("loss")
            rows.append(
                [
                    str(group["number"]),
                    _count(group.get("trials")),
                    *map(_number, (group.get("base_loss"), uniform, best)),
                    "" if None in (uniform, best) else f"{best / uniform - 1:+.1%}",
                    *map(_number, (before, after)),
                    "" if None in (before, after) else f"{after - before:+.3g} ({after / before - 1:+.1%})",
                ]
            )
        return Table("Inside each group: loss in the search, held-out nats after training", header, rows)

    def _costs(self) -> Table:
        costs = self.costs["training_flops"]
        labels = TRAINING | {"total": "in all", "budget": "budget"}
        rows = [[label, flops(costs[key]), _share(costs[key] / costs["budget"])] for key, label in labels.items()]
        return Table(f"Training FLOPs ({COUNTED})", ["stage", "FLOPs", "share of the budget"], rows)


def experts(folder: RunFolder) -> ExpertRun | None:
    """What the run's experts tell; None where no groups were made."""
    return ExpertRun(folder) if folder.has(PLAN) else None


def plan_groups(plan: Row) -> tuple[Group, ...]:
    """The groups of a plan."""
    return tuple(
        Group(of["number"], tuple(of["log_sigma"]), tuple(of["train"]), of["ratio"], of["steps"])
        for of in plan["groups"]
    )


def _held_out(folder: Path) -> list[Row]:
    return RunFolder(folder).metrics("held_out") if folder.is_dir() else []


def _share(value: float) -> str:
    return f"{value:.1%}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)
