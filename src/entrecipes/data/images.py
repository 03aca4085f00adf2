"""The set of images that a run trains on or is measured against, and the cut between the two."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from entrecipes.data.shards import LazyTensor
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset


class BadImage(Exception):
    """An image that can't be read; the message is its name and why."""


def fit_image(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [channels, size, size].

    Turned upright by its EXIF orientation, transparency laid over white, short side resized to `size` (bicubic with
    antialiasing) and centre-cropped. A picture that already is `size` x `size` keeps its pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip to 255 rather than scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.atleast_3d(np.array(image)).transpose(2, 0, 1))


class Rows(Protocol):
    """Images, or latents, that stay on disk; each is read when asked for (in this process or a loader's worker)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of them."""

    def __len__(self) -> int: ...

    def image(self, index: int, mirrored: bool = False) -> Tensor:
        """One of them, as it is or turned left to right. Raises BadImage."""

    def select(self, indices: Sequence[int]) -> Rows:
        """Only those rows, in that order."""


@dataclass(frozen=True)
class ImageRows:
    """Encoded images in a datasets table, decoded on demand (in this process or a loader's worker).

    `dataset` has `column` cast to `Image(decode=False)`, so that a broken file is our business, not the table's.
    """

    dataset: Dataset
    column: str
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.channels, self.size, self.size

    def image(self, index: int, mirrored: bool = False) -> Tensor:
        """uint8 [C, H, W]. Raises BadImage."""
        cell = self.dataset[int(index)][self.column]
        image = torch.from_numpy(decode_cell(cell, f"row {index}", self.size, self.channels))
        return image.flip(-1) if mirrored else image

    def select(self, indices: Sequence[int]) -> ImageRows:
        """Only those rows, in that order."""
        return replace(self, dataset=self.dataset.select(indices))


def decode_cell(cell: dict[str, Any] | None, name: str, size: int, channels: int) -> np.ndarray:
    """One undecoded `datasets.Image` cell (`bytes` and `path`) as uint8 [C, H, W]. Raises BadImage."""
    cell = cell or {}
    name = cell.get("path") or name
    try:
        content = cell.get("bytes")
        with Image.open(io.BytesIO(content) if content is not None else cell["path"]) as image:
            return fit_image(image, size, channels)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise BadImage(f"{name} ({why_unreadable(error)})") from error


