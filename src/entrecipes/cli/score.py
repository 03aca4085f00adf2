"""`entrecipes score`: what every block of a trained pipeline is worth, by every score at once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from entrecipes.cli import launching, subject
from entrecipes.errors import UserError, nearest
from entrecipes.recipe.prune import UNMEASURED, Draws, RankedKeys, ScoreName
from entrecipes.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from entrecipes.blocks.scores import BlockScores
    from entrecipes.blocks.selection import Selection
    from entrecipes.blocks.stack import BlockStack
    from entrecipes.diffusion.path import GaussianPath
    from entrecipes.report.block_report import BlockReport

MEASURED = [name for name in get_args(ScoreName) if name not in UNMEASURED]
HELP = "measure what every block of a transformer is worth, by all scores in one pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    subject.add_arguments(parser)
    parser.add_argument("--images", type=int, metavar="N", help="training images (the recipe's prune.draws, or 64)")
    parser.add_argument(
        "--levels", type=int, metavar="N", help="noise levels, even in log sigma (the recipe's prune.draws, or 16)"
    )
    parser.add_argument(
        "--gate-pivot",
        type=float,
        metavar="SIGMA",
        help="sigma at which the information's gate is one half (the recipe's prune.draws, or 0.2); 0: no gate",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument(
        "--score",
        metavar="NAME",
        help=f"the score that the warnings are about (the recipe's prune.score, or ced): {', '.join(MEASURED)}",
    )
    parser.add_argument(
        "--remove", type=float, default=0.5, metavar="RATIO", help="share of the blocks to remove (%(default)s)"
    )
    parser.add_argument(
        "--no-gradients", action="store_true", help="leave out taylor, which takes gradients of all blocks' weights"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to write (RUN/scores, or outputs/score/NAME)"
    )
    launching.add_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    _check(args)
    recipe, assumed = subject.find_recipe(args, {"data": args.data, "noise": args.noise})
    section = _draws(args, recipe)
    if args.accelerate:
        return launching.again(args, "score")

    from entrecipes.blocks.stack import BlockStack
    from entrecipes.data.opening import open_data
    from entrecipes.evaluation.scoring import Scoring
    from entrecipes.report.block_report import BlockReport

    with launching.joined() as (state, shard):
        with state.main_process_first():
            components = subject.load_subject(args, recipe)
            model = components.model.to(state.device)
            selection, count = _selection(BlockStack(model), recipe, args.remove)
            data = open_data(recipe.data, components, state.device)
        scoring = Scoring.on_images(
            section, components, data, state.device, args.batch_size, model=args.pipeline, shard=shard
        )
        gradients = not args.no_gradients
        seconds = scoring.try_out(model, gradients)
        subject.expect(seconds if state.is_main_process else 0)
        scores = scoring.measure(model, gradients=gradients)
    if not state.is_main_process:
        return 0
    weights, note = _weights(args, recipe, assumed, components.path, scores, scoring.bundle.x0)
    report = BlockReport(
        scores,
        facts={
            "class": components.family.model_class,
            "scheduler": type(components.scheduler).__name__,
            "path": components.path.name,
            "prediction_type": components.path.prediction_type,
            "samples": components.family.kind,
        },
        weights=weights,
        weights_note=note,
        selection=selection,
        count=count,
        score=args.score or getattr(recipe.prune, "score", "ced"),
    )
    written = _write(report, subject.output_folder(args, "scores", "score"))
    print(report.to_text(), end="\n\n")
    for path in written:
        print(f"  {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse, before any work, what is out of range."""
    subject.check_least(args, images=2, levels=4, batch_size=1, gate_pivot=0)
    if args.score not in (None, *MEASURED):
        hint = nearest(args.score, MEASURED) or f"; there are {', '.join(MEASURED)}"
        raise UserError(f"--score: there is no score '{args.score}'{hint}")
    if args.score == "taylor" and args.no_gradients:
        raise UserError("--score taylor needs gradients; leave out --no-gradients")
    if not 0 < args.remove < 1:
        raise UserError(f"--remove {args.remove:g}: a share of the blocks between 0 and 1, such as 0.5")


def _draws(args: argparse.Namespace, recipe: Recipe) -> Draws:
    """What the recipe's own pruning would measure on, so that it can use the scores, changed by the options."""
    given = {"images": args.images, "noise_levels": args.levels, "gate_pivot": args.gate_pivot}
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("gate_pivot") == 0:
        given["gate_pivot"] = None
    return getattr(recipe.prune, "draws", Draws()).model_copy(update=given)


def _selection(stack: BlockStack, recipe: Recipe, ratio: float) -> tuple[Selection, int]:
    """Which blocks may go by the recipe's own pruning, and how many the ratio means."""
    from entrecipes.blocks.selection import Selection

    keys = recipe.prune if isinstance(recipe.prune, RankedKeys) else RankedKeys()
    try:
        selection = Selection(stack.blocks, keys.keep, keys.cap)
        return selection, selection.target(ratio)
    except UserError as error:
        raise UserError(f"--remove: {error}") from error


def _weights(
    args: argparse.Namespace,
    recipe: Recipe,
    assumed: list[str],
    path: GaussianPath,
    scores: BlockScores,
    x0: Tensor,
) -> tuple[Tensor, str]:
    """Share of the training's noise draws nearest to each level [L], and how that is known."""
    import torch

    from entrecipes.information.profile import Profile
    from entrecipes.information.values import value_statistics
    from entrecipes.noise.base import RunFacts
    from entrecipes.noise.recommendation import draws_of, recommend

    levels = scores.log_sigma
    recommended = recommend(Profile(levels, scores.full["x0_error"]), path, RunFacts(**value_statistics(x0)))
    draws, note = draws_of(recipe.noise, path, subject.learned_rows(args), recommended)
    if "noise" in assumed:
        note = "assumed: say --noise if it was trained otherwise"
    below = draws.cdf((levels[1:] + levels[:-1]) / 2)
    return torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff(), (
        f"{recipe.noise.type}{f' ({note})' if note else ''}"
    )


def _write(report: BlockReport, folder: Path) -> list[Path]:
    from entrecipes.report.block_plots import COLUMNS, PANELS, height_of, plot_blocks
    from entrecipes.report.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "scores.png"
    draw(picture, plot_blocks, report, panels=PANELS, columns=COLUMNS, height=height_of(report))
    numbers, page = folder / "scores.json", folder / "scores.md"
    numbers.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    page.write_text(report.to_markdown(picture.name))
    return [numbers, picture, page]
