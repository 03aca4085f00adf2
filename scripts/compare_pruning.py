"""Which score predicts what pruning costs? Every block removed alone, and whole prunings by every score.

    python scripts/compare_pruning.py entpruner/dit_animals --results recipes/entpruner/results/dit_animals

`truth`: each block that can go is removed alone, and the model fine-tuned briefly; every score, measured beforehand, is
correlated with what was lost (Spearman). `arms`: the share of blocks that --ratios says, removed by each score at once,
and by some in stages, at equal images. All runs share, seed by seed, the data order, the noise and the held-out bundle.
What is lost is counted in held-out nats and in held-out loss (the prediction's squared error at the noise levels that
training draws). Runs are kept in outputs/compare_pruning/RECIPE; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
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
from entrecipes.evaluation.heldout import HeldOutResult
from entrecipes.evaluation.scoring import Scoring, level_shares
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load
from entrecipes.recipe.prune import UNMEASURED, Draws
from entrecipes.report.comparison.tables import Table
from entrecipes.training.loop import train
from entrecipes.training.run import Run
from entrecipes.training.subject import subject_of

DENSE = "prune={type: none}"
TWINS = ("cei", "cei_timestep", "cei_sample", "ced_sample")
"""Scores that are left out of whole prunings: they remove nearly what their neighbours do."""
ONE_SHOT = [*(name for name in SCORES if name not in TWINS), *UNMEASURED]
STAGED = ["loss_rise", "ced"]


class Runs:
    """Finished runs by name, kept on disk as they come."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.recipe, self.overrides = recipe, [*overrides, "evaluation.metrics=[]", "evaluation.every=null"]
        whole = load(recipe, self.overrides).recipe.model_dump_json(by_alias=True)  # another recipe, another file
        self.path = Path("outputs/compare_pruning") / Path(recipe).stem / f"{fingerprint(whole)[:8]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {row["name"]: row for row in map(json.loads, lines)}

    def once(self, name: str, seed: int, make: Callable[..., dict[str, Any]], *changes: str) -> dict[str, Any]:
        """What `make(seed, *changes)` gives, made if it is not known yet."""
        name = " ".join([f"seed {seed}: {name}", *(change for change in changes if change != DENSE)])
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
        found = next(iter(run.evaluator.nats((run.ema or run).model).values()))
        return {
            "nats": found.nats,
            "loss": loss(run, found),
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
        pruner = build("prune", section, subject=replace(subject_of(run), seed=seed))
        return {"remove": sorted(pruner.choose(0)[0]["remove"])}

    def scores(self, seed: int) -> dict[str, Any]:
        """Every score of the model to start from, on the target's training images."""
        run = self.dense(seed)
        scoring = Scoring.on_images(Draws(seed=seed), run.components, run.data, run.device)
        found = scoring.measure(run.model)
        weights = scoring.weights(run.noise)
        values = {name: found.score(name, weights).tolist() for name in found.names}
        pinned = [block.index for block in BlockStack(run.model).blocks if block.pinned]
        return {"scores": values, "pinned": pinned, "seconds": found.origin["seconds"]}


def loss(run: Run, found: HeldOutResult) -> float:
    """Mean squared error of the prediction over the noise levels that training draws."""
    weights = level_shares(run.noise, found.log_sigma, torch.Generator(run.device).manual_seed(0))
    errors = found.x0_error / math.prod(run.components.sample_shape)
    return float((errors / run.components.path.x0_error_scale(found.log_sigma)) @ weights)


def truth(runs: Runs, seeds: list[int], images: int) -> dict[str, Any]:
    """What removing each block costs, and every score's rank correlation with it, seed by seed."""
    short, scores, dense, costs = f"training.images={images}", {}, {}, {}
    for seed in seeds:
        scored = runs.once("scores", seed, runs.scores)
        scores[seed] = scored["scores"]
        dense[seed] = runs.once("dense", seed, runs.trained, short, DENSE)
        costs[seed] = {
            block: runs.once(
                "truth", seed, runs.trained, short, f"prune={{type: written, remove: [{block}], rewarmup: 0}}"
            )
            for block in range(len(scores[seed]["magnitude"]))
            if block not in scored["pinned"]
        }
    found: dict[str, Any] = {"images": images, "scores": scores, "dense": dense, "costs": costs}
    for what in ("nats", "loss"):
        lost = {seed: torch.tensor([row[what] for row in of.values()]) for seed, of in costs.items()}
        pairs = [(one, other) for one in seeds for other in seeds if one < other]
        found[what] = {
            name: [spearman(torch.tensor([scores[s][name][block] for block in costs[s]]), lost[s]) for s in seeds]
            for name in scores[seeds[0]]
        } | {"(one seed's costs with another's)": [spearman(lost[one], lost[other]) for one, other in pairs]}
    return found


def arms(runs: Runs, seeds: list[int], ratios: list[float], schedules: list[str], draws: str) -> dict[str, Any]:
    """Every way to prune, at equal images; prunings at once that remove the same blocks are trained once."""
    found: dict[str, Any] = {"dense": {seed: runs.once("dense", seed, runs.trained, DENSE) for seed in seeds}}
    for schedule, ratio, seed in itertools.product(schedules, ratios, seeds):
        for score in ONE_SHOT if schedule == "one_shot" else STAGED:
            keys = f"ratio: {ratio}, draws: {draws}, rewarmup: 500"
            prune = f"prune={{type: {schedule}, score: {score}, {keys}}}"
            if schedule == "one_shot":
                blocks = runs.once("blocks", seed, runs.choice, prune)["remove"]
                prune = f"prune={{type: written, remove: {blocks}, rewarmup: 500}}"
            found.setdefault(f"{schedule} {score} {ratio:g}", {})[seed] = runs.once("arm", seed, runs.trained, prune)
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
        nats, loss = found["truth"]["nats"], found["truth"]["loss"]
        ranked = sorted(nats, key=lambda name: -statistics.mean(nats[name]))
        rows = [[name, spread(nats[name], 2), spread(loss[name], 2)] for name in ranked]
        header = ["Spearman with what removing a block costs", "in held-out nats", "in held-out loss"]
        parts.append(Table("", header, rows).to_markdown())
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
