"""A run with experts, as its folder tells it: numbers small enough to be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from diffusers import DDIMScheduler
from report_case import RUN, gaussian_row, write_run

F = 1_000_000_000
"""FLOPs of the base."""
BORDERS = (4.0, 1.0, -1.0, -5.0)
RATIOS = (0.5, 0.75, 1.0)
STEPS = (0.25, 0.35, 0.4)
UNITS = [
    {"path": "down_blocks.0.resnets.0", "kind": "widths", "atoms": 8},
    {"path": "mid_block.attentions.0", "kind": "heads", "atoms": 4},
    {"path": "up_blocks.1.resnets.0", "kind": "widths", "atoms": 8},
]
KEPT = ([4, 0, 8], [4, 2, 8], [8, 4, 8])
BASE_EXCESS, EXPERT_EXCESS = 0.5, 0.25
"""How far the errors of base and experts lie above the least possible, as a share of it."""
SECTION: dict[str, Any] = {
    "type": "tdc",
    "groups": 3,
    "by": "information",
    "base": None,
    "search": {
        "proposer": {"type": "evolution"},
        "rounds": 3,
        "candidates": 2,
        "memory": {"best": 8, "last": 4},
        "criterion": "taylor",
        "recovery": {"steps": 20},
    },
}
PIPELINE = RUN["pipeline"] | {"class": "ExpertsPipeline", "library": "entrecipes", "model_class": "TimestepExperts"}


def plan() -> dict[str, Any]:
    """What the search leaves in plan.json."""
    groups = []
    for number, (ratio, steps, kept) in enumerate(zip(RATIOS, STEPS, KEPT, strict=True)):
        high, low = BORDERS[number : number + 2]
        groups.append(
            {
                "number": number,
                "log_sigma": [low, high],
                "train": [low, high],
                "ratio": ratio,
                "steps": steps,
                "flops": 0.99 * ratio * F,
                "nats": 1.0,
                "images": 10_000 * (number + 1),
                "kept": kept,
                "base_loss": 0.4,
                "uniform_loss": 0.5,
                "loss": 0.45,
                "reward": -0.125,
                "trials": 6,
                "parameters": int(1_000_000 * ratio),
            }
        )
    training = {"base": 60 * F, "search": 6 * F, "experts": 30 * F, "total": 96 * F, "budget": 100 * F}
    sampling = {"base": F, "experts": 0.775 * F, "ratio": 0.775}
    return {
        "format": 1,
        "by": "information",
        "boundaries": [800.0, 312.5],
        "base_flops": F,
        "units": UNITS,
        "groups": groups,
        "costs": {"training_flops": training, "sampling_flops": sampling},
        "criterion": "taylor",
        "proposer": "evolution",
    }


def trials() -> list[dict[str, Any]]:
    """Six a group: a uniform plan first, then what evolution found, not always better."""
    random, rows = np.random.default_rng(0), []
    for group in range(3):
        for number in range(6):
            loss = 0.5 if number == 0 else 0.45 + 0.02 * (5 - number) + random.uniform(0, 0.03) * (number < 5)
            rows.append(
                {
                    "group": group,
                    "round": number // 2,
                    "number": number,
                    "proposer": "uniform" if number == 0 else "evolution",
                    "shares": [0.5, 0.5, 0.5],
                    "kept": KEPT[group],
                    "flops": 0.99 * RATIOS[group] * F,
                    "loss": loss,
                    "reward": -(loss - 0.4) / 0.4,
                    "seconds": 1.5,
                    "compute": F / 3,
                    "note": "",
                }
            )
    return rows


def make_experts(folder: Path, finished: bool = True) -> Path:
    """Turn the run folder of `run_folder` into one whose experts were trained; not `finished`: only searched."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"experts": SECTION}))
    _lines(folder / "base" / "metrics.jsonl", [gaussian_row(0, 3.0), gaussian_row(20_000, BASE_EXCESS)])
    _lines(folder / "search" / "memory.jsonl", trials())
    (folder / "search" / "plan.json").write_text(json.dumps(plan()))
    if not finished:
        (folder / "run.json").unlink(missing_ok=True)
        (folder / "metrics.jsonl").write_text("")
        return folder
    for number in range(3):
        _lines(folder / "experts" / str(number) / "metrics.jsonl", [gaussian_row(10_000, EXPERT_EXCESS)])
    _lines(folder / "metrics.jsonl", [gaussian_row(40_000, EXPERT_EXCESS)])
    facts = {"groups": plan()["groups"], "costs": plan()["costs"]}
    DDIMScheduler().save_pretrained(folder / "pipeline" / "scheduler")
    write_run(folder, RUN | {"pipeline": PIPELINE, "experts": facts, "metrics": []})
    return folder


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
