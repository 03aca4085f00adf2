"""`entrecipes diagnose`: where a trained pipeline's information lies, and whether its noise schedule goes there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.cli import launching, subject
from entrecipes.recipe.schema import Recipe

if TYPE_CHECKING:
    from entrecipes.diffusion.pipelines import Components
    from entrecipes.evaluation.profiling import MeasuredProfile
    from entrecipes.noise.scheduler import InfoNoiseScheduler
    from entrecipes.report.diagnosis import Diagnosis

HELP = "measure where a pipeline's information lies, and which noise schedule follows from it"
STEPS = (10, 20, 50)
"""Numbers of sampling steps for which a grid is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    subject.add_arguments(parser)
    parser.add_argument("--weighting", metavar="NAME", help="objective.weighting that it was trained with, such as edm")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="images to measure on (%(default)s)")
    parser.add_argument(
        "--levels", type=int, default=64, metavar="N", help="noise levels, even in log sigma (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to write (RUN/diagnosis, or outputs/diagnose/NAME)"
    )
    launching.add_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    subject.check_least(args, images=2, levels=8, batch_size=1)
    changes = {"data": args.data, "noise": args.noise, "objective.weighting": args.weighting}
    whole = ["data.held_out=0", f"data.max_images={args.images}"]  # nothing of it is known to be held out
    recipe, assumed = subject.find_recipe(args, changes, whole)
    if args.accelerate:
        return launching.again(args, "diagnose")

    from entrecipes.data.opening import open_data
    from entrecipes.evaluation.profiling import measure_profile
    from entrecipes.recipe.evaluation import HeldOut

    section = HeldOut(images=args.images, noise_levels=args.levels)
    with launching.joined() as (state, shard):
        with state.main_process_first():
            components = subject.load_subject(args, recipe)
            data = open_data(recipe.data, components, state.device)
        tell = subject.expect if state.is_main_process else float
        measured = measure_profile(components, data, state.device, section, args.batch_size, tell, shard)
    if not state.is_main_process:
        return 0
    diagnosis, scheduler = _diagnose(args, recipe, assumed, components, measured)
    written = _write(diagnosis, scheduler, subject.output_folder(args, "diagnosis", "diagnose"))
    parts = [_measured(measured, components), diagnosis.to_text(), diagnosis.sampling_text(), diagnosis.noise_yaml()]
    print("\n\n".join(parts))
    for path in written:
        print(f"  {path}")
    return 0


def _diagnose(
    args: argparse.Namespace, recipe: Recipe, assumed: Sequence[str], components: Components, measured: MeasuredProfile
) -> tuple[Diagnosis, InfoNoiseScheduler]:
    """Everything that follows from the measured profile, and the scheduler with the recommended grid."""
    from entrecipes.diffusion.objective import Objective
    from entrecipes.noise.base import RunFacts
    from entrecipes.noise.recommendation import draws_of, recommend, sampling_scheduler, sampling_steps
    from entrecipes.report.diagnosis import Diagnosis

    path = components.path
    weight = Objective(recipe.objective, path).weight
    known = {name: getattr(measured, name) for name in ("data_std", "distinct_values", "spacing")}
    facts = RunFacts(**known, weight=weight)
    recommended = recommend(measured.profile, path, facts)
    draws, note = draws_of(recipe.noise, path, subject.learned_rows(args), recommended)
    if "noise" in assumed:
        note = "assumed: say --noise if it was trained otherwise"
    stock = components.scheduler
    scheduler = sampling_scheduler(stock, measured.profile, recommended, measured.data_std)
    diagnosis = Diagnosis(
        pipeline=args.pipeline,
        facts={
            "model": components.family.model_class,
            "scheduler": type(stock).__name__,
            "path": path.name,
            "prediction_type": path.prediction_type,
            "data": measured.data,
            "split": measured.split,
            "images": measured.images,
            "levels": len(measured.profile.log_sigma),
            "passes": measured.passes,
            "seconds": measured.seconds,
        },
        dimensions=measured.dimensions,
        recommended=recommended,
        noise=recipe.noise,
        noise_note=note,
        draws=draws,
        weight=weight(recommended.profile.log_sigma),
        weighting=recipe.objective.weighting + (" (assumed)" if "objective.weighting" in assumed else ""),
        sampling={n: sampling_steps(scheduler, stock, n) for n in STEPS},
    )
    return diagnosis, scheduler


def _measured(measured: MeasuredProfile, components: Components) -> str:
    """The first line: what was measured, and what it cost."""
    what = ("held-out " if measured.split == "held_out" else "") + components.family.kind
    levels = len(measured.profile.log_sigma)
    return (
        f"{components.family.model_class} ({components.path.name}, {components.path.prediction_type}) on "
        f"{measured.images} {what} of {measured.data}, each at {levels} noise levels: {measured.passes:,} passes in "
        f"{measured.seconds:.1f} s ({measured.passes / measured.seconds:,.0f}/s)"
    )


def _write(diagnosis: Diagnosis, scheduler: InfoNoiseScheduler, folder: Path) -> list[Path]:
    from entrecipes.report.diagnosis import plot_diagnosis
    from entrecipes.report.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(folder / "diagnosis.png", plot_diagnosis, diagnosis, panels=2, height=4.8)
    numbers, section, learned = (folder / name for name in ("diagnosis.json", "noise.yaml", "infonoise"))
    numbers.write_text(json.dumps(diagnosis.to_json(), indent=1, allow_nan=False) + "\n")
    section.write_text(diagnosis.noise_yaml())
    scheduler.save_pretrained(learned)
    return [picture, numbers, section, learned]
