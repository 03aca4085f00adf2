"""Do generated digits show the digit asked for? Judged by a classifier trained on real digits only.

    python scripts/check_digits.py outputs/demo/pipeline --samples 500 --at-least 0.85

The pipeline is loaded and run with plain diffusers, as a stranger would. Exit code: 0, or 1 below `--at-least`, or 2
when the pipeline can't be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

CLASSES = 10


def generate(
    pipeline: DiffusionPipeline, labels: list[int], steps: int, guidance_scale: float, seed: int, batch_size: int
) -> torch.Tensor:
    """Images [N, C, H, W] in [0, 1]; image i is drawn from the seed `seed + i`."""
    batches = []
    for start in range(0, len(labels), batch_size):
        wanted = labels[start : start + batch_size]
        keys = {
            "class_labels": wanted,
            "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed + start + i) for i in range(len(wanted))],
            "output_type": "pt",
        }
        if type(pipeline).__name__ == "DiTPipeline":
            keys["guidance_scale"] = guidance_scale
        else:
            keys["batch_size"] = len(wanted)
        batches.append(pipeline(**keys).images.float().cpu())
    return torch.cat(batches)


def to_digits(images: torch.Tensor) -> np.ndarray:
    """[N, C, H, W] in [0, 1] -> flat 8x8 grey [N, 64], rounded to the 256 levels that an image file holds."""
    grey = images.clamp(0, 1).mean(1, keepdim=True)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grey, 8).flatten(1)
    return pooled.mul(255).round().div(255).numpy()


def train_classifier() -> tuple[SVC, float]:
    """A support vector classifier of real digits, and its accuracy on the fifth of them that it never saw."""
    digits = load_digits()
    pixels = np.round(digits.data / 16 * 255) / 255
    x, unseen_x, y, unseen_y = train_test_split(
        pixels, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    classifier = SVC(C=10, gamma="scale").fit(x, y)
    return classifier, float(classifier.score(unseen_x, unseen_y))


def check(arguments: argparse.Namespace) -> dict[str, object]:
    """Generate, classify, count."""
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline, revision=arguments.revision)
    if type(pipeline).__name__ not in ("ConsistencyModelPipeline", "DiTPipeline"):
        raise ValueError(f"a {type(pipeline).__name__} takes no class labels; give a class-conditional one of digits")
    pipeline.set_progress_bar_config(disable=True)
    labels = np.arange(arguments.samples) % CLASSES
    images = generate(
        pipeline.to(arguments.device),
        labels.tolist(),
        arguments.steps,
        arguments.guidance_scale,
        arguments.seed,
        arguments.batch_size,
    )
    classifier, accuracy = train_classifier()
    agrees = classifier.predict(to_digits(images)) == labels
    return {
        "pipeline": str(arguments.pipeline),
        "samples": arguments.samples,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
        "classifier_accuracy_on_real": accuracy,
        "agreement": float(agrees.mean()),
        "agreement_per_class": [float(agrees[labels == digit].mean()) for digit in range(CLASSES)],
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, check, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a published pipeline, or its Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--samples", type=int, default=500, help="images, the ten classes in turn (at least 10)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of each image")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="DiT pipelines only; 1 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-least", type=float, default=0.85, help="agreement below which the exit code is 1")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    arguments = parser.parse_args(argv)
    if arguments.samples < CLASSES:
        parser.error(f"--samples: {arguments.samples} is too few; give at least {CLASSES}")
    folder = Path(arguments.pipeline)
    if (folder.parent.is_dir() or arguments.pipeline.count("/") != 1) and not (folder / "model_index.json").is_file():
        parser.error(f"{arguments.pipeline}: no pipeline there (no model_index.json); give a run's pipeline/ folder")
    try:
        found = check(arguments)
    except (ValueError, OSError) as error:
        print(f"check_digits: {arguments.pipeline}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"classifier on real digits it never saw: {found['classifier_accuracy_on_real']:.1%} right")
    print(f"{found['samples']} generated digits, class asked and seen agree: {found['agreement']:.1%}")
    print("by class: " + "  ".join(f"{digit}: {share:.0%}" for digit, share in enumerate(found["agreement_per_class"])))
    passed = found["agreement"] >= arguments.at_least
    print(f"{'passed' if passed else 'FAILED'}: at least {arguments.at_least:.0%} was asked")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
