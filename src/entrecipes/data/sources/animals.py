"""Animal silhouettes in MNIST's format: the usual target when a model trained on MNIST is fine-tuned."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source, expect

CLASSES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
"""By label number: the package lists the names in this order, and the pictures agree."""
ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArrayUnpickler(pickle.Unpickler):
    """Loads pickled numpy arrays and nothing else: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that an array needs. Raises UnpicklingError for any other."""
        if (module.replace("_core", "core"), name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def silhouettes(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """1,000 silhouettes of each animal, white on black."""
    (archive,) = files
    folder = "animal_shape_mnist/data/Animal Shape/animal"
    images, labels = (
        ArrayUnpickler(io.BytesIO(gzip.decompress(read_member(archive, f"{folder}_{what}_version_3.gz")))).load()
        for what in ("data", "label")
    )
    expect(images.shape == (10_000, 28, 28) and images.dtype == np.uint8, f"images are {images.shape}", archive)
    expect(np.bincount(labels).tolist() == [1000] * 10, "there are not 1,000 images of each animal", archive)
    for image, label in zip(images, labels, strict=True):
        yield {"image": image, "label": CLASSES[label]}


SOURCES = (
    Source(
        name="animals",
        description="10,000 animal silhouettes, 28x28 grey, 10 classes of 1,000",
        license="MIT",
        packages=(
            Package(
                "pip",
                "animal-shape-mnist",
                "0.39",
                "e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
            ),
        ),
        download_mb=2.6,
        rows=silhouettes,
    ),
)
