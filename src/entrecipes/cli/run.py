"""`entrecipes run`: train a recipe here, through `accelerate launch`, or only try it out (`--dry-run`)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entrecipes.cli.launching import launch
from entrecipes.errors import UserError
from entrecipes.recipe.load import LoadedRecipe, load

HELP = "train a recipe: train, measure, write card and report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that comes with entrecipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as training.images=20k")
    parser.add_argument(
        "--dry-run", action="store_true", help="take a few steps; memory, predicted and measured; writes nothing"
    )
    parser.add_argument("--meta", action="store_true", help="--dry-run: only predict, without weights or data")
    parser.add_argument("--timed", type=float, default=0.0, metavar="SECONDS", help="--dry-run: time steps for so long")
    parser.add_argument("--json", action="store_true", help="--dry-run: say it as one line of JSON")
    parser.add_argument(
        "--accelerate",
        metavar="FILE",
        help="launch through Accelerate with this config (or: cpu, ddp, fsdp, fsdp_zero2)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    loaded = load(args.recipe, args.overrides)
    if (args.timed or args.json or args.meta) and not args.dry_run:
        raise UserError("--timed, --json and --meta are of --dry-run; a run itself says everything in metrics.jsonl")
    if args.accelerate and not args.meta:
        return _through_accelerate(args)
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes one
    for warning in loaded.warnings if speaks else ():
        print(f"warning: {warning}", file=sys.stderr)
    if args.meta:
        return _outline(loaded, args)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("entrecipes").setLevel(logging.INFO)
    return _dry_run(loaded, speaks, args) if args.dry_run else _train(loaded, speaks)


def _through_accelerate(args: argparse.Namespace) -> int:
    """Start `accelerate launch` on this same verb; the recipe is already known to be valid."""
    options = [*["--dry-run"] * args.dry_run, *["--json"] * args.json]
    options += ["--timed", str(args.timed)] if args.timed else []
    return launch(args.accelerate, ["run", args.recipe, *args.overrides, *options])


def _train(loaded: LoadedRecipe, speaks: bool) -> int:
    from entrecipes.training.launch import Interrupted, run_recipe

    carry_out: Any = run_recipe
    if loaded.recipe.experts.type == "tdc":
        from entrecipes.training.experts import run_experts as carry_out
    show = _Progress(loaded) if speaks and sys.stdout.isatty() else _print_row
    try:
        folder = carry_out(loaded, listener=show)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    if speaks and folder:
        _print_ending(folder)
    return 0


def _print_row(row: dict[str, Any]) -> None:
    """One JSON object a line, for machines and log files; metrics.jsonl has all digits and the lists."""
    short = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps({key: value for key, value in short.items() if not isinstance(value, (list, dict))}), flush=True)


class _Progress:
    """A progress bar with loss, speed, memory and time left, for people at a terminal."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=loaded.recipe.training.images, unit="img", unit_scale=True, dynamic_ncols=True)

    def __call__(self, row: dict[str, Any]) -> None:
        if row["kind"] == "start":
            self.bar.total = row.get("of", self.bar.total)
            self.bar.set_description(row.get("part"))
            self.bar.initial = self.bar.n = row["images"]
        elif row["kind"] == "train":
            self.bar.update(min(row["images"], self.bar.total) - self.bar.n)
            self.bar.set_postfix(loss=f"{row['loss']:.4f}", peak=f"{row['peak_memory_gib']:.2f}GiB")
            if row["images"] >= self.bar.total:
                self.bar.close()
        elif row["kind"] == "held_out":
            self.bar.write(f"image {row['images']:,}: {row['split']} {row['nats']:.3f} nats")
        elif row["kind"] == "metric":
            self.bar.write(f"image {row['images']:,}: {row['name']} {row['value']:.4g}")
        elif row["kind"] == "event":
            self.bar.write(f"image {row['images']:,}: {row['what']}")


def _print_ending(folder: Path) -> None:
    from entrecipes.report.card import published, snippet

    facts = json.loads((folder / "run.json").read_text())
    print(f"\nDone: {facts['images']:,} images in {facts['seconds_training']:.0f} s of training.")
    for what, path in (
        ("sample grid", "samples/final.png"),
        ("report", "report.html"),
        ("model card", "README.md"),
        (published(facts), published(facts)),
    ):
        print(f"  {what:12} {folder / path}")
    print("\nLoad it:\n")
    print(snippet(facts, (folder / published(facts)).resolve()))


def _outline(loaded: LoadedRecipe, args: argparse.Namespace) -> int:
    from entrecipes.cli.memory import as_json, foretell, lines
    from entrecipes.training.dry_run import outline

    found = outline(loaded.recipe)
    predicted, switches = foretell(loaded, args)
    if args.json:
        print(json.dumps(asdict(found) | as_json(predicted, switches)))
        return 0
    print(f"{found.model}: {found.parameters:,} parameters, {found.forward_gflops:,.1f} GFLOP a forward pass")
    for line in lines(predicted, switches) if predicted else ():
        print(line)
    return 0


def _dry_run(loaded: LoadedRecipe, speaks: bool, args: argparse.Namespace) -> int:
    from entrecipes.cli.memory import as_json, foretell, lines
    from entrecipes.training.dry_run import dry_run

    predicted, switches = foretell(loaded, args) if speaks else (None, [])
    experts: list[str] = []
    if loaded.recipe.experts.type == "tdc":
        from entrecipes.training.experts import dry_run_experts

        estimate, experts = dry_run_experts(loaded.recipe, args.timed, predicted)
    else:
        estimate = dry_run(loaded.recipe, args.timed, predicted)
    if not speaks:
        return 0
    if args.json:
        print(json.dumps(asdict(estimate) | {"experts": experts} | as_json(estimate.predicted, switches)))
        return 0
    minutes = estimate.training_seconds / 60
    held = f"{estimate.weights_gib:.3f} GiB weights, gradients, optimizer and average"
    for what, value in {
        "recipe": f"{loaded.name}: {loaded.recipe.description}",
        "parameters": f"{estimate.trainable_parameters:,} trainable of {estimate.parameters:,}",
        "data": f"{estimate.train_images:,} training images, {estimate.held_out_images:,} held out",
        "processes": estimate.world_size,
        "memory": f"{held}; at most {estimate.peak_memory_gib:.3f} GiB in all",
        "speed": f"{estimate.images_per_second:.1f} images/s: about {minutes:.1f} min of training",
    }.items():
        print(f"{what:12} {value}")
    for line in lines(estimate.predicted, switches, estimate.measured) if estimate.predicted else ():
        print(line)
    for line in experts:
        print(f"experts      {line}")
    for what in estimate.beginnings:
        print(f"begins       {what}; speed and memory are of that")
    if estimate.pruning:
        print(f"pruning      {estimate.pruning}")
    for plan in estimate.evaluations:
        print(f"{'evaluation':12} {plan}")
    print("nothing was written to the run folder")
    return 0
