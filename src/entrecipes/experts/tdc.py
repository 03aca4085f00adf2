"""TDC Training as a whole: which recipes the base and each expert are trained with, and what is known of the plan.

A TDC run (arXiv 2312.13307) is several ordinary runs: a base on all noise levels (stage 1); for each group of noise
levels a network pruned from the base (`proxy_pruning.py`), fine-tuned within its group (stage 2); all of them in one
pipeline that routes by timestep (`models/experts.py`). `training/experts.py` carries it out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.experts.costs import TRAINING_PASSES, Costs, base_images
from entrecipes.experts.grouping import Group
from entrecipes.experts.proxy_pruning import Trial
from entrecipes.recipe.experts import MemberSection, OneNetworkSection, TdcSection
from entrecipes.recipe.noise import InfoNoiseSection
from entrecipes.recipe.schema import Recipe

PLAN, MEMORY = "search/plan.json", "search/memory.jsonl"
FORMAT = 1


class OneNetwork:
    """One network for all noise levels."""

    samples: ClassVar[bool] = True
    """Whether what is trained makes samples worth looking at."""

    def __init__(self, section: OneNetworkSection | MemberSection | TdcSection) -> None:
        self.section = section

    def limited(self, path: GaussianPath) -> GaussianPath:
        """The noise levels that this run trains on and measures."""
        return path


class Member(OneNetwork):
    """One expert: the noise levels of its group."""

    samples = False

    def limited(self, path: GaussianPath) -> GaussianPath:
        return path.within(*self.section.log_sigma)


class Tdc(OneNetwork):
    """A base and the experts made from it, which together serve all noise levels."""


def search_flops(recipe: Recipe, groups: Sequence[Group], base_flops: float) -> float:
    """What measuring the base and searching the groups' networks takes at most."""
    section, profile = recipe.experts.search, recipe.evaluation.held_out
    draws = section.draws.images * section.draws.noise_levels
    gradients = 0 if section.criterion in ("magnitude", "random") else TRAINING_PASSES * draws
    trial = TRAINING_PASSES * section.recovery.steps * section.recovery.batch_size + draws
    trials = 1 if section.proposer.type == "uniform" else section.rounds * section.candidates
    searched = sum(draws + (group.ratio < 1) * (gradients + group.ratio * trial * trials) for group in groups)
    return base_flops * (profile.images * profile.noise_levels + searched)


def base_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Stage 1: the same recipe without experts, for the base's share of the budget; sample metrics wait."""
    images = base_images(recipe.experts, recipe.training.images, recipe.training.batch_size)
    values = _shortened(recipe, images, folder, "base")
    values["experts"] = {"type": "none"}
    if recipe.experts.decay == "joint":
        values["optimizer"]["schedule"]["span"] = [0.0, recipe.experts.base_share]
    return _checked(values, "base")


def member_recipe(recipe: Recipe, group: Group, images: int, start: Path, folder: Path) -> Recipe:
    """Stage 2: one expert, from its pruned network on, within its group; a fresh optimizer and average.

    Args:
        recipe: The TDC recipe.
        group: The expert's group.
        images: Images that it is trained for.
        start: Folder of the pipeline to start from.
        folder: Its run folder.

    Raises:
        UserError: When what the recipe asks for does not fit so short a run.
    """
    section = recipe.experts
    values = _shortened(recipe, images, folder, f"expert {group.number}")
    values["pipeline"] = {"pretrained": str(start)}
    values["experts"] = {"type": "member", "number": group.number, "log_sigma": list(group.train)}
    values["training"]["seed"] += 7919 * (group.number + 1)  # an order and noise of its own, not the base's again
    values["optimizer"]["learning_rate"] *= section.learning_rate
    if section.decay == "joint":
        values["optimizer"]["schedule"]["span"] = [section.base_share, 1.0]
    values["optimizer"]["schedule"]["warmup"] = images // 20 if section.warmup is None else section.warmup
    return _checked(values, f"expert {group.number}")


def _shortened(recipe: Recipe, images: int, folder: Path, what: str) -> dict[str, Any]:
    """The recipe of a part: what counts images of the whole run (`decay_start`, InfoNoise's keys) shrinks with it."""
    values, share = recipe.model_dump(mode="json", by_alias=True), images / recipe.training.images
    values["description"] += f" ({what})"
    values["training"] |= {"images": images, "output": str(folder)}
    values["evaluation"] |= {"metrics": [], "metrics_every": None}
    values["hub"] = {}  # only the whole is pushed
    schedule = values["optimizer"]["schedule"]
    schedule["decay_start"] = round(schedule["decay_start"] * share)
    if isinstance(recipe.noise, InfoNoiseSection):
        for key in ("warmup", "ramp", "refresh_every", "buffer"):
            if values["noise"][key]:
                values["noise"][key] = max(1, round(values["noise"][key] * share))
    return values


def _checked(values: dict[str, Any], what: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValueError as error:
        reason = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise UserError(f"experts: the recipe of the {what} would be wrong: {reason}") from error


@dataclass(frozen=True)
class Found:
    """What the search found for a group."""

    group: Group
    best: Trial
    base_loss: float
    """Of the base in the group, on the draws of the search."""
    uniform_loss: float | None
    """Of the plan with equal shares, likewise; None where it was not tried."""
    trials: int
    parameters: int
    nats: float
    """Of the base in the group, by its profile on training images."""


def write_plan(
    folder: Path,
    section: TdcSection,
    found: Sequence[Found],
    boundaries: Sequence[float],
    base_flops: float,
    costs: Costs,
    units: Sequence[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Write `search/plan.json`: everything that the later stages, the report and the card say of the experts."""
    groups = [
        {
            "number": one.group.number,
            "log_sigma": list(one.group.log_sigma),
            "train": list(one.group.train),
            "ratio": one.group.ratio,
            "steps": one.group.steps,
            "flops": one.best.flops,
            "kept": list(one.best.kept),
            "loss": one.best.loss,
            "base_loss": one.base_loss,
            "uniform_loss": one.uniform_loss,
            "reward": one.best.reward,
            "proposer": one.best.proposer,
            "trials": one.trials,
            "parameters": one.parameters,
            "nats": one.nats,
            "images": count,
        }
        for one, count in zip(found, costs.images, strict=True)
    ]
    plan = {
        "format": FORMAT,
        "by": section.by,
        "boundaries": list(boundaries),
        "base_flops": base_flops,
        "units": list(units),
        "groups": groups,
        "costs": costs.to_row(),
        "seconds": seconds,
        "criterion": section.search.criterion,
        "proposer": section.search.proposer.type,
    }
    partial = folder / f"{PLAN}.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(plan, indent=1))
    partial.replace(folder / PLAN)
    return plan


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a run folder.

    Raises:
        UserError: When there is none, or it can't be read.
    """
    try:
        plan = json.loads((folder / PLAN).read_text())
        _ = plan["groups"], plan["boundaries"], plan["costs"]
    except FileNotFoundError:
        raise UserError(f"{folder / PLAN}: missing; the search has not ended there, run the recipe again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / PLAN}: damaged ({error}); remove it, and the search is repeated") from error
    return plan
