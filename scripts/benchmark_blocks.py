"""What a training step costs by which blocks are open, measured beside what is predicted.

    python scripts/benchmark_blocks.py --results recipes/entprog/results/steps.json                     # a CPU, minutes
    python scripts/benchmark_blocks.py --device cuda --precision bf16 --heads 16 --head-dim 96 --layers 20 \\
        --channels 16 --size 32 --patch 2 --frames 16 --batch-size 2 --results steps_gpu.json           # 0.8 G weights

A Wan-class transformer with random weights on random clips: forward pass, backward pass and AdamW step. Every case is
measured --repeats times in turn with the others (the clock of a shared machine drifts); the table shows medians.
Saved activations, gradients and optimizer state are measured as in a run (`StepCosts`); `peak` is the device's own
counter (CUDA only).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from entrecipes.blocks.cost import cost_model, weight_names
from entrecipes.blocks.schedule import train_only
from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.families import FAMILIES
from entrecipes.report.comparison.tables import Table
from entrecipes.training.costs import StepCosts
from entrecipes.training.publish import device_name

HEAD = ("norm_out", "proj_out", "scale_shift_table")


def cases(layers: int) -> dict[str, tuple[set[int], bool, bool]]:
    """Name -> open blocks, whether the embedders below them are trained, gradient checkpointing."""
    every, half, quarter = set(range(layers)), layers // 2, layers // 4
    last_half, last_quarter = set(range(half, layers)), set(range(layers - quarter, layers))
    return {
        "all": (every, True, False),
        "all, checkpointed": (every, True, True),
        "last half and embedders": (last_half, True, False),
        "first half": (set(range(half)), False, False),
        "every second": (set(range(0, layers, 2)), False, False),
        "last half": (last_half, False, False),
        "last half, checkpointed": (last_half, False, True),
        "last quarter": (last_quarter, False, False),
    }


class Bench:
    """One model, one batch, one step at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.device = args, torch.device(args.device)
        self.model = WanTransformer3DModel(
            patch_size=(1, args.patch, args.patch),
            num_attention_heads=args.heads,
            attention_head_dim=args.head_dim,
            in_channels=3 * args.channels,
            out_channels=args.channels,
            text_dim=32,
            freq_dim=256,
            ffn_dim=4 * args.heads * args.head_dim,
            num_layers=args.layers,
        ).to(self.device)
        self.model.train()
        self.stack = BlockStack(self.model)
        shape = (args.batch_size, args.channels, args.frames, args.size, args.size)
        self.clip = torch.randn(shape, device=self.device)
        self.condition = torch.randn(shape, device=self.device).repeat(1, 2, 1, 1, 1)
        self.time = torch.rand(args.batch_size, device=self.device) * 1000

    def step(self, opened: set[int], below: bool, checkpointed: bool) -> dict[str, Any]:
        """A warm step's seconds and bytes; the optimizer is a fresh one, its state made by a first step."""
        blocks = weight_names(self.stack)
        inside = {name for names in blocks for name in names}
        trained = {name for block in opened for name in blocks[block]}
        train_only(
            self.model, lambda name: name in trained or (name not in inside and (below or name.startswith(HEAD)))
        )
        (self.model.enable_gradient_checkpointing if checkpointed else self.model.disable_gradient_checkpointing)()
        optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=0.0, fused=True)
        costs, cuda = StepCosts(self.model), self.device.type == "cuda"
        for warm in (False, True):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            with costs.watch(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
                predicted = FAMILIES["WanTransformer3DModel"].predict(self.model, self.clip, self.time, self.condition)
                predicted.float().square().mean().backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
            if not warm:
                row = costs.take(optimizer)
            optimizer.zero_grad(set_to_none=True)
        row |= {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}
        cost = cost_model(self.stack).cost(opened, below)
        known = not checkpointed  # the model of costs knows no recomputation
        return row | {
            "predicted_speed_up": cost.speed_up if known else None,
            "predicted_activations": cost.activations if known else None,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "heads": 4, "head-dim": 32, "layers": 12, "channels": 3, "size": 32, "patch": 4, "frames": 8, "batch-size": 4,
        "repeats": 5, "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench, measured = Bench(args), {name: [] for name in cases(args.layers)}
    for _ in range(args.repeats):
        for name, case in cases(args.layers).items():
            measured[name].append(bench.step(*case))
    rows = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in measured.items()}
    for name, found in measured.items():
        seconds = [whole["seconds"] / row["seconds"] for whole, row in zip(measured["all"], found, strict=True)]
        rows[name] |= {"speed_up": median(seconds), "speed_up_spread": [min(seconds), max(seconds)]}
    found = {
        "command": " ".join(["python", *sys.argv]),
        "device": device_name(bench.device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parameters": sum(weight.numel() for weight in bench.model.parameters()),
        "cases": rows,
    }
    print(to_table(found).to_markdown())
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def median(values: Any) -> float | None:
    """The median; None where nothing was measured."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def to_table(found: dict[str, Any]) -> Table:
    """Medians, with the speed-up's spread."""
    rows, full = [], found["cases"]["all"]
    for name, row in found["cases"].items():
        low, high = row["speed_up_spread"]
        saved, state = row["saved_bytes"], row["gradient_bytes"] + row["optimizer_bytes"]
        cells = [f"{row['seconds']:.3f}", f"{row['speed_up']:.2f}x ({low:.2f} to {high:.2f})"]
        cells += [f"{row['predicted_speed_up']:.2f}x" if row["predicted_speed_up"] else "-"]
        cells += [f"{saved / 2**20:.0f}", f"{saved / full['saved_bytes']:.2f}"]
        cells += [f"{row['predicted_activations']:.2f}" if row["predicted_activations"] else "-"]
        cells += [f"{state / 2**20:.0f}", f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else "-"]
        rows.append([name, *cells])
    header = ["trained", "s/step", "faster", "predicted", "saved MiB", "of all", "predicted", "state MiB", "peak"]
    return Table(f"{found['parameters']:,} weights, {found['device']}", header, rows)


if __name__ == "__main__":
    sys.exit(main())
