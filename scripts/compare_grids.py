"""Which sampling grid needs how many steps? Learned grids against the stock one, with first- and second-order solvers.

    python scripts/compare_grids.py outputs/demo                               # a run folder: its own recipe
    python scripts/compare_grids.py owner/model --recipe mine.yaml --seeds 5   # any pipeline, measured as a recipe says

Every grid begins with the same noise (image i of repetition r has the seed evaluation.seed + 1,000,000 r + i); the
spread is the standard deviation over repetitions. The profile is that of the run's infonoise/, else it is measured on
the recipe's held-out data. All samples are compared with the same real ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from entrecipes import InfoNoiseScheduler
from entrecipes.data.opening import OpenedData, open_data
from entrecipes.diffusion.download import records
from entrecipes.diffusion.pipelines import Components, best_device, load_components
from entrecipes.errors import UserError
from entrecipes.evaluation.drawing import draw
from entrecipes.evaluation.evaluator import Evaluator
from entrecipes.evaluation.generation import Shard, balanced_labels, generate
from entrecipes.evaluation.metrics import compare
from entrecipes.evaluation.ngrams import compare_ngrams
from entrecipes.evaluation.profiling import measure_profile
from entrecipes.noise.base import RunFacts
from entrecipes.noise.recommendation import recommend, sampling_scheduler
from entrecipes.recipe.load import load
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.schema import Recipe
from entrecipes.reference import HELP as PIPELINE

REPETITION = 1_000_000


def learned_scheduler(
    place: str, recipe: Recipe, components: Components, data: OpenedData, device: torch.device
) -> tuple[InfoNoiseScheduler, str]:
    """The scheduler that knows the profile, and where the profile comes from."""
    if (records(place) / "infonoise").is_dir():
        return InfoNoiseScheduler.from_pretrained(records(place), subfolder="infonoise"), "learned by the run"
    evaluation = recipe.evaluation
    found = measure_profile(components, data, device, evaluation.held_out, evaluation.batch_size)
    facts = RunFacts(data_std=found.data_std, distinct_values=found.distinct_values, spacing=found.spacing)
    recommended = recommend(found.profile, components.path, facts)
    scheduler = sampling_scheduler(components.scheduler, found.profile, recommended, found.data_std)
    return scheduler, f"measured on {found.images} {found.split} images"


class Comparison:
    """Samples of one model under any scheduler, and what they measure."""

    def __init__(self, recipe: Recipe, components: Components, data: OpenedData, device: torch.device) -> None:
        section = self.section = recipe.evaluation
        self.components, self.data, self.device = components, data, device
        self.evaluator = Evaluator(section, components, data, device, Shard())
        self.model = components.model.to(device).eval()
        real = data.images.train if section.reference == "train" else data.images.held_out
        self.real = draw(real, section.reference_samples or section.samples, section.seed)[0]
        self.labels = balanced_labels(section.samples, data.num_classes) if data.num_classes else None

    def measure(self, scheduler: InfoNoiseScheduler, steps: int, repetition: int) -> dict[str, float]:
        """Every metric of the recipe by name."""
        section, family = self.section, self.components.family
        pipeline = self.components.pipeline(self.model).to(self.device)
        pipeline.scheduler = scheduler
        fake = generate(
            pipeline,
            family,
            self.labels,
            section.samples,
            steps=steps,
            guidance_scale=section.guidance_scale,
            seed=section.seed + REPETITION * repetition,
            batch_size=section.batch_size,
        )
        if family.kind == "sequences":
            found = compare_ngrams(self.real.numpy(), fake.numpy(), self.components.channels, seed=0, origin={})
        else:
            found = compare(
                section.metrics,
                self.evaluator.extractor,
                self.real,
                fake,
                batch_size=section.batch_size,
                real_fingerprint="the same all along",
            )
        return {metric.name: metric.value for metric in found}


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Grids by steps as Markdown, one table an order; the best mean of each column is bold."""
    parts = []
    for order in sorted({row["solver_order"] for row in rows}):
        mine = [row for row in rows if row["solver_order"] == order and row["metric"] == metric]
        steps = sorted({row["steps"] for row in mine})
        sign = -1 if metric.startswith(("precision", "recall")) else 1
        best = {n: min(sign * row["mean"] for row in mine if row["steps"] == n) for n in steps}
        lines = [f"| {metric}, order {order} | " + " | ".join(f"{n} steps" for n in steps) + " |"]
        lines.append("|---" * (len(steps) + 1) + "|")
        for grid in dict.fromkeys(row["grid"] for row in mine):
            cells = []
            for row in (row for row in mine if row["grid"] == grid):
                mark = "**" if sign * row["mean"] == best[row["steps"]] else ""
                spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2g}"
                cells.append(f"{mark}{row['mean']:.4g}{mark}{spread}")
            lines.append(f"| {'stock' if grid == 'base' else grid} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help=PIPELINE)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of the recipe, such as data.path=..."
    )
    parser.add_argument("--recipe", help="recipe with the data and the evaluation (default: the run folder's own)")
    parser.add_argument("--grids", nargs="+", default=["base", "infogrid", "rescaled"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50])
    parser.add_argument("--orders", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", type=int, default=3, help="repetitions with other initial noise")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    recipe = load(args.recipe or str(records(args.pipeline) / "recipe.yaml"), args.overrides).recipe
    if recipe.training.cpu_threads:
        torch.set_num_threads(recipe.training.cpu_threads)
    device, started = best_device(), time.perf_counter()
    components = load_components(Pipeline(pretrained=args.pipeline))
    if not recipe.evaluation.metrics and not components.family.kind == "sequences":
        raise UserError("evaluation.metrics: nothing to measure; add evaluation.metrics=[kid]")
    data = open_data(recipe.data, components, device)
    learned, origin = learned_scheduler(args.pipeline, recipe, components, data, device)
    comparison = Comparison(recipe, components, data, device)

    rows = []
    for order in args.orders:
        for grid in args.grids:
            scheduler = InfoNoiseScheduler.from_config(learned.config, grid=grid, solver_order=order)
            for steps in args.steps:
                found = [comparison.measure(scheduler, steps, repetition) for repetition in range(args.seeds)]
                for metric in found[0]:
                    values = [one[metric] for one in found]
                    deviation = statistics.stdev(values) if len(values) > 1 else None
                    row = {"grid": grid, "solver_order": order, "steps": steps, "metric": metric}
                    rows.append(row | {"mean": statistics.mean(values), "deviation": deviation, "values": values})
                print(f"order {order}, {grid}, {steps} steps: {time.perf_counter() - started:.0f} s", flush=True)

    pivot = learned.settings["pivot"]
    about = {
        "pipeline": args.pipeline,
        "stock": learned.settings["base_class"],
        "profile": origin,
        "pivot": pivot,
        "samples": recipe.evaluation.samples,
        "reference": f"{len(comparison.real)} of {recipe.evaluation.reference}",
        "seeds": args.seeds,
        "where": f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "seconds": round(time.perf_counter() - started, 1),
    }
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    for metric in dict.fromkeys(row["metric"] for row in rows):
        print("\n" + table(rows, metric))
    if args.json:
        args.json.write_text(json.dumps(about | {"overrides": args.overrides, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
