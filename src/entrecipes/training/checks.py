"""What only the parts of a run can tell of its recipe: refused, or warned of, before any training."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from entrecipes.blocks.adapters import NoAdapter
from entrecipes.diffusion.family import Family
from entrecipes.diffusion.pipelines import Components
from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def null_label(recipe: Recipe, components: Components) -> int | None:
    """What stands for "no condition" where labels are dropped; None where none are.

    Warns of a fresh model that is measured as it is never trained.

    Raises:
        UserError: For labels that are dropped for a pipeline without guidance.
    """
    family, dropped = components.family, recipe.training.label_dropout
    label = family.null_label(components.model) if dropped else None
    if dropped and label is None:
        raise UserError(
            f"training.label_dropout has no effect: {family.pipeline_class.__name__}, the stock pipeline of "
            f"{family.model_class}, has no guidance; remove the key"
        )
    if recipe.pipeline.build:
        for warning in _untrained(recipe, family.kind):
            logger.warning(warning)
    return label


def _untrained(recipe: Recipe, kind: str) -> Iterator[str]:
    """What the evaluation asks for and no sample trains."""
    evaluation, masks = recipe.evaluation, recipe.masks
    if kind != "stickers":
        if evaluation.guidance_scale != 1 and not recipe.training.label_dropout:
            yield "evaluation.guidance_scale needs training.label_dropout: no sample trains its null label"
        return
    tasks = set(getattr(masks, "tasks", ["t2v"])) | ({"uncond"} if getattr(masks, "uncond", 0) else set())
    if evaluation.task not in tasks:
        known = ", ".join(sorted(tasks))
        yield f"evaluation.task: {evaluation.task} is measured, but the tasks that are trained are {known}"
    if evaluation.guidance_scale != 1 and tasks.isdisjoint(("i2v", "uncond")):
        yield "evaluation.guidance_scale needs masks.uncond above 0, or the task i2v: no sample is without its text"
    if evaluation.frame_guidance_scale != 1 and "uncond" not in tasks:
        yield "evaluation.frame_guidance_scale needs masks.uncond above 0: no sample is without frames and text"


def check_condition_is_learned(recipe: Recipe, family: Family, model: nn.Module, adapter: NoAdapter) -> None:
    """Refuse a layer that knows nothing of the condition yet and is never trained. Raises UserError."""
    layer = family.blind_layer(model)
    if layer is None:
        return
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{layer}.")]
    trained = [name for name in names if not name.endswith("bias") and adapter.eligible(name)]
    if not trained or getattr(recipe.blocks, "inputs", "always") == "never":
        raise UserError(
            f"blocks: {layer} does not read the poses yet (its weights for them are 0) and would not be trained; "
            f"set blocks.inputs: always, take adapter difffit, or name '{layer}' in blocks.adapter.targets, too"
        )
