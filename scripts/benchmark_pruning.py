"""What removed blocks save: a stock pipeline with all its blocks and one without some, called in turns.

    python scripts/benchmark_pruning.py outputs/entpruner/pretrain_dit outputs/entpruner/dit_animals
    python scripts/benchmark_pruning.py facebook/DiT-XL-2-256 --ratio 0.5 --dtype bfloat16   # before any training

A call is the whole of generation: the scheduler, guidance, every step, decoding. Dense and pruned get the same labels,
seeds, batch and steps; each repeat times one after the other, in alternating order, so that a machine whose speed
drifts slows both alike, and the speed-up is the median of the ratios of these pairs. Peak memory is that of a fresh
process that loads the one pipeline and calls it: what is allocated on the GPU, or on a CPU how far its resident memory
rises above what it was before loading. FLOPs are of one forward pass of the denoiser with one sample.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from entrecipes.blocks.entpruner import spread
from entrecipes.blocks.own_loop import apply_pruning
from entrecipes.blocks.selection import Selection
from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.families import Family, family_of
from entrecipes.diffusion.pipelines import Components, best_device, load_components
from entrecipes.errors import UserError
from entrecipes.evaluation.generation import balanced_labels, generate
from entrecipes.information import proxies
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.reference import HELP as PIPELINE
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import flops, number
from entrecipes.training.publish import VERSIONS, device_name

DENSE, PRUNED = "dense", "pruned"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help=PIPELINE)
    parser.add_argument("pruned", nargs="?", help="the same without some blocks; or say --ratio")
    parser.add_argument("--ratio", type=float, help="share of the dense one's blocks to leave out, evenly spread")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="images a call")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="DiTPipeline's default; 1 switches it off")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--cpu-threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_intermixed_args()
    try:
        contenders, removed = load(args)
        found = {
            "command": " ".join(["python", *sys.argv]),
            **{key: value for key, value in vars(args).items() if key != "results"},
            "removed": removed,
            "device": device_name(prepare(args)),
            "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
            **measure(args, contenders),
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.dense} against {args.pruned or f'the same without blocks {removed}'}, {found['device']}, {args.dtype}"
    )
    print(f"\n{table(found).to_markdown()}")
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def load(args: argparse.Namespace) -> tuple[dict[str, Components], list[int] | None]:
    """Both pipelines' parts, and which blocks `--ratio` left out."""
    if (args.pruned is None) == (args.ratio is None):
        raise UserError("give either a pruned pipeline or --ratio, the share of blocks to leave out")
    sources = {DENSE: args.dense, PRUNED: args.pruned or args.dense}
    found = {name: load_components(Pipeline(pretrained=source), to_sample=False) for name, source in sources.items()}
    dense, pruned = found.values()
    if (dense.family, dense.sample_shape) != (pruned.family, pruned.sample_shape):
        raise UserError(f"{args.pruned}: not {args.dense} without some blocks, but another kind of model or image size")
    removed = None
    if args.ratio is not None:
        blocks = BlockStack(pruned.model).blocks
        selection = Selection(blocks, keep=(0, -1))
        target = selection.target(args.ratio)
        applied = apply_pruning(pruned.model, selection.lowest(spread(len(blocks), target), target))
        applied.commit()
        removed = applied.removed
    return found, removed


def measure(args: argparse.Namespace, contenders: dict[str, Components]) -> dict[str, Any]:
    """Everything there is to measure, by contender, and by batch."""
    device, dtype = prepare(args), getattr(torch, args.dtype)
    pipelines, sizes, memory = {}, {}, {}
    for name, parts in contenders.items():
        sizes[name] = {
            "blocks": len(BlockStack(parts.model)),
            "parameters": sum(p.numel() for p in parts.model.parameters()),
            "flops": forward_flops(parts),
        }
        pipelines[name] = parts.pipeline().to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            pipelines[name].save_pretrained(folder)
            files = (Path(folder) / parts.family.component).rglob("*")
            sizes[name]["bytes_on_disk"] = sum(file.stat().st_size for file in files if file.is_file())
            memory[name] = in_fresh_process(args, parts.family.model_class, folder)
    called = {name: (pipelines[name].to(device), parts.family) for name, parts in contenders.items()}
    batches = {}
    for batch in args.batch:
        seconds = in_turns(args, called, batch)
        pairs = [dense / pruned for dense, pruned in zip(seconds[DENSE], seconds[PRUNED], strict=True)]
        batches[batch] = {
            "seconds": seconds,
            "speed_up": {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs), "pairs": pairs},
            "peak_memory_bytes": {name: peaks[batch] for name, peaks in memory.items()},
        }
    return {"sizes": sizes, "batches": batches}


