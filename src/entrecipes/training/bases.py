"""The models that arms start from: recipes whose runs are missing are trained before the arms, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from entrecipes.errors import UserError
from entrecipes.recipe.load import base_of, load
from entrecipes.report.comparison.conditions import Base
from entrecipes.training.planning import Planned
from entrecipes.training.processes import Runner, log_of

OUTPUTS = "outputs/"
"""Where runs go: `pipeline.pretrained: outputs/NAME` means the run of the recipe NAME."""

Tell = Callable[[str], None]
"""Called with a sentence on what is done."""


def bases(plans: Sequence[Planned]) -> dict[Path, tuple[Planned, tuple[str, ...]]]:
    """The runs that these start from, and which arms do, by folder; one that another starts from stands before it.

    A base is what `pipeline.pretrained` names as `outputs/NAME` where there is a recipe NAME, beside the arm's or
    among the packaged ones. It follows its recipe alone: seed and budget are its own, changes to arms don't reach it.

    Raises:
        UserError: For a base's recipe that is wrong, or bases that start from each other.
    """
    found: dict[Path, tuple[Planned, tuple[str, ...]]] = {}
    for planned in plans:
        chain: list[Planned] = []
        while base := _base((chain or [planned])[-1]):
            if base.folder in [each.folder for each in chain]:
                raise UserError(f"{base.recipe}: pipeline.pretrained goes in a circle by way of {base.folder}")
            chain.append(base)
        for base in reversed(chain):
            _, arms = found.get(base.folder, (base, ()))
            found[base.folder] = base, tuple(dict.fromkeys((*arms, planned.arm)))
    return found


def train_bases(plans: Sequence[Planned], output: Path, tell: Tell) -> None:
    """Train what these runs start from and is not there yet, one after the other; logs go to those of the comparison.

    Raises:
        UserError: When one fails, naming its log.
    """
    for base, arms in bases(plans).values():
        if _ready(base.folder):
            continue
        tell(f"{base.arm}: {', '.join(arms)} start{'s' * (len(arms) == 1)} from {base.folder}, which is trained first")
        (run,) = Runner(output).run_all([base])
        if not run.finished:
            raise UserError(
                f"{base.folder}: the base of {', '.join(arms)} failed: {run.message} (see "
                f"{log_of(base, output)}); the same command goes on from its last checkpoint"
            )
        tell(f"{base.arm}: {run.facts['images']:,} images, {run.facts['seconds_training']:.0f} s of training")


def told(plans: Sequence[Planned]) -> tuple[Base, ...]:
    """The bases for the report."""
    return tuple(_told(base, arms) for base, arms in bases(plans).values())


def _told(base: Planned, arms: tuple[str, ...]) -> Base:
    name = base.arm.removeprefix("base ")
    try:
        facts = json.loads((base.folder / "run.json").read_text())
    except (OSError, ValueError):
        return Base(name, str(base.folder), arms)
    changed = tuple(key for key, _, _ in base.foreign or ())
    return Base(name, str(base.folder), arms, facts["images"], facts["seconds_training"], changed)


def _base(planned: Planned) -> Planned | None:
    """The run that one starts from, when it is that of a recipe."""
    source = planned.resolved["pipeline"]["pretrained"] or ""
    name = source.removeprefix(OUTPUTS).rstrip("/")
    recipe = base_of(planned.recipe, name) if source.startswith(OUTPUTS) and name else None
    if recipe is None or recipe.resolve() == planned.recipe.resolve():
        return None
    resolved = load(recipe).recipe.model_dump(mode="json", by_alias=True)
    return Planned(f"base {name}", resolved["training"]["seed"], Path(OUTPUTS) / name, recipe, (), resolved)


def _ready(folder: Path) -> bool:
    """Whether something can be started from the folder; one with a run that was cut short is no such thing."""
    return any((folder / name).is_file() for name in ("run.json", "model_index.json", "pipeline/model_index.json"))
