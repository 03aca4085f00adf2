"""Which runs a comparison needs, and which of them are there already."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrecipes.errors import UserError
from entrecipes.recipe.changes import HARMLESS, differences
from entrecipes.recipe.load import load

logger = logging.getLogger(__name__)

FREE = (
    *(key for key in HARMLESS if key != "evaluation."),
    "evaluation.seed",
    "evaluation.grid",
    "evaluation.batch_size",
)
"""Beginnings of the keys that change no number that is compared (the sampling seed follows the training seed)."""

SAMPLING_SEEDS = 100_000
"""Images are drawn from the seeds `evaluation.seed + i`: those of different training seeds must not overlap."""

Sources = Sequence[str | Path]
"""A recipe or a finished run folder, then further run folders."""


@dataclass(frozen=True)
class Planned:
    """One run to be had.

    Args:
        arm: Its arm.
        seed: Its training seed.
        folder: Where it goes, or an earlier run that is the same.
        recipe: The recipe file.
        overrides: Changes to the recipe, the seed's among them.
        resolved: The recipe in full, as plain values.
    """

    arm: str
    seed: int
    folder: Path
    recipe: Path
    overrides: tuple[str, ...]
    resolved: dict[str, Any]

    def with_images(self, images: int) -> Planned:
        """The same run over this many images. Raises `RecipeError` where the recipe can't be as short."""
        overrides = (*self.overrides, f"training.images={images}")
        resolved = load(self.recipe, overrides).recipe.model_dump(mode="json", by_alias=True)
        return replace(self, overrides=overrides, resolved=resolved)

    @property
    def label(self) -> str:
        """`ARM-seed-N`, fit for a file name."""
        return f"{file_name(self.arm)}-seed-{self.seed}"

    @property
    def foreign(self) -> list[tuple[str, Any, Any]] | None:
        """What in the folder's recipe belongs to another run; None when the folder holds no readable recipe."""
        try:
            found = load(self.folder / "recipe.yaml").recipe
        except (UserError, OSError):
            return None
        return relevant(differences(found.model_dump(mode="json", by_alias=True), self.resolved))

    @property
    def finished(self) -> bool:
        """Whether the folder holds exactly this run, to its end."""
        try:
            images = json.loads((self.folder / "run.json").read_text())["images"]
        except (OSError, ValueError, KeyError):
            return False
        return self.foreign == [] and images >= self.resolved["training"]["images"]


def plan(
    arms: Mapping[str, tuple[Sources, Sequence[str]]],
    seeds: Sequence[int] | None,
    output: Path,
    overrides: Sequence[str] = (),
) -> list[Planned]:
    """Every run of the comparison, all arms with the first seed before any with the second.

    Args:
        arms: See [`compare`].
        seeds: See [`compare`].
        output: The comparison's folder.
        overrides: Changes to all arms.

    Raises:
        UserError: For a recipe that is wrong, arms whose names fall together, or a given run that does not belong.
    """
    names = [file_name(name).lower() for name in arms]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(f"the arms {', '.join(arms)}: names must differ in more than signs and case; see --arm NAME")
    seeds = _seeds_of(arms) if seeds is None else list(seeds)
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: give different whole numbers from 0 up")
    return [
        _planned(
            name,
            seed,
            sources,
            [*overrides, *own],
            output / "runs" / file_name(name) / f"seed-{seed}",
            tell=seed == seeds[0],
        )
        for seed in seeds
        for name, (sources, own) in arms.items()
    ]


def relevant(changes: Sequence[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Without the keys that change no number."""
    return [change for change in changes if not change[0].startswith(FREE)]


def said(changes: Sequence[tuple[str, Any, Any]]) -> str:
    """`noise.mean: -1.2 there, 0.0 here`."""
    return "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in changes)


def file_name(name: str) -> str:
    """An arm's name as a folder's."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


def is_run(source: str | Path) -> bool:
    """Whether a source is a run folder and not a recipe."""
    return (Path(source) / "recipe.yaml").is_file()


def _seed_of(folder: str | Path) -> int:
    return load(Path(folder) / "recipe.yaml").recipe.training.seed


def _seeds_of(arms: Mapping[str, tuple[Sources, Sequence[str]]]) -> list[int]:
    """The seeds that all arms have, where all are run folders; else 0, 1, 2."""
    if not all(is_run(source) for sources, _ in arms.values() for source in sources):
        return [0, 1, 2]
    seeds = [{_seed_of(source) for source in sources} for sources, _ in arms.values()]
    if shared := sorted(set.intersection(*seeds)):
        return shared
    raise UserError("the runs have no seed in common; say with --seeds which to compare: missing ones are trained")


def _planned(
    name: str, seed: int, sources: Sources, overrides: Sequence[str], folder: Path, tell: bool = False
) -> Planned:
    first, *further = map(Path, sources)
    own = (f"training.seed={seed}", f"evaluation.seed={SAMPLING_SEEDS * seed}")
    loaded = load(first / "recipe.yaml" if is_run(first) else first, [*overrides, *own])
    if tell:
        for warning in loaded.warnings:
            logger.warning("warning: %s: %s", name, warning)
    resolved = loaded.recipe.model_dump(mode="json", by_alias=True)
    planned = Planned(name, seed, folder, loaded.path, (*overrides, *own), resolved)
    for path in (first, *further) if is_run(first) else further:
        if not is_run(path):
            raise UserError(
                f"{path}: no run folder (it has no recipe.yaml); after its recipe an arm takes finished runs"
            )
        if _seed_of(path) != seed:
            continue
        offered = replace(planned, folder=path)
        if not offered.finished:
            why = said(offered.foreign or ()) or "it has not finished"
            raise UserError(f"{path}: can't be {name}'s run with seed {seed} ({why}); leave it out, and it is trained")
        return offered
    return planned
