"""Train a recipe with several seeds and write its numbers with their spread.

    python scripts/measure_seeds.py digits/demo --seeds 0 1 2 --json recipes/digits/demo.json

Every seed is an ordinary `entrecipes run` in outputs/RECIPE-seed-N; the held-out images are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_intermixed_args()

    runs = []
    for seed in args.seeds:
        folder = Path("outputs") / f"{args.recipe}-seed-{seed}"
        own = [f"training.seed={seed}", f"evaluation.seed={100_000 * seed}", f"training.output={folder}"]
        command = [sys.executable, "-m", "entrecipes", "run", args.recipe, *args.overrides, *own]
        if code := subprocess.call(command, stdout=subprocess.DEVNULL):
            return code
        runs.append(json.loads((folder / "run.json").read_text()))

    values = {metric["name"]: [] for metric in runs[0]["metrics"]}
    for run in runs:
        for metric in run["metrics"]:
            values[metric["name"]].append(metric["value"])
    values["training seconds"] = [run["seconds_training"] for run in runs]
    values["images per second"] = [run["images_per_second"] for run in runs]
    print(f"| {args.recipe}, seeds {', '.join(map(str, args.seeds))} | mean | lowest to highest |\n|---|---|---|")
    for name, numbers in values.items():
        print(f"| {name} | {statistics.mean(numbers):.4g} | {min(numbers):.4g} to {max(numbers):.4g} |")
    if args.json:
        same = {key: runs[0][key] for key in ("images", "batch_size", "device", "precision", "parameters", "versions")}
        origins = {metric["name"]: metric["origin"] for metric in runs[0]["metrics"]}
        record = {"recipe": args.recipe, "overrides": args.overrides, "seeds": args.seeds, **same}
        args.json.write_text(json.dumps(record | {"values": values, "origins": origins}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
