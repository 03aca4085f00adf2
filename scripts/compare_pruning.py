"""Which score predicts what pruning costs? Every block removed alone, and whole prunings by every score.

    python scripts/compare_pruning.py entpruner/dit_animals --results recipes/entpruner/results/dit_animals

`truth`: each block that can go is removed alone, and the model fine-tuned briefly; every score, measured beforehand, is
correlated with what was lost (Spearman). `arms`: the share of blocks that --ratios says, removed by each score at once,
and by some in stages, at equal images. All runs share, seed by seed, the data order, the noise and the held-out bundle.
Runs are kept in outputs/compare_pruning/RECIPE/runs.jsonl; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entrecipes.blocks.scores import SCORES, spearman
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError
from entrecipes.evaluation.scoring import Scoring
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load
from entrecipes.recipe.prune import Draws
from entrecipes.report.comparison.tables import Table
from entrecipes.training.loop import train
from entrecipes.training.run import Run

DENSE = "prune={type: none}"
TWINS = ("cei", "cei_timestep", "cei_sample", "ced_sample")
"""Scores that are left out of whole prunings: they remove nearly what their neighbours do."""
ONE_SHOT = [name for name in SCORES if name not in TWINS] + ["random", "spread"]
STAGED = ["loss_rise", "information", "ced", "random"]


class Runs:
    """Finished runs by name, kept on disk as they come."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.recipe, self.overrides = recipe, [*overrides, "evaluation.metrics=[]", "evaluation.every=null"]
        self.path = Path("outputs/compare_pruning") / Path(recipe).stem / "runs.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {row["name"]: row for row in map(json.loads, lines)}

    def once(self, name: str, seed: int, make: Callable[..., dict[str, Any]], *changes: str) -> dict[str, Any]:
        """What `make(seed, *changes)` gives, made if it is not known yet."""
        name = f"seed {seed}: {name}"
        if name not in self.known:
            self.known[name] = {"name": name, **make(seed, *changes)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[name]) + "\n")
            print(name, {key: self.known[name].get(key) for key in ("nats", "seconds", "removed")}, flush=True)
        return self.known[name]

    def build(self, seed: int, *changes: str) -> Run:
        """The run of these changes, not begun."""
        return Run(load(self.recipe, [*self.overrides, f"training.seed={seed}", *changes]).recipe, folder=None)

    def trained(self, seed: int, *changes: str) -> dict[str, Any]:
        """Train, and measure the averaged weights."""
        run = self.build(seed, *changes)
        train(run)
        found = next(iter(run.evaluator.nats(run.eval_model).values()))
        return {
            "nats": found.nats,
            "seconds": run.window.total_seconds,
            "removed": [block for row in getattr(run.pruner, "stages", []) for block in row["remove"]],
        }

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one run of a seed at a time, for the life of the script)
    def dense(self, seed: int) -> Run:
        """The run before any step, nothing removed."""
        return self.build(seed, DENSE)

    def choice(self, seed: int, prune: str) -> dict[str, Any]:
        """The blocks that a pruning at once removes."""
        run = self.dense(seed)
        section = load(self.recipe, [*self.overrides, prune]).recipe.prune
        pruner = build("prune", section, subject=replace(run._subject(), seed=seed))
        return {"remove": sorted(pruner.choose(0)[0]["remove"])}

    def scores(self, seed: int) -> dict[str, Any]:
        """Every score of the model to start from, on the target's training images."""
        run = self.dense(seed)
        scoring = Scoring.on_training_images(Draws(seed=seed), run.components, run.data, run.device)
        found = scoring.measure(run.model)
        weights = scoring.weights(run.noise)
        values = {name: found.score(name, weights).tolist() for name in found.names}
        pinned = [block.index for block in BlockStack(run.model).blocks if block.pinned]
        return {"scores": values, "pinned": pinned, "seconds": found.origin["seconds"]}


