"""Predicted against measured memory of training steps, each configuration in a process of its own.

    python scripts/benchmark_memory.py --results recipes/memory/results/memory.json        # all; minutes on a CPU core
    python scripts/benchmark_memory.py --only dit "dit, lora"                               # some

Of each: the prediction, made before a weight or an image is loaded; then the run is built, three steps are taken, and
the device is asked for the most that was held: on CUDA torch's allocator (`max_memory_allocated`), on a CPU the kernel
(VmHWM, set back before the steps). Components are measured on their own after the first step. On a CPU, glibc may keep
what was freed: with --exact every tensor is a mapping of its own, which goes back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

CHECKPOINTED, BF16 = "training.gradient_checkpointing=true", "training.precision=bf16"
STAGED = "blocks={type: staged, stages: [{train: ['transformer_blocks.4.*', 'transformer_blocks.5.*', "
STAGED += "'transformer_blocks.6.*', 'transformer_blocks.7.*', 'proj_out*']}]}"
LAST_HALF = "blocks={type: entprog, order: last_first, growth: none, largest: 0.5, inputs: never}"
FROM_BASE = ["memory/dit", "pipeline.build=null", "pipeline.pretrained={base}"]
CASES: dict[str, list[str]] = {
    "unet": ["memory/unet"],
    "unet, checkpointed": ["memory/unet", CHECKPOINTED],
    "unet, bf16": ["memory/unet", BF16],
    "unet, 8-bit AdamW": ["memory/unet", "optimizer={type: adamw8bit}"],
    "unet, micro batches of 8": ["memory/unet", "training.micro_batch_size=8"],
    "unet, no average": ["memory/unet", "training.ema=null"],
    "dit": ["memory/dit"],
    "dit, checkpointed, bf16": ["memory/dit", CHECKPOINTED, BF16],
    "dit, 8-bit Lion, no average": ["memory/dit", "optimizer={type: lion8bit}", "training.ema=null"],
    "dit, last half open (entprog)": ["memory/dit", LAST_HALF],
    "dit, last half open (staged)": ["memory/dit", STAGED],
    "dit, LoRA": [*FROM_BASE, "blocks={type: all, adapter: {type: lora}}"],
    "dit, QLoRA": [*FROM_BASE, "blocks={type: all, adapter: {type: qlora}}"],
    "dit on latents": ["memory/dit", "pipeline.build.vae={vae}", "pipeline.build.model.config.in_channels=4",
                       "pipeline.build.model.config.out_channels=4", "data.max_images=64"],
    "stickers": ["stickers/scratch-rdtf", "training.batch_size=16", "evaluation.metrics=[]",
                 "evaluation.metrics_every=null", "data.max_images=200"],
}  # fmt: skip
"""Recipe and overrides; {base} and {vae} are folders that are made first."""


def measure(words: list[str], steps: int) -> dict[str, Any]:
    """Predict, then take the steps; in this process. GiB."""
    import torch

    from entrecipes.recipe.load import load
    from entrecipes.training.loop import step
    from entrecipes.training.memory import measured, predict, resident_gib
    from entrecipes.training.run import Run

    recipe = load(words[0], words[1:]).recipe
    predicted = predict(recipe)
    run = Run(recipe, folder=None)
    row: dict[str, Any] = {}
    run.log.listener = lambda found: row.update(found) if found["kind"] == "costs" else None
    batches = run.batches()
    run.curriculum.advance(0), run.blocks.advance(0)
    run.wrap()
    run.blocks.focus()
    predicted = predicted.beside(run)
    built = resident_gib()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(steps):
        step(run, batches)
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    found = measured(run, row) | {"peak": peak, "built": built}
    return compared(predicted, found)


def predict_again(words: list[str], row: dict[str, Any]) -> dict[str, Any]:
    """The row with a new prediction for the same process, and what was measured."""
    from entrecipes.recipe.load import load
    from entrecipes.training.memory import predict

    old = row["predicted"]
    new = replace(
        predict(load(words[0], words[1:]).recipe, process=old["process"]), frozen=old["frozen"], data=old["data"]
    )
    return row | compared(new, row["measured"])


def compared(predicted: Any, found: dict[str, float]) -> dict[str, Any]:
    """Prediction, measurement, and the error of each component."""
    error = {key: getattr(predicted, key) / value - 1 for key, value in found.items() if key != "built" and value}
    return {"predicted": asdict(predicted) | {"peak": predicted.peak}, "measured": found, "error": error}


def prepare(folder: Path) -> dict[str, str]:
    """A base to put adapters on, and a VAE of the usual structure with random weights."""
    from diffusers import AutoencoderKL

    from entrecipes.diffusion.pipelines import load_components
    from entrecipes.recipe.load import load

    load_components(load("memory/dit").recipe.pipeline).pipeline().save_pretrained(folder / "base")
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    vae = AutoencoderKL(1, 1, down, up, [32, 64, 64], layers_per_block=1, latent_channels=4, norm_num_groups=8)
    vae.save_pretrained(folder / "vae")
    return {"base": str(folder / "base"), "vae": str(folder / "vae")}


def in_a_process(words: list[str], steps: int, exact: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    env |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    if exact:
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--steps", str(steps), "--measure", json.dumps(words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="configurations")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--exact", action="store_true", help="CPU: give freed tensors back at once")
    parser.add_argument("--results", type=Path, help="JSON file to write (and to add configurations to)")
    parser.add_argument("--predict-again", action="store_true", help="keep what --results holds of measurements")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure), args.steps)))
        return 0
    import torch

    from entrecipes.diffusion.pipelines import best_device
    from entrecipes.training.publish import device_name

    rows: dict[str, Any] = {}
    if args.results and args.results.exists():
        rows = json.loads(args.results.read_text())["cases"]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder))
        os.environ["ENTRECIPES_HOME"] = str(Path(folder) / "home")
        for name in args.only:
            words = [word.format(**made) if word.endswith(("{base}", "{vae}")) else word for word in CASES[name]]
            if args.predict_again:
                found = predict_again(words, rows[name])
            else:
                found = in_a_process(words, args.steps, args.exact)
            rows[name] = {"recipe": CASES[name], "exact": args.exact, **found}
            print(line(name, rows[name]), flush=True)
            if args.results:
                about = {"command": " ".join(["python", *sys.argv]), "device": device_name(best_device())}
                args.results.parent.mkdir(parents=True, exist_ok=True)
                args.results.write_text(json.dumps(about | {"versions": versions, "cases": rows}, indent=1) + "\n")
    print(to_markdown(rows))
    return 0


def line(name: str, row: dict[str, Any]) -> str:
    """Predicted / measured MiB of each component, and the error of the peak."""
    return f"{name}: " + ", ".join(f"{key} {cell}" for key, cell in zip(COLUMNS, cells(row), strict=True))


COLUMNS = ["weights", "average", "optimizer", "gradients", "activations", "frozen", "data", "peak", "error"]


def cells(row: dict[str, Any]) -> list[str]:
    """MiB: one number where prediction and measurement agree to 0.1, else both; and the error of the peak."""
    found = []
    for key in COLUMNS[:-1]:
        both = [f"{row[kind].get(key, 0) * 1024:.1f}" for kind in ("predicted", "measured")]
        found.append(both[0] if both[0] == both[1] else " / ".join(both))
    return [*found, f"{row['error']['peak']:+.1%}"]


def to_markdown(rows: dict[str, Any]) -> str:
    """The table of the README."""
    header = ["configuration", *COLUMNS]
    body = [[name, *cells(row)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body])


if __name__ == "__main__":
    sys.exit(main())
