"""Compare noise distributions on one recipe: InfoNoise, the usual fixed ones, loss-aware resampling, and a tuned one.

    python scripts/compare_noise.py infonoise/text --jobs 2 --results recipes/infonoise/results/text
    python scripts/compare_noise.py infonoise/text --jobs 2 --ablations --results recipes/infonoise/results/ablations

The tuned baseline is EDM's log-normal with the mean and deviation that end best in a grid, found with another seed. All
arms share everything but `noise:`. Runs go to outputs/compare_noise/RECIPE; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

from PIL import Image

from entrecipes.errors import UserError
from entrecipes.report.comparison.page import write_comparison
from entrecipes.training.compare import compare

ARMS = {
    "edm": "noise={type: log_normal}",
    "infonoise": "noise={type: infonoise}",
    "infonoise, full": "noise={type: infonoise, weight_compensation: full}",
    "uniform": "noise={type: uniform}",
    "cosine": "noise={type: cosine}",
    "logit-normal": "noise={type: logit_normal}",
    "loss-aware": "noise={type: loss_aware}",
}
ABLATIONS = {
    "edm": ARMS["edm"],
    "infonoise": ARMS["infonoise"],
    "root of the rate": "noise={type: infonoise, power: 0.5}",
    "full, root": "noise={type: infonoise, power: 0.5, weight_compensation: full}",
    "no gate": "noise={type: infonoise, gate_order: 0}",
    "pivot 0.4": "noise={type: infonoise, pivot: 0.4}",
    "edm warm-up": "noise={type: infonoise, base: {type: log_normal}}",
}
TUNING_SEED = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--means", type=float, nargs="+", default=[-0.6, 0.0, 0.6], help="grid of log-normal means")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.8, 1.2], help="grid of log-normal deviations")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside EDM's and the tuned one")
    parser.add_argument("--ablations", action="store_true", help="compare variants of InfoNoise instead")
    parser.add_argument("--baseline", default="edm", help="arm whose final quality is the target")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, help="copy the report, its plots and the JSON here")
    args = parser.parse_intermixed_args()

    common = {"overrides": args.overrides, "jobs": args.jobs, "command": " ".join(["python", *sys.argv])}
    common["listener"] = lambda arm, run: print(f"{arm}, seed {run.seed}: {run.state}", flush=True)
    output = Path("outputs/compare_noise") / args.recipe

    def arms_of(noises: dict[str, str]) -> dict[str, tuple[list[str], list[str]]]:
        return {name: ([args.recipe], [noise]) for name, noise in noises.items()}

    if args.ablations:
        noises = ABLATIONS
    else:
        grid = {
            f"log-normal {mean:g}, {std:g}": f"noise={{type: log_normal, mean: {mean}, std: {std}}}"
            for mean in args.means
            for std in args.stds
        }
        tuning = compare(arms_of(grid), [TUNING_SEED], output=output / "tuning", **common)
        write_comparison(tuning, output / "tuning")
        best = min(grid, key=lambda name: tuning.final(name).by_seed.get(TUNING_SEED, math.inf))
        noises = {name: ARMS[name] for name in dict.fromkeys(["edm", *args.arms])} | {f"tuned {best}": grid[best]}
    comparison = compare(arms_of(noises), args.seeds, output=output, baseline=args.baseline, **common)
    written = write_comparison(comparison, output / "ablations" if args.ablations else output)
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        for path in written.values():
            if path.suffix == ".png":  # in 64 colours: small enough to be kept beside a recipe
                Image.open(path).convert("RGB").quantize(64).save(args.results / path.name, optimize=True)
            elif path.suffix != ".html":
                shutil.copy(path, args.results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
