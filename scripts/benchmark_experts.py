"""Experts against other models: quality in each group of noise levels, FLOPs of training and sampling, latency.

    python scripts/benchmark_experts.py --arm base=outputs/base0,outputs/base1 --arm tdc=outputs/tdc0,outputs/tdc1 \
        --output recipes/tdc/results/digits

An arm is a name and its finished run folders, one a seed; the first arm is what the others are held against, seed by
seed. All must have been measured on the same held-out bundle and sampled with as many steps. The groups are those of
`--groups`, a run with experts, or of the first such run among the arms; the nats inside them add up to the whole.

FLOPs are those of the denoiser, counted on the published networks: of training as 3 forward passes an image (a run with
experts: base, search and experts together), of sampling as what one call of the whole pipeline really asks of each
network. Latency is that of the pipelines of the first seed, called in turns in alternating order, so that a machine
whose speed drifts slows all alike; ratios are those of the calls of one turn.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from entrecipes.diffusion.families import family_of_pipeline
from entrecipes.diffusion.pipelines import best_device, load_pipeline
from entrecipes.errors import UserError
from entrecipes.evaluation.generation import balanced_labels, generate
from entrecipes.experts.costs import TRAINING_PASSES
from entrecipes.experts.grouping import Group, row_nats
from entrecipes.experts.tdc import read_plan
from entrecipes.information import proxies
from entrecipes.report.comparison.arms import ArmRun
from entrecipes.report.experts import plan_groups
from entrecipes.report.experts_benchmark import markdown
from entrecipes.training.publish import VERSIONS, device_name

NATS = "heldout_nats"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=FOLDER,FOLDER", help="runs, one a seed")
    parser.add_argument("--groups", type=Path, help="run folder with experts whose groups the nats are told by")
    parser.add_argument("--output", type=Path, required=True, help="writes this name with .json and .md")
    parser.add_argument("--batch", type=int, default=16, help="images a call, for the latency")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each pipeline; 0 leaves the latency out")
    parser.add_argument("--cpu-threads", type=int, default=1)
    args = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    torch.set_num_threads(args.cpu_threads)
    try:
        found = benchmark(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = markdown(found)
    print(page)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", page)):
        args.output.with_name(args.output.name + suffix).write_text(text, encoding="utf-8")
    return 0


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as JSON."""
    arms = {name: read_arm(name, folders) for name, folders in map(parse_arm, args.arm)}
    if len(arms) < len(args.arm):
        raise UserError("--arm: two arms have the same name; give each its own")
    runs = [run for arm in arms.values() for run in arm.values()]
    check_alike(runs)
    place = args.groups or next((run.folder for run in runs if run.facts.get("experts")), None)
    groups = plan_groups(read_plan(place)) if place else ()
    samplers = {name: {seed: Sampler(run) for seed, run in arm.items()} for name, arm in arms.items()}
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": device_name(best_device()),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "steps": runs[0].facts["pipeline"]["steps"],
        "guidance_scale": runs[0].facts["pipeline"]["guidance_scale"],
        "groups_of": str(place) if place else None,
        "groups": [{"number": group.number, "log_sigma": group.log_sigma} for group in groups],
        "arms": {
            name: {seed: measured(run, samplers[name][seed], groups) for seed, run in arm.items()}
            for name, arm in arms.items()
        },
        "latency": in_turns(args, samplers) if args.repeats else None,
    }


def parse_arm(text: str) -> tuple[str, list[Path]]:
    """`name=folder,folder`."""
    name, _, folders = text.partition("=")
    paths = [Path(folder) for folder in folders.split(",") if folder]
    if not name or not paths:
        raise UserError(f"--arm {text}: give a name and run folders, as base=outputs/base0,outputs/base1")
    return name, paths


def read_arm(name: str, folders: Sequence[Path]) -> dict[int, ArmRun]:
    """The finished runs of an arm by seed."""
    runs: dict[int, ArmRun] = {}
    for folder in folders:
        run = ArmRun(seed=-1, folder=folder)
        if not run.source.has("run.json"):
            raise UserError(
                f"{folder}: this run of arm {name} has not finished; run its recipe again, which resumes it"
            )
        if not run.held_out:
            raise UserError(f"{folder}: this run of arm {name} measured no held-out nats; set evaluation.held_out")
        seed = run.facts["seed"]
        if seed in runs:
            raise UserError(f"{folder}: arm {name} already has seed {seed}, {runs[seed].folder}; give each seed once")
        runs[seed] = ArmRun(seed, folder)
    return runs


