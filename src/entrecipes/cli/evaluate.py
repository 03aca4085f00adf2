"""`entrecipes evaluate`: measure a trained pipeline as a recipe says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.cli.launching import add_argument, again, joined
from entrecipes.cli.subject import run_folder
from entrecipes.errors import UserError
from entrecipes.recipe.load import load
from entrecipes.reference import HELP as PIPELINE

if TYPE_CHECKING:
    from entrecipes.evaluation.result import Metric

HELP = "measure a pipeline: held-out nats, and the sample-based metrics of a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("pipeline", help=PIPELINE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as evaluation.samples=2k")
    parser.add_argument("--recipe", help="recipe with the data and the evaluation (default: the run folder's own)")
    parser.add_argument("-o", "--output", type=Path, help="also write the numbers here, as JSON")
    add_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    if not args.recipe and not (own := run_folder(args.pipeline) / "recipe.yaml").exists():
        raise UserError(f"{args.pipeline}: there is no recipe.yaml in it; say which data and metrics: --recipe NAME")
    recipe = load(args.recipe or str(own), args.overrides).recipe

    if args.accelerate:
        return again(args, "evaluate")

    import torch

    from entrecipes.data.opening import open_data
    from entrecipes.diffusion.pipelines import load_components
    from entrecipes.evaluation.evaluator import Evaluator
    from entrecipes.recipe.pipeline import Pipeline

    if recipe.training.cpu_threads:
        torch.set_num_threads(recipe.training.cpu_threads)
    with joined() as (state, shard):
        with state.main_process_first():
            components = load_components(Pipeline(pretrained=args.pipeline))
            data = open_data(recipe.data, components, state.device)
        model = components.model.to(state.device).eval()
        evaluator = Evaluator(recipe.evaluation, components, data, state.device, shard)
        evaluator.check(model, state.main_process_first)
        metrics = evaluator.metrics(model, evaluator.nats(model), {})
    if state.is_main_process:
        _tell(metrics, args.output)
    return 0


def _tell(metrics: Sequence[Metric], output: Path | None) -> None:
    width = max(len(metric.name) for metric in metrics)
    for metric in metrics:
        spread = f" ± {metric.spread:.3g}" if metric.spread is not None else ""
        origin = ", ".join(f"{key} {value}" for key, value in metric.origin.items())
        print(f"{metric.name:{width}}  {metric.value:.5g}{spread}   ({origin})")
    if output:
        output.write_text(json.dumps([asdict(metric) for metric in metrics], indent=1) + "\n")
        print(f"written to {output}")
