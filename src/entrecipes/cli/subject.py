"""What the verbs that measure a pipeline share: the pipeline, and the recipe that says on which data and noise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrecipes.errors import UserError
from entrecipes.recipe.load import compose, load
from entrecipes.recipe.schema import Recipe
from entrecipes.reference import HELP, as_folder, is_local, split

if TYPE_CHECKING:
    from entrecipes.diffusion.pipelines import Components

DATA = "'{type: folder, path: pictures}'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `find_recipe` and the others here read."""
    parser.add_argument("pipeline", help=HELP)
    parser.add_argument("--recipe", metavar="NAME", help="recipe with the data, the noise schedule and the weighting")
    parser.add_argument("--data", metavar="YAML", help=f"a recipe's data section, such as {DATA}")
    parser.add_argument(
        "--noise", metavar="YAML", help="a recipe's noise section: the schedule that the pipeline was trained with"
    )


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError for an option that is given and below its least value."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: at least {value}")


def run_folder(pipeline: str) -> Path:
    """The folder that holds what a run left beside its pipeline, if it left anything; of a Hub id, one of the cache.

    Raises:
        UserError: When it is on the Hub, and can't be had.
    """
    if is_local(split(pipeline)[0]):
        return Path(pipeline)
    from entrecipes.diffusion.download import records

    return records(pipeline)


def find_recipe(
    args: argparse.Namespace, changes: Mapping[str, str | None], without: Sequence[str] = ()
) -> tuple[Recipe, list[str]]:
    """The recipe asked for, or else the run folder's own (or the repository's), or else one made of the options.

    Args:
        args: With what `add_arguments` declares.
        changes: YAML by recipe key, from options; None where one is not given.
        without: Overrides of a recipe that is made of the options alone.

    Returns:
        The recipe, and the keys of `changes` whose values are assumed.
    """
    overrides = [f"{key}={text}" for key, text in changes.items() if text is not None]
    if args.recipe or (own := run_folder(args.pipeline) / "recipe.yaml").exists():
        return load(args.recipe or str(own), overrides).recipe, []
    if args.data is None:
        raise UserError(
            f"{args.pipeline}: no recipe.yaml in it; say which data to measure on: --data {DATA}, or --recipe"
        )
    needed = ["description=measured", "training.images=1", f"pipeline.pretrained={json.dumps(args.pipeline)}"]
    return compose([*needed, *without, *overrides]), [key for key, text in changes.items() if text is None]


def load_subject(args: argparse.Namespace, recipe: Recipe) -> Components:
    """The pipeline's parts, on the CPU; an adapter is merged, so that blocks hold the weights they work with."""
    import torch

    from entrecipes.diffusion import lora
    from entrecipes.diffusion.pipelines import load_components
    from entrecipes.recipe.pipeline import Pipeline

    if recipe.training.cpu_threads:
        torch.set_num_threads(recipe.training.cpu_threads)
    components = load_components(Pipeline(pretrained=args.pipeline), to_sample=False)
    lora.merge(components.model)
    return components


def learned_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the run folder logged of a learned noise schedule; empty where another schedule is asked for."""
    from entrecipes.report.run_folder import RunFolder

    own = args.recipe is None and args.noise is None
    return RunFolder(run_folder(args.pipeline)).metrics("noise") if own else []


def expect(seconds: float) -> None:
    """Say how long it will take, if that is long."""
    if seconds > 10:
        print(f"measuring: about {seconds:,.0f} s", flush=True)


def output_folder(args: argparse.Namespace, inside: str, verb: str) -> Path:
    """The folder asked for, or `inside` a run folder, or for other pipelines one of their name."""
    if args.output:
        return args.output
    if not is_local(split(args.pipeline)[0]):
        return Path("outputs") / verb / as_folder(args.pipeline)
    folder = Path(args.pipeline)
    folder = folder.parent if folder.name in ("pipeline", "adapter") else folder
    if (folder / "recipe.yaml").exists():
        return folder / inside
    return Path("outputs") / verb / folder.resolve().name
