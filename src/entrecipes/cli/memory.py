"""What `entrecipes run --dry-run` says of memory: a table by component, and the switches that would save some."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from entrecipes.errors import UserError
from entrecipes.recipe.load import LoadedRecipe, load

if TYPE_CHECKING:
    from entrecipes.training.memory import Prediction
    from entrecipes.training.savings import Saving

NAMES = {
    "process": "the process",
    "frozen": "VAE, text encoders",
    "data": "data",
    "weights": "weights",
    "average": "averaged weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "temporary": "batch, temporary",
    "holes": "allocator's holes",
    "peak": "in all",
}


def foretell(loaded: LoadedRecipe, args: argparse.Namespace) -> tuple[Prediction | None, list[Saving]]:
    """Predict the memory of a step and what switches would save; warn where there is not as much.

    None, with a note, where it can't be predicted.
    """
    from entrecipes.training.memory import predict
    from entrecipes.training.savings import savings, until_it_fits

    def changed(switch: str) -> LoadedRecipe:
        return load(args.recipe, [*args.overrides, switch])

    if any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")):
        print("memory: what a process holds of weights shared out over several is not predicted", file=sys.stderr)
        return None, []
    recipe, world_size = loaded.recipe, int(os.environ.get("WORLD_SIZE", 1))
    try:
        predicted = predict(recipe, world_size)
    except UserError as error:
        print(f"memory: {error}", file=sys.stderr)
        return None, []
    found = savings(changed, recipe, predicted, recipe.training.batch_size // world_size)
    if not predicted.fits:
        print(
            f"warning: a step is predicted to take {predicted.peak:.2f} GiB, but there are {predicted.available:.2f}; "
            + " ".join(["try", *(shlex.quote(one.switch) for one in until_it_fits(found, predicted))]),
            file=sys.stderr,
        )
    return predicted, found


def as_json(predicted: Prediction | None, found: list[Saving]) -> dict[str, Any]:
    """The same for machines."""
    whole = predicted and asdict(predicted) | {"step": predicted.step, "peak": predicted.peak, "fits": predicted.fits}
    return {"predicted": whole, "savings": [asdict(one) for one in found]}


def lines(predicted: Prediction, found: list[Saving], measured: dict[str, float] | None = None) -> list[str]:
    """The table in GiB (a component's own most, and what of it is there when most is held), and the switches."""
    from entrecipes.training.savings import WORTH_GIB, WORTH_SHARE

    at_peak = {name: getattr(predicted, f"{name}_at_peak", getattr(predicted, name, 0)) for name in NAMES}
    header = ["", "most", "at peak", *(["measured"] if measured else [])]
    rows = [header]
    for name, label in NAMES.items():
        value = getattr(predicted, name, at_peak[name])
        if not value and not (measured or {}).get(name):
            continue
        cells = [f"{value:.3f}", f"{at_peak[name]:.3f}"]
        if measured:
            cells.append(f"{measured[name]:.3f}" if name in measured else "")
        rows.append([label, *cells])
    table = [f"  {row[0]:20}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    where = "this process" if predicted.device == "cpu" else "torch on the device"
    said = [f"memory       GiB of {where}, predicted for a step {predicted.trained}", *table]
    said += [f"saves        {one.gib:.2f} GiB  {shlex.quote(one.switch)}  ({one.price})" for one in found]
    if not found:
        said.append(f"saves        no switch left would save {WORTH_GIB} GiB and {WORTH_SHARE:.0%} of the peak")
    return said