def check_alike(runs: Sequence[ArmRun]) -> None:
    """Refuse runs whose numbers do not compare with those of the first. Raises UserError, naming the folder."""
    first, *others = runs
    for run in others:
        for key in ("steps", "guidance_scale"):
            values = [one.facts["pipeline"][key] for one in (first, run)]
            if values[0] != values[1]:
                raise UserError(
                    f"{run.folder}: sampled with {key} {values[1]}, but {first.folder} with {values[0]}; give equals"
                )
        bundles = [[one.held_out[-1][key] for key in ("log_sigma", "gate")] for one in (first, run)]
        data = [(one.facts["data"]["name"], one.facts["data"]["held_out_images"]) for one in (first, run)]
        if data[0] != data[1] or np.shape(bundles[0]) != np.shape(bundles[1]) or not np.allclose(*bundles, atol=1e-6):
            raise UserError(
                f"{run.folder}: measured on other held-out images or noise levels than {first.folder}; give runs of "
                "the same data, scheduler and evaluation.held_out (not a single expert's own run)"
            )


@dataclass
class Sampler:
    """A run's published pipeline and how it is called."""

    run: ArmRun

    def __post_init__(self) -> None:
        self.pipeline = load_pipeline(str(self.run.folder)).to(best_device())
        self.pipeline.set_progress_bar_config(disable=True)
        self.family = family_of_pipeline(self.pipeline)
        if self.family.kind != "images":
            raise UserError(f"{self.run.folder}: makes {self.family.kind}; only models of images are measured here")
        self.denoiser = self.family.denoiser(self.pipeline).eval()
        self.networks = list(getattr(self.denoiser, "experts", [self.denoiser]))

    def __call__(self, count: int, seed: int = 0) -> float:
        """Seconds of one call for so many images."""
        about = self.run.facts["pipeline"]
        labels = balanced_labels(count, about["num_classes"]) if about["num_classes"] else None
        settings = {"steps": about["steps"], "guidance_scale": about["guidance_scale"], "seed": seed}
        started = time.perf_counter()
        generate(self.pipeline, self.family, labels, count, **settings, batch_size=count)  # ends on the CPU
        return time.perf_counter() - started

    @cached_property
    def forward_flops(self) -> list[int]:
        """Of each network, one forward pass of one sample."""
        return [proxies.flops(partial(self.family.one_pass, network)) for network in self.networks]

    @cached_property
    def calls(self) -> list[int]:
        """Samples that each network gets for one image: steps, twice as many with guidance or a second-order solver."""
        counts = [0] * len(self.networks)

        def counter(index: int) -> Callable[..., None]:
            def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                counts[index] += len((*args, *kwargs.values())[0])

            return count

        handles = [
            network.register_forward_pre_hook(counter(index), with_kwargs=True)
            for index, network in enumerate(self.networks)
        ]
        self(1)
        for handle in handles:
            handle.remove()
        return counts


def measured(run: ArmRun, sampler: Sampler, groups: Sequence[Group]) -> dict[str, Any]:
    """Everything but the latency of one run."""
    row = run.held_out[-1]
    training = (run.facts.get("experts") or {}).get("costs", {}).get("training_flops")
    if training is None:
        training = {"total": TRAINING_PASSES * sampler.forward_flops[0] * run.facts["images"]}
    return {
        "folder": str(run.folder),
        "nats": row["nats"],
        "group_nats": row_nats(groups, row) if groups else [],
        "metrics": {name: metric.to_json() for name, metric in run.metrics.items() if name != NATS},
        "training_flops": training,
        "forward_flops": sampler.forward_flops,
        "calls": sampler.calls,
        "sampling_flops": sum(count * cost for count, cost in zip(sampler.calls, sampler.forward_flops, strict=True)),
        "parameters": [sum(p.numel() for p in network.parameters()) for network in sampler.networks],
        "started_from": run.source.recipe["pipeline"].get("pretrained"),
        "pruned_while_trained": bool(run.facts.get("parameters_before")),
    }


def in_turns(args: argparse.Namespace, samplers: dict[str, dict[int, Sampler]]) -> dict[str, Any]:
    """Seconds an image of every arm's first seed, after one call to warm up."""
    first = {name: next(iter(arm.values())) for name, arm in samplers.items()}
    for sampler in first.values():
        sampler(args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in first}
    for repeat in range(args.repeats):
        for name in list(first)[:: -1 if repeat % 2 else 1]:
            seconds[name].append(first[name](args.batch) / args.batch)
    base = next(iter(seconds.values()))
    ratios = {name: [own / other for own, other in zip(of, base, strict=True)] for name, of in seconds.items()}
    return {"batch": args.batch, "seconds_per_image": seconds, "ratios": ratios}


if __name__ == "__main__":
    sys.exit(main())