def why_unreadable(error: Exception) -> str:
    """The same words each time the same file fails: PIL's own may contain an address in memory."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"


def check_bad_images(
    names: Sequence[str], limit: int, place: str, *, what: str = "images can't be read", key: str = "max_bad_images"
) -> None:
    """Raise UserError, with the names, once more than `limit` images could not be read (or are bad for `what`)."""
    if len(names) > limit:
        listed = "\n".join(f"  {name}" for name in names[:20])
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(
            f"{place}: more {what} than data.{key} ({limit}) allows:\n{listed}{more}\n"
            f"Mend or remove them, or raise data.{key}."
        )


@dataclass
class ImageSet:
    """Images with what is known of them. Exactly one of `tensor` and `rows` holds the pixels.

    Attributes:
        name: Short name for logs and cards.
        source: One sentence: where the images come from.
        license: Their licence, as far as known.
        fingerprint: Hash of the pixels (or of the files) and of how they are resized; keys caches.
        label_names: Class names in the order of the labels; None when there are no classes.
        labels: int64 [N], or None.
        captions: One text an image, or None.
        keypoints: Clips only: the pose in every frame, float32 [N, F, 13, 3]: x and y in [0, 1], visibility.
        lengths: Stickers only: frames of each clip before its padding, int64 [N]; 1 for a still.
        motion: Stickers only: rank of its motion (mean absolute difference between successive frames) in the set, float
            [N] in [0, 1]; 0 for a still.
        text: Stickers only: what the text encoders make of the captions, float16 [N, T, D]; of large sets on disk.
        bad_images: Names of unreadable images, left out so far.
        rendered: Clips and stickers only: they are known to be drawn, and show no real person.
        tensor: uint8 [N, C, H, W] in CPU memory; for a latent set float [N, 2C, h, w] (mean and standard deviation);
            for clips uint8 [N, 3, 2F + 1, H, W]: F frames, then their F pose maps, then a reference image; for
            stickers uint8 [N, 3, F, H, W], and their latents float [N, 2C, F, h, w].
        mirrored: Latent sets only: the latents of the mirrored images, same shape.
        rows: Images on disk, decoded when asked for, or latents on disk.
        max_bad_images: How many unreadable images a lazy set may skip.
        bad_key: The recipe's key of that limit.
        num_workers: Decoding processes for a lazy set.
    """

    name: str
    source: str
    license: str
    fingerprint: str
    label_names: tuple[str, ...] | None = None
    labels: Tensor | None = None
    captions: list[str] | None = None
    bad_images: list[str] = field(default_factory=list)
    rendered: bool = False
    keypoints: Tensor | None = None
    lengths: Tensor | None = None
    motion: Tensor | None = None
    text: Tensor | LazyTensor | None = None
    tensor: Tensor | None = None
    mirrored: Tensor | None = None
    rows: Rows | None = None
    max_bad_images: int = 0
    bad_key: str = "max_bad_images"
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.tensor if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, as the set holds it."""
        return tuple(self.tensor.shape[1:] if self.rows is None else self.rows.shape)

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W] (latent sets: float moments). Raises UserError when the file can't be read."""
        if self.rows is None:
            return self.tensor[index]
        try:
            return self.rows.image(index)
        except BadImage as error:
            raise UserError(f"{self.name}: can't read {error}. Replace or remove that file.") from None

    def check_bad(self, names: Iterable[str]) -> None:
        """Add unreadable images to `bad_images`. Raises UserError once there are more than the recipe tolerates."""
        self.bad_images.extend(name for name in dict.fromkeys(names) if name not in self.bad_images)
        check_bad_images(self.bad_images, self.max_bad_images, self.name, key=self.bad_key)

    def in_memory(self) -> ImageSet:
        """The same set with all its images read, without those that can't be. Raises UserError for too many of them."""
        if self.rows is None:
            return self
        images: dict[int, Tensor] = {}
        for index in range(len(self)):
            try:
                images[index] = self.rows.image(index)
            except BadImage as error:
                self.check_bad([str(error)])
        return replace(self.subset(list(images)), tensor=torch.stack(list(images.values())), rows=None)

    def label_counts(self) -> dict[str, int]:
        """Images of each class, in class order; empty without labels."""
        if self.labels is None:
            return {}
        counts = torch.bincount(self.labels, minlength=len(self.label_names)).tolist()
        return dict(zip(self.label_names, counts, strict=True))

    def binarized(self, place: str = "data") -> ImageSet:
        """The same set with every pixel 0 or 255. Raises UserError for one that is not in memory."""
        if self.tensor is None:
            raise UserError(
                f"{place}.binarize: needs the images in memory; set {place}.on_device: always, or leave it out"
            )
        black_or_white = (self.tensor > 127).to(torch.uint8) * 255
        return replace(self, tensor=black_or_white, fingerprint=fingerprint(self.fingerprint, "binarized"))

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The same kind of set with only those images, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        cut = {
            name: None if (value := getattr(self, name)) is None else value[index]
            for name in ("labels", "keypoints", "lengths", "motion", "tensor", "mirrored")
        }
        if self.text is not None:
            cut["text"] = self.text.select(index) if isinstance(self.text, LazyTensor) else self.text[index]
        return replace(
            self,
            **cut,
            captions=None if self.captions is None else [self.captions[i] for i in index.tolist()],
            rows=None if self.rows is None else self.rows.select(index.tolist()),
            fingerprint=fingerprint(self.fingerprint, index),
        )


@dataclass
class Splits:
    """What is trained on, and what is kept for evaluation (None when nothing is)."""

    train: Any
    held_out: ImageSet | None


def split_indices(
    count: int,
    held_out: float,
    seed: int,
    *,
    groups: Sequence[str] | None = None,
    max_images: int | None = None,
    place: str = "data",
) -> tuple[list[int], list[int]]:
    """Cut `count` images into (train, held out), each in ascending order: a function of `seed` alone.

    Args:
        held_out: Share to hold out, in [0, 1); rounded, but at least one image when above 0.
        groups: One name an image: images of one group (variants of one drawing, crops of one place) never land on both
            sides. The held-out part may then exceed its share by part of one group.
        max_images: Keep only that many, drawn by `seed`, before the cut.

    Raises:
        UserError: When no image would be left to train on.
    """
    order = np.random.default_rng(seed).permutation(count)[:max_images]
    wanted = max(1, round(len(order) * held_out)) if held_out else 0
    if groups is None:
        train, kept = order[wanted:], order[:wanted]
    else:
        names = np.asarray(groups)[order]
        unique, first, inverse, sizes = np.unique(names, return_index=True, return_inverse=True, return_counts=True)
        by_turn = np.argsort(first)
        before = np.cumsum(sizes[by_turn]) - sizes[by_turn]
        out = np.zeros(len(unique), bool)
        out[by_turn[before < wanted]] = True
        train, kept = order[~out[inverse]], order[out[inverse]]
    if not len(train):
        raise UserError(f"{place}: {len(order)} images are too few to hold out {held_out:g} of them (data.held_out).")
    return np.sort(train).tolist(), np.sort(kept).tolist()