def truth(runs: Runs, seeds: list[int], images: int) -> dict[str, Any]:
    """What removing each block costs, and every score's rank correlation with it, seed by seed."""
    short, nats, dense, scores = f"training.images={images}", {}, {}, {}
    for seed in seeds:
        scored = runs.once("scores", seed, runs.scores)
        scores[seed] = scored["scores"]
        dense[seed] = runs.once("truth, dense", seed, runs.trained, short, DENSE)["nats"]
        blocks = [block for block in range(len(scores[seed]["magnitude"])) if block not in scored["pinned"]]
        nats[seed] = {
            block: runs.once(
                f"truth, block {block}", seed, runs.trained, short, f"prune={{type: written, remove: [{block}]}}"
            )["nats"]
            for block in blocks
        }
    lost = {seed: torch.tensor(list(of.values())) for seed, of in nats.items()}
    found = {
        name: [spearman(torch.tensor([scores[seed][name][block] for block in blocks]), lost[seed]) for seed in seeds]
        for name in scores[seeds[0]]
    }
    pairs = [(one, other) for one in seeds for other in seeds if one < other]
    agreement = [spearman(lost[one], lost[other]) for one, other in pairs]
    return {"images": images, "dense": dense, "nats": nats, "scores": scores, "spearman": found, "agreement": agreement}


def arms(runs: Runs, seeds: list[int], ratios: list[float], schedules: list[str], draws: str) -> dict[str, Any]:
    """Every way to prune, at equal images; prunings at once that remove the same blocks are trained once."""
    found: dict[str, Any] = {"dense": {seed: runs.once("dense", seed, runs.trained, DENSE) for seed in seeds}}
    for schedule, ratio, seed in itertools.product(schedules, ratios, seeds):
        for score in ONE_SHOT if schedule == "one_shot" else STAGED:
            prune = f"prune={{type: {schedule}, score: {score}, ratio: {ratio}, draws: {draws}}}"
            name = f"{schedule} {score} {ratio:g}"
            if schedule == "one_shot":
                blocks = runs.once(f"{name}: blocks", seed, runs.choice, prune)["remove"]
                prune = f"prune={{type: written, remove: {blocks}}}"
            same = f"without {blocks}" if schedule == "one_shot" else name
            found.setdefault(name, {})[seed] = runs.once(same, seed, runs.trained, prune)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.33, 0.5])
    parser.add_argument("--schedules", nargs="+", default=["one_shot", "linear", "entpruner"])
    parser.add_argument("--brief", type=int, default=4000, help="images of each fine-tuning for the truth")
    parser.add_argument("--parts", nargs="+", choices=["truth", "arms"], default=["truth", "arms"])
    parser.add_argument("--draws", default="{images: 32, noise_levels: 12}", help="what the arms score blocks on")
    parser.add_argument("--results", type=Path, help="folder for results.json")
    args = parser.parse_intermixed_args()
    try:
        runs = Runs(args.recipe, args.overrides)
        found: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
        found["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
        if "truth" in args.parts:
            found["truth"] = truth(runs, args.seeds, args.brief)
        if "arms" in args.parts:
            found["arms"] = arms(runs, args.seeds, args.ratios, args.schedules, args.draws)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = to_markdown(found)
    print(text)
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.results / "results.md").write_text(text)
    return 0


def to_markdown(found: dict[str, Any]) -> str:
    """The tables, means over seeds with the lowest and the highest."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"`{found['command']}` ({versions})"]
    if "truth" in found:
        ranked = sorted(found["truth"]["spearman"].items(), key=lambda item: -statistics.mean(item[1]))
        rows = [[name, spread(values, 2)] for name, values in ranked]
        rows.append(["(one seed's costs with another's)", spread(found["truth"]["agreement"], 2)])
        parts.append(Table("", ["score", "Spearman with what removing a block costs"], rows).to_markdown())
    if "arms" in found:
        nats = {name: [row["nats"] for row in rows.values()] for name, rows in found["arms"].items()}
        pruned = [name.split() for name in nats if name != "dense"]
        ratios = sorted({ratio for _, _, ratio in pruned}, key=float)
        rows = [["dense", *[spread(nats["dense"], 1)] * len(ratios)]]
        for schedule, score in dict.fromkeys((schedule, score) for schedule, score, _ in pruned):
            cells = [nats.get(f"{schedule} {score} {ratio}") for ratio in ratios]
            rows.append([f"{schedule}, {score}", *(spread(values, 1) if values else "" for values in cells)])
        header = ["final held-out nats", *(f"{float(ratio):.0%} removed" for ratio in ratios)]
        parts.append(Table("", header, rows).to_markdown())
    return "\n\n".join(parts) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean (lowest to highest)."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
