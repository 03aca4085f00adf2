"""Switches of a recipe that would make its training step hold less, each with what it saves and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from entrecipes.errors import UserError
from entrecipes.recipe.load import LoadedRecipe
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.training import AdamKeys
from entrecipes.training.memory import Prediction, predict

WORTH_GIB = 0.03
"""What saves less, in GiB, is not said."""
WORTH_SHARE = 0.02
"""The same as a share of the peak."""
TRIED_GIB = 1 / 1024
"""Components that hold less are not worth a try."""


@dataclass(frozen=True)
class Saving:
    """A switch that the recipe has not thrown yet."""

    switch: str
    """`key=value`, to be put behind `entrecipes run RECIPE`."""
    gib: float
    """By how much the predicted peak falls."""
    price: str
    """What it costs, in words."""


def savings(
    changed: Callable[[str], LoadedRecipe], recipe: Recipe, predicted: Prediction, rows: int, most: int = 4
) -> list[Saving]:
    """The switches that save the most, the greatest saving first.

    Args:
        changed: Loads the recipe with one more `key=value`; raises UserError where it refuses that.
        rows: Images of a step in this process.
        most: How many.
    """
    worth = max(WORTH_GIB, WORTH_SHARE * predicted.peak)
    found = []
    if predicted.step > worth:
        for switch, price, saved in switches(recipe, predicted, rows):
            try:
                loaded = changed(switch)
                if loaded.warnings:  # the key would have no effect
                    continue
                if saved is None:
                    saved = predicted.step - predict(loaded.recipe, recipe.training.batch_size // rows).step
            except UserError:
                continue
            found.append(Saving(switch, saved, price))
    if predicted.device == "cuda" and getattr(recipe.data, "on_device", "never") != "never" and predicted.data > worth:
        price = "images are decoded while training goes on, by data.num_workers processes"
        found.append(Saving("data.on_device=never", predicted.data, price))
    return sorted((one for one in found if one.gib >= worth), key=lambda one: -one.gib)[:most]


def switches(recipe: Recipe, predicted: Prediction, rows: int) -> Iterator[tuple[str, str, float | None]]:
    """What may be tried: `key=value`, its price, and the GiB that it saves where a rehearsal need not tell.

    Not all models and sections take all of them. What is held all the time is saved as it is.
    """
    training, optimizer = recipe.training, recipe.optimizer
    if not training.gradient_checkpointing and predicted.activations > TRIED_GIB:
        yield (
            "training.gradient_checkpointing=true",
            "the forward pass is computed twice: about a third more time",
            None,
        )
    size = training.micro_batch_size or rows
    if size % 2 == 0 and predicted.activations > TRIED_GIB:
        price = f"the same gradients in {2 * rows // size} passes, each less busy"
        yield f"training.micro_batch_size={size // 2}", price, None
    if training.precision == "no" and predicted.activations > TRIED_GIB:
        where = "" if predicted.device == "cuda" else "; slower on CPUs without bf16"
        yield "training.precision=bf16", f"products are rounded to 8 bits{where}", None
    if isinstance(optimizer, AdamKeys) and optimizer.type == "adamw" and predicted.optimizer > TRIED_GIB:
        kept = optimizer.model_dump(mode="json", exclude_defaults=True, exclude={"type", "eps"})
        name, price = "adamw8bit", "moments are rounded to 8 bits"
        if predicted.device == "cuda" and not predicted.fits:
            name, price = (
                "paged_adamw8bit",
                "moments are rounded to 8 bits, and wait in the host's memory where need be",
            )
        yield f"optimizer={json.dumps({'type': name} | kept)}", price, None
    if training.ema and predicted.average > TRIED_GIB:
        price = "the last weights are published, not their average: samples are usually worse"
        yield "training.ema=null", price, predicted.average
    if recipe.pipeline.pretrained and recipe.blocks.adapter.type == "none":
        price = "low-rank updates beside a frozen base are trained, which learn less"
        key, end = ("blocks={type: all, adapter: ", "}") if recipe.blocks.type == "all" else ("blocks.adapter=", "")
        yield f"{key}{{type: lora}}{end}", price, None
        yield f"{key}{{type: qlora}}{end}", f"{price}; the base is rounded to 4 bits", None


def until_it_fits(found: list[Saving], predicted: Prediction) -> list[Saving]:
    """The first switches that, one after the other, bring the peak below what there is; all where they do not.

    Savings of several switches are taken to add up, which they do only roughly.
    """
    chosen, missing = [], predicted.peak - (predicted.available or predicted.peak)
    for saving in found:
        if missing <= 0:
            break
        chosen.append(saving)
        missing -= saving.gib
    return chosen
