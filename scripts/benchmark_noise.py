"""What a learned noise schedule costs: steps of one run with it and with EDM's fixed distribution, in turns.

    python scripts/benchmark_noise.py --recipe infonoise/digits --json recipes/infonoise/results/overhead.json

Both contenders are the same run: model, data, optimizer, averages. Only the sampler is exchanged, every `--steps`
steps, in alternating order, so that a machine whose speed drifts slows both alike. The images seen go on, so the
learned one rebuilds its table about as often as in a real run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from entrecipes.errors import UserError
from entrecipes.recipe.load import load
from entrecipes.training.loop import step
from entrecipes.training.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="infonoise/digits")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="steps of each contender in one repetition")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()

    run = Run(load(args.recipe, args.overrides).recipe, folder=None)
    fixed = Run(load(args.recipe, [*args.overrides, "noise={type: log_normal}"]).recipe, folder=None).noise
    samplers = {"learned": run.noise, "fixed": fixed}
    batches = run.batches()

    def steps(count: int) -> None:
        for _ in range(count):
            step(run, batches)
        run.window.sums.tolist()  # wait for the device

    while run.images < 2 * run.noise.warmup:  # past warm-up and ramp
        steps(1)
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for repetition in range(args.repetitions):
        for name in sorted(samplers, reverse=bool(repetition % 2)):
            run.noise = samplers[name]
            started = time.perf_counter()
            steps(args.steps)
            seconds[name].append(time.perf_counter() - started)

    cost = [learned / plain - 1 for learned, plain in zip(seconds["learned"], seconds["fixed"], strict=True)]
    where = f"{run.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    milliseconds = {name: [round(1000 * s / args.steps, 3) for s in values] for name, values in seconds.items()}
    print(f"{args.recipe}, batch {run.recipe.training.batch_size}, {where}; medians of {args.repetitions} repetitions")
    for name, values in milliseconds.items():
        print(f"{name:8} {statistics.median(values):8.2f} ms a step ({min(values)} to {max(values)})")
    print(f"a learned schedule adds {statistics.median(cost):+.1%} to the step ({min(cost):+.1%} to {max(cost):+.1%})")
    if args.json:
        record = {"recipe": args.recipe, "overrides": args.overrides, "steps": args.steps, "where": where}
        args.json.write_text(
            json.dumps(record | {"milliseconds_per_step": milliseconds, "cost": cost}, indent=1) + "\n"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
