"""Run what a comparison needs: every arm with every seed, under equal conditions, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from entrecipes.errors import UserError, nearest
from entrecipes.recipe.changes import differences
from entrecipes.recipe.load import display
from entrecipes.report.comparison.arms import Arm, ArmRun
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.report.comparison.conditions import Budget
from entrecipes.training.bases import Tell, told, train_bases
from entrecipes.training.budget import budget, time_arms, untimed
from entrecipes.training.planning import Planned, Sources, is_run, plan, relevant
from entrecipes.training.processes import Listener, Runner, look

EQUAL = ("training.images", "training.batch_size", "data.", "evaluation.")
"""Beginnings of the keys that all arms must share: the budget, the data and how it is measured."""
OWN = ("data.static",)
"""Keys among those that change nothing of what arms are measured on, but what they train on: a method's own affair."""

BUDGETED = ("training.images", "evaluation.every", "evaluation.metrics_every")
"""Of these, what may differ where the budget is equal in seconds."""

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
    seconds: float | None = None,
    train: bool = True,
    listener: Listener | None = None,
    tell: Tell = lambda text: None,
    command: str = "",
) -> Comparison:
    """Run or reuse every arm with every seed, and compare them.

    Runs go to `output/runs/ARM/seed-N`, what they print to `output/logs`. Whatever is finished there with the same
    recipe is reused; a run that was cut short goes on from its checkpoint; so the same call carries on after any stop.
    What arms start from (`pipeline.pretrained: outputs/NAME`, NAME a recipe) is trained first where it is missing.

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
        seconds: Give each arm as many images as it trains on in so many seconds, timed before the first run and kept
            in `output/budget.json`: see [`time_arms`]. None: the images of the recipes.
        train: False: only look at what is finished.
        listener: Called with the arm's name and each run as it ends (or is found finished).
        tell: Called with a sentence on whatever is done beside the runs: bases, timing.
        command: Shown in the report.

    Returns:
        The comparison; runs that failed are in it as such.

    Raises:
        UserError: Before anything runs, for arms that can't be compared; for a base that fails, or an arm that can't
            be timed.
    """
    baseline = _baseline(baseline, arms)
    output = Path(output)
    plans = plan(arms, seeds, output, overrides)
    found = check_equal(plans, baseline, metric, unequal, BUDGETED if seconds is not None else ())
    given = None
    if seconds is not None:
        check_timed(arms, overrides, seconds)
        plans, given = _budgeted(plans, output, seconds, jobs if train else 0, tell)
    if train:
        train_bases([each for each in plans if not each.finished], output, tell)
    runs = Runner(output, jobs, listener).run_all(plans) if train else look(plans, output)
    return Comparison(
        name=output.name,
        metric=metric,
        arms={name: _arm(name, *arms[name], plans, runs, baseline) for name in arms},
        baseline=baseline,
        seeds=tuple(dict.fromkeys(each.seed for each in plans)),
        fixed_target=target,
        unequal=tuple(found),
        budget=given,
        bases=told(plans),
        command=command,
    )


def _baseline(given: str | None, arms: Iterable[str]) -> str:
    names = list(arms)
    if given is not None and given not in names:
        raise UserError(f"--baseline {given}: there is no such arm{nearest(given, names) or ';'} {', '.join(names)}")
    return given or names[0]


def _arm(
    name: str, sources: Sources, own: Sequence[str], plans: Sequence[Planned], runs: Sequence[ArmRun], baseline: str
) -> Arm:
    """One side of the comparison with its runs."""
    return Arm(
        name,
        display(Path(sources[0])) if Path(sources[0]).exists() else str(sources[0]),
        tuple(own),
        tuple(relevant(differences(_first(plans, baseline).resolved, _first(plans, name).resolved))),
        {each.seed: run for each, run in zip(plans, runs, strict=True) if each.arm == name},
    )


def _budgeted(
    plans: Sequence[Planned], output: Path, seconds: float, jobs: int, tell: Tell
) -> tuple[list[Planned], Budget]:
    """The runs over as many images as fit into the seconds; arms that were not timed yet are, unless without jobs."""
    if jobs and (new := untimed(plans, output)):
        train_bases(new, output, tell)
        time_arms(new, output, seconds, jobs, tell)
    given = budget(plans, output, seconds)
    return [each.with_images(given.arms[each.arm].images) for each in plans], given


def check_timed(arms: Mapping[str, tuple[Sources, Sequence[str]]], overrides: Sequence[str], seconds: float) -> None:
    """Raises `UserError` for what leaves nothing to be timed."""
    if seconds <= 0:
        raise UserError(f"--seconds {seconds:g}: more than 0, the training time of each run")
    for name, (sources, own) in arms.items():
        if runs := [source for source in sources if is_run(source)]:
            raise UserError(
                f"--seconds {seconds:g}: {runs[0]} of {name} is a run that has ended; give its recipe alone"
            )
        if given := [word for word in (*overrides, *own) if word.startswith("training.images=")]:
            raise UserError(f"--seconds {seconds:g} decides how many images {name} gets; leave out {given[0]}")


def check_equal(
    plans: Sequence[Planned], baseline: str, metric: str, unequal: bool = False, free: Sequence[str] = ()
) -> list[str]:
    """The keys of budget, data and evaluation, but for the `free` ones, in which some arm differs from the baseline.

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
            if key.startswith(EQUAL) and key not in (*OWN, *free):
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
