"""What a recipe would train, made from its configuration alone: classes and shapes, no weights and no data.

All functions are called inside `rehearsing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

import entrecipes
from entrecipes.blocks.entprog import ProgressiveBlocks
from entrecipes.blocks.ordering import without_scores
from entrecipes.blocks.outside import inputs_and_head
from entrecipes.blocks.schedule import train_only
from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.families import FAMILIES, Family
from entrecipes.diffusion.family import Condition
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.diffusion.pipelines import build_model
from entrecipes.errors import UserError
from entrecipes.models.pose_video import widen
from entrecipes.patterns import matches
from entrecipes.recipe.base import build
from entrecipes.recipe.blocks import UNMEASURED
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.schema import Recipe
from entrecipes.training.rehearsal import Ledger, Step


@dataclass(frozen=True)
class Skeleton:
    """A pipeline by its configuration."""

    family: Family
    model: ModelMixin
    path: GaussianPath
    vae: Any
    """Configuration of the VAE; None in pixel space."""


def skeleton(section: Pipeline) -> Skeleton:
    """Build what `pipeline:` names; of a pre-trained one only configurations are read.

    Raises:
        UserError: For what does not fit, or is known only when it is loaded (adapters, experts, pruned models).
    """
    if section.build is not None:
        family, model = build_model(section.build.model)
        scheduler = {"_class_name": section.build.scheduler.class_name, **section.build.scheduler.config}
        vae = section.build.vae and _vae_config(family, section.build.vae, section.build.vae_revision)
    else:
        family, model, scheduler, vae = _pretrained(section.pretrained, section.revision)
    family.prepare_for_training(model, from_scratch=False)
    return Skeleton(family, model, GaussianPath.from_scheduler(scheduler), vae)


def _pretrained(source: str, revision: str | None) -> tuple[Family, ModelMixin, dict[str, Any], Any]:
    folder = Path(source) / "pipeline"
    source = str(folder) if (folder / "model_index.json").exists() else source
    try:
        index = DiffusionPipeline.load_config(source, revision=revision)
        for family in FAMILIES.values():
            if index.get(family.component, [None, None])[1] == family.model_class:
                break
        else:
            raise UserError(f"{source}: its denoiser is known only when it is loaded")
        options = {"revision": revision}
        cls = getattr(diffusers, family.model_class, None) or getattr(entrecipes, family.model_class)
        model = cls.from_config(cls.load_config(source, subfolder=family.component, **options))
        kind = getattr(diffusers, index["scheduler"][1])
        scheduler = kind.load_config(source, subfolder="scheduler", **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{source}: its configuration can't be read ({str(error).splitlines()[0]})") from error
    if family.kind == "clips" and model.config.in_channels == model.config.out_channels:
        widen(model)
    carried = index.get("vae", [None])[0]
    vae = _vae_config(family, source, revision) if carried else None
    pixels = vae is not None and family.component == "transformer" and len(vae.get("block_out_channels", ())) == 1
    return family, model, {"_class_name": index["scheduler"][1], **scheduler}, None if pixels else vae


def _vae_config(family: Family, source: str, revision: str | None) -> Any:
    for where in ({"subfolder": "vae"}, {}):
        try:
            return family.vae_class.load_config(source, revision=revision, **where)
        except (OSError, ValueError):
            continue
    return {}


def frozen_bytes(found: Skeleton) -> int:
    """Bytes of the VAE in float32, as far as its configuration can be had."""
    if not found.vae:
        return 0
    vae = found.family.vae_class.from_config(found.vae)
    return sum(weight.nbytes for weight in vae.parameters())


def batch_of(found: Skeleton, recipe: Recipe, rows: int) -> tuple[Tensor, Condition]:
    """x0 [rows, ...] as the model denoises it, and what it is conditioned on."""
    family, model, data = found.family, found.model, recipe.data
    channels, config = family.channels(model), model.config
    if family.kind == "clips":
        time = 4 if found.vae is not None else 1
        space = 8 if found.vae is not None else 1
        if found.vae:
            time, space = found.vae.get("scale_factor_temporal", 4), found.vae.get("scale_factor_spatial", 8)
        frames, side = (data.frames - 1) // time + 1, data.image_size // space
        return torch.zeros(rows, channels, frames, side, side), torch.zeros(rows, 2 * channels, frames, side, side)
    side = config.sample_size
    if family.kind == "stickers":
        x0 = torch.zeros(rows, channels, data.frames, side, side)
        given = torch.zeros(rows, data.frames, dtype=torch.bool)
        text = recipe.pipeline.build and recipe.pipeline.build.text
        tokens = sum(config.text_tokens or [one.tokens for one in text or ()] or [77])
        width = max(config.text_channels or (config.cross_attention_dim,))
        return x0, Asked(torch.zeros_like(x0), given, torch.zeros(rows, tokens, width))
    shape = (side,) if family.kind == "sequences" else (side, side)
    labels = None if family.num_classes(model) is None else torch.zeros(rows, dtype=torch.long)
    return torch.zeros(rows, channels, *shape), labels


def steps(recipe: Recipe, rows: int, ledger: Ledger) -> Iterator[tuple[str, Step]]:
    """The step of every set of weights that the recipe plans to train at some time, each named.

    What a score or a search will decide is not known: of as many blocks as may ever be open, the first ones are taken,
    which hold the most.
    """
    found = skeleton(recipe.pipeline)
    model, training = found.model, recipe.training
    model.train()
    adapter = build("adapter", recipe.blocks.adapter, model=model, seed=training.seed)
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    weights = ledger.settled()
    # not by copy.deepcopy (EmaModel), which reads the memory that these tensors do not have and damages the heap
    eligible = [weight for name, weight in model.named_parameters() if adapter.eligible(name)]
    average = [torch.empty_like(tensor) for tensor in (*eligible, *model.buffers())] if training.ema else []
    denoiser = Denoiser(model, found.family, found.path)
    teacher = None
    if getattr(recipe.prune, "distill", None):
        teacher = Denoiser(skeleton(recipe.pipeline).model.requires_grad_(False).eval(), found.family, found.path)
    copies = ledger.settled() - weights
    x0, condition = batch_of(found, recipe, rows)
    objective = Objective(recipe.objective, found.path)
    step = Step(recipe, model, denoiser, objective, x0, condition, average, teacher, weights, copies)
    for name in _trained_sets(recipe, step, adapter.eligible):
        yield name, step


def _trained_sets(recipe: Recipe, step: Step, eligible: Callable[[str], bool]) -> Iterator[str]:
    """Set `requires_grad` as the recipe does from each moment on."""
    blocks, phases = recipe.blocks, getattr(recipe.curriculum, "phases", ())
    stages = getattr(blocks, "stages", ()) if blocks.type == "staged" else ()
    if blocks.type == "entprog":
        yield _opened(recipe, step, eligible)
        return
    seen = set()
    for moment in sorted({0, *(phase.from_images for phase in phases), *(stage.from_images for stage in stages)}):
        due = [[one.train for one in part if one.from_images <= moment][-1:] for part in (phases, stages)]
        rules = [patterns for found in due for patterns in found]
        if tuple(rules) not in seen:
            seen.add(tuple(rules))
            train_only(step.model, lambda name, rules=rules: eligible(name) and all(matches(name, r) for r in rules))
            yield f"from image {moment:,}"


def _opened(recipe: Recipe, step: Step, eligible: Callable[[str], bool]) -> str:
    """Open as many blocks as `blocks: {type: entprog}` ever does."""
    section, model = recipe.blocks, step.model
    subject = SimpleNamespace(components=SimpleNamespace(model=model), images=recipe.training.images, eligible=eligible)
    blocks = ProgressiveBlocks(section, subject, SimpleNamespace())
    stack: BlockStack = blocks.stack
    rows = slice(0, 1)
    asked = step.condition if step.condition is None else step.condition[rows]
    inputs, _ = inputs_and_head(
        stack, lambda: step.denoiser(step.x0[rows], step.x0[rows], torch.zeros(1, dtype=torch.float64), asked)
    )
    order = section.order if section.order in UNMEASURED else "first_first"
    top = max(1, round(section.largest * len(stack)))
    state = {key: None for key in ("start", "best", "comparison")} | {"scores": [], "level_weights": []}
    state |= {"stage": 0, "m": top, "held": top, "order": without_scores(order, len(stack), recipe.training.seed)}
    blocks.load_state_dict(state | {"inputs": sorted(inputs), "measuring_seconds": 0.0})
    return f"with {top} of {len(stack)} blocks open"
