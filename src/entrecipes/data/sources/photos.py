"""Square patches of a dozen photographs: real colours and textures, few scenes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source

PACKAGED = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Of scikit-image; china and flower come with scikit-learn."""
PATCHES = 500
"""Patches a photograph."""
REGION = 112
"""About the side, in pixels, of the regions that a photograph is divided into; a patch never leaves its region."""
SMALLEST, LARGEST = 32, 96
"""Sides of the patches in pixels of the photograph."""


def photographs(archive: Path) -> dict[str, Image.Image]:
    """The dozen photographs by name, in RGB."""
    from sklearn.datasets import load_sample_image

    found = {
        Path(name).stem: Image.open(io.BytesIO(read_member(archive, f"skimage/data/{name}"))).convert("RGB")
        for name in PACKAGED
    }
    for name in ("china", "flower"):
        found[name] = Image.fromarray(load_sample_image(f"{name}.jpg"))
    return dict(sorted(found.items()))


def patches(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """500 patches a photograph, 32 to 96 pixels wide, resized to `options.size`; class: the photograph.

    `group` is the region: two patches may overlap only within one, so training and held-out patches share no pixel.
    """
    (archive,) = files
    for number, (name, photo) in enumerate(photographs(archive).items()):
        random = np.random.default_rng([0, number])
        columns, rows = photo.width // REGION, photo.height // REGION
        width, height = photo.width // columns, photo.height // rows
        for _ in range(PATCHES):
            column, row = random.integers(columns), random.integers(rows)
            side = random.integers(SMALLEST, LARGEST + 1)
            left = column * width + random.integers(width - side + 1)
            top = row * height + random.integers(height - side + 1)
            patch = photo.crop((left, top, left + side, top + side))
            patch = patch.resize((options.size, options.size), Image.Resampling.BICUBIC)
            yield {"image": np.asarray(patch), "label": name, "group": f"{name}-{row}-{column}"}


SOURCES = (
    Source(
        name="photos",
        description="6,000 patches of 12 photographs (only 12 scenes), any size, colour, 12 classes",
        license="public domain, CC0 or CC BY, by photograph",
        packages=(Package("pip", "scikit-image", "0.26.0"),),
        download_mb=13.7,
        rows=patches,
        any_size=True,
    ),
)
