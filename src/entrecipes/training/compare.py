"""Run what a comparison needs: every arm with every seed, under equal conditions, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from entrecipes.errors import UserError, nearest
from entrecipes.recipe.changes import differences
from entrecipes.recipe.load import display
from entrecipes.report.comparison.arms import Arm
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.training.planning import Planned, Sources, plan, relevant
from entrecipes.training.processes import Listener, Runner, look

EQUAL = ("training.images", "training.batch_size", "data.", "evaluation.")
"""Beginnings of the keys that all arms must share: the budget, the data and how it is measured."""

GATED = ("heldout_nats", "train_nats")
"""Metrics that need a pinned gate to be compared."""


def compare(
    arms: Mapping[str, tuple[Sources, Sequence[str]]],
    seeds: Sequence[int] | None = None,
    *,
    output: str | Path,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    metric: str = "heldout_nats",
    target: float | None = None,
    jobs: int = 1,
    unequal: bool = False,
    train: bool = True,
    listener: Listener | None = None,
    command: str = "",
) -> Comparison:
    """Run or reuse every arm with every seed, and compare them.

    Runs go to `output/runs/ARM/seed-N`, what they print to `output/logs`. Whatever is finished there with the same
    recipe is reused; a run that was cut short goes on from its checkpoint; so the same call carries on after any stop.

    Args:
        arms: By name: the sources and the arm's own overrides (`key=value`). The first source is a recipe or a run
            folder, whose recipe then counts; finished run folders among the sources are reused for their seeds.
        seeds: Training seeds. `training.seed` is N and `evaluation.seed` (sampling) 100,000 N, in all arms alike.
            None: 0, 1 and 2, or, where all arms are run folders, the seeds that they have in common.
        output: The comparison's folder.
        overrides: Changes to all arms; an arm's own win.
        baseline: The arm that the others are measured against; None: the first.
        metric: See [`Comparison`].
        target: See [`Comparison`]; None: the baseline's final value.
        jobs: Runs at a time.
        unequal: Let arms differ in budget, data or evaluation; the report says so.
        train: False: only look at what is finished.
        listener: Called with the arm's name and each run as it ends (or is found finished).
        command: Shown in the report.

    Returns:
        The comparison; runs that failed are in it as such.

    Raises:
        UserError: Before anything runs, for arms that can't be compared.
    """
    names = list(arms)
    if baseline is not None and baseline not in arms:
        raise UserError(
            f"--baseline {baseline}: there is no such arm{nearest(baseline, names) or ';'} {', '.join(names)}"
        )
    baseline = baseline or names[0]
    plans = plan(arms, seeds, Path(output), overrides)
    found = check_equal(plans, baseline, metric, unequal)
    runs = Runner(Path(output), jobs, listener).run_all(plans) if train else look(plans, Path(output))
    base = _first(plans, baseline)
    return Comparison(
        name=Path(output).name,
        metric=metric,
        arms={
            name: Arm(
                name,
                display(Path(sources[0])) if Path(sources[0]).exists() else str(sources[0]),
                tuple(own),
                tuple(relevant(differences(base.resolved, _first(plans, name).resolved))),
                {each.seed: run for each, run in zip(plans, runs, strict=True) if each.arm == name},
            )
            for name, (sources, own) in arms.items()
        },
        baseline=baseline,
        seeds=tuple(dict.fromkeys(each.seed for each in plans)),
        fixed_target=target,
        unequal=tuple(found),
        command=command,
    )


def check_equal(plans: Sequence[Planned], baseline: str, metric: str, unequal: bool = False) -> list[str]:
    """The keys of budget, data and evaluation in which some arm differs from the baseline.

    Raises:
        UserError: When there are any, unless `unequal`; or when nats are to be compared without a pinned gate.
    """
    base = _first(plans, baseline)
    if metric in GATED and base.resolved["evaluation"]["held_out"]["gate_pivot"] is None:
        raise UserError(
            "evaluation.held_out.gate_pivot: null, but nats are compared under one pinned gate: without it the "
            "network's own error at the lowest noise rules them; set evaluation.held_out.gate_pivot=0.2, or compare "
            "another --metric"
        )
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(each.arm for each in plans):
        for key, ours, theirs in relevant(differences(base.resolved, _first(plans, name).resolved)):
            if key.startswith(EQUAL):
                found.setdefault(key, [f"{ours!r} in {baseline}"]).append(f"{theirs!r} in {name}")
    if found and not unequal:
        listed = "".join(f"\n  {key}: {', '.join(values)}" for key, values in found.items())
        raise UserError(
            f"these arms have no equal conditions:{listed}\nGive all the same (a key=value before the first --arm, or "
            "after --, is for all arms), or compare them all the same with --unequal"
        )
    return list(found)


def _first(plans: Sequence[Planned], arm: str) -> Planned:
    return next(each for each in plans if each.arm == arm)
