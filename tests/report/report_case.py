"""What a run leaves, its numbers computed from a case with a known answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.evaluation.result import Metric
from entrecipes.report.plots import save_grid

SOURCE = """\
# Digits <in> two minutes.
#   entrecipes run digits/unet
description: Digits, class-conditional
pipeline:
  build:
    model: {class: UNet2DModel}
    scheduler: {class: DDIMScheduler}
data: {type: digits}
training: {images: 40k}
"""

RECIPE: dict[str, Any] = {
    "description": "Digits, class-conditional",
    "pipeline": {"pretrained": None, "build": {"model": {"class": "UNet2DModel"}}},
    "data": {"type": "digits"},
    "training": {"images": 40_000, "batch_size": 64},
    "evaluation": {"held_out": {"images": 256, "noise_levels": 32, "gate_pivot": 0.2, "seed": 0}},
}

ORIGIN = {"images": 40_000, "split": "train", "sampler": "DDIMScheduler", "steps": 20, "seed": 0, "samples": 1000}
ORIGIN |= {"extractor": "EfficientNet-Lite0 at 112 px", "guidance_scale": None}

METRICS = [
    Metric("kid_efflite0_1k", 0.0123, 0.0008, ORIGIN | {"subsets": 50}, False),
    Metric("precision_efflite0_1k", 0.75, None, ORIGIN, True),
]

RUN: dict[str, Any] = {
    "name": "digits/unet",
    "description": "Digits, class-conditional",
    "license": "apache-2.0",
    "images": 40_000,
    "batch_size": 64,
    "seed": 3,
    "world_size": 1,
    "device": "a processor, 1 thread(s)",
    "precision": "no",
    "parameters": 1_234_567,
    "trainable_parameters": 1_234_567,
    "seconds_training": 171.3,
    "seconds_total": 200.4,
    "images_per_second": 233.5,
    "peak_memory_gib": 0.71,
    "data": {
        "name": "digits",
        "source": "scikit-learn | load_digits",
        "license": "CC BY 4.0",
        "train_images": 1617,
        "held_out_images": 180,
        "label_names": [str(digit) for digit in range(10)],
        "bad_images": 0,
    },
    "versions": {"entrecipes": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
    "pipeline": {
        "class": "ConsistencyModelPipeline",
        "model_class": "UNet2DModel",
        "scheduler_class": "DDIMScheduler",
        "prediction_type": "epsilon",
        "num_classes": 10,
        "sample_size": 8,
        "channels": 1,
        "steps": 20,
        "guidance_scale": 1.0,
        "latent": False,
    },
}


def gaussian_row(images: int, excess: float, dimensions: int = 64, std: float = 0.5) -> dict[str, Any]:
    """A held-out row for Gaussian data: the x0 error of the best denoiser, times 1 + `excess`."""
    log_sigma = np.linspace(-5, 4, 32)
    sigma = np.exp(log_sigma)
    x0_error = dimensions * (1 + excess) * std**2 * sigma**2 / (std**2 + sigma**2)
    gate = sigma**3 / (sigma**3 + 0.2**3)
    nats = float(np.trapezoid(gate * x0_error / sigma**2, log_sigma))
    return {
        "kind": "held_out",
        "images": images,
        "nats": nats,
        "nats_standard_error": 0.02 * nats,
        "train_nats": 0.95 * nats,
        "log_sigma": log_sigma.tolist(),
        "x0_error": x0_error.tolist(),
        "rate": (x0_error / sigma**2).tolist(),
        "gate": gate.tolist(),
        "seconds": 1.0,
    }


def records() -> list[dict[str, Any]]:
    """What a run of 40,000 images writes into metrics.jsonl."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {"kind": "start", "images": 0, "world_size": 1, "device": "cpu"},
        gaussian_row(0, 3.0),
    ]
    for images in range(400, 40_001, 400):
        loss = (0.08 + 0.9 * np.exp(-images / 2500)) * random.lognormal(0, 0.15)
        rows.append({"kind": "train", "images": images, "loss": loss, "images_per_second": 233 + random.normal(0, 6)})
        if images % 4000 == 0:
            rows.append(gaussian_row(images, 3 * np.exp(-images / 8000)))
    rows.append({"kind": "event", "images": 20_000, "what": "opened block <3> of 6"})
    return rows


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write `run.json`."""
    (folder / "run.json").write_text(json.dumps(run))


def make_run(folder: Path) -> Path:
    """A finished run: three sample grids, curves, two metrics, an empty pipeline folder."""
    (folder / "pipeline").mkdir(parents=True)
    (folder / "recipe.source.yaml").write_text(SOURCE)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    rows = records() + [{"kind": "metric", "images": 40_000, **metric.to_json()} for metric in METRICS]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(folder, RUN | {"metrics": [metric.to_json() for metric in METRICS]})
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    for name in ("images-000000020000", "images-000000040000", "final"):
        save_grid(images, folder / "samples" / f"{name}.png", columns=10)
    return folder