def prepare(args: argparse.Namespace) -> torch.device:
    """The device, a CPU with the threads asked for, and diffusers quiet."""
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    torch.set_num_threads(args.cpu_threads)
    return best_device()


def forward_flops(parts: Components) -> int:
    """Operations of one forward pass with one sample."""
    x0 = torch.zeros(1, parts.model.config.in_channels, *[parts.model.config.sample_size] * 2)
    labels = torch.zeros(1, dtype=torch.long) if parts.family.num_classes(parts.model) else None
    denoiser = Denoiser(parts.model.eval(), parts.family, parts.path)
    return proxies.flops(lambda: denoiser(x0, x0, torch.zeros(1), labels))


def call(args: argparse.Namespace, pipeline: DiffusionPipeline, family: Family, batch: int) -> float:
    """Seconds of one call of the whole pipeline."""
    classes = family.num_classes(getattr(pipeline, family.component))
    labels = balanced_labels(batch, classes) if classes else None
    settings = {"steps": args.steps, "guidance_scale": args.guidance_scale, "seed": args.seed, "batch_size": batch}
    started = time.perf_counter()
    generate(pipeline, family, labels, batch, **settings)  # the images end on the CPU, so nothing is left to wait for
    return time.perf_counter() - started


def in_turns(
    args: argparse.Namespace, pipelines: dict[str, tuple[DiffusionPipeline, Family]], batch: int
) -> dict[str, list[float]]:
    """Seconds of each call, after one to warm up."""
    for of in pipelines.values():
        call(args, *of, batch)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(args.repeats):
        for name in sorted(pipelines, reverse=bool(repeat % 2)):
            seconds[name].append(call(args, *pipelines[name], batch))
    return seconds


def in_fresh_process(args: argparse.Namespace, model_class: str, folder: str) -> dict[int, int]:
    """`peak_memory` where libraries were imported, and nothing else was done before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["entrecipes.training.publish", "diffusers.pipelines.dit.pipeline_dit"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, args, model_class, folder).result()


def peak_memory(args: argparse.Namespace, model_class: str, folder: str) -> dict[int, int]:
    """Most bytes held during a call of each batch, the pipeline's own among them."""
    device, family = prepare(args), family_of(model_class)
    before = resident("VmRSS")
    pipeline = family.pipeline_class.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    for batch in sorted(args.batch):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        call(args, pipeline, family, batch)
        found[batch] = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before
    return found


def resident(key: str) -> int:
    """Bytes that this process holds now (`VmRSS`), or held at most (`VmHWM`), as Linux says."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def table(found: dict[str, Any]) -> Table:
    """What was measured, dense beside pruned."""
    labels = {
        "blocks": ("blocks", str),
        "parameters": ("parameters of the denoiser", "{:,}".format),
        "flops": ("one forward pass, one sample", flops),
        "bytes_on_disk": ("denoiser on disk", mebibytes),
    }
    rows = []
    for key, (label, text) in labels.items():
        dense, pruned = (found["sizes"][name][key] for name in (DENSE, PRUNED))
        rows.append([label, text(dense), text(pruned), f"{dense / pruned:.2f}x"])
    for batch, of in found["batches"].items():
        ratio, peaks = of["speed_up"], of["peak_memory_bytes"]
        shown = f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        seconds, rates = [], []
        for values in of["seconds"].values():
            median = statistics.median(values)
            seconds.append(f"{number(median)} s ({number(min(values))} to {number(max(values))})")
            rates.append(number(batch / median))
        rows.append([f"batch {batch}, {found['steps']} steps: latency", *seconds, shown])
        rows.append([f"batch {batch}: images/s", *rates, ""])
        peak = f"{peaks[DENSE] / peaks[PRUNED]:.2f}x"
        rows.append([f"batch {batch}: peak memory", *map(mebibytes, peaks.values()), peak])
    return Table("", ["", DENSE, PRUNED, "dense / pruned"], rows)


def mebibytes(size: int) -> str:
    """`2,600 MiB`."""
    return f"{number(size / 2**20)} MiB"


if __name__ == "__main__":
    sys.exit(main())
