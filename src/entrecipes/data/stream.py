"""Images read from the Hub while training, without downloading the set first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from entrecipes.data.images import BadImage, ImageSet, Splits, check_bad_images, decode_cell
from entrecipes.data.shuffle import ahead, shuffled, splits
from entrecipes.data.tables import Table, open_table, require_columns
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import HubData

MAX_HELD_OUT = 1000
"""Images held out of a stream at most: they are downloaded before training starts."""
READ_AHEAD = 4
"""Batches."""


@dataclass
class IterableImageSet:
    """An image set that can only be read from front to back, for the loader; see `data.shuffle` for the order.

    What makes it approximate: an unreadable image is replaced by a readable one of its batch.

    Attributes:
        rows: All shards, with images undecoded.
        parts: (number of a shard, rows at its beginning that are left out) of those to train on.
        shards: How many `rows` has; 1: it is read as a whole.
        labels: The label column, or None without classes (a stream's labels aren't known beforehand).
        count: Images in an epoch; None when the Hub does not tell.
        Others as in ImageSet.
    """

    name: str
    source: str
    license: str
    fingerprint: str
    rows: datasets.IterableDataset
    parts: tuple[tuple[int, int], ...]
    shards: int
    image_column: str
    size: int
    channels: int
    shuffle_buffer: int
    max_bad_images: int
    label_names: tuple[str, ...] | None = None
    labels: str | None = None
    count: int | None = None
    bad_images: list[str] = field(default_factory=list)
    captions: None = None
    tensor: None = None
    mirrored: None = None

    def __len__(self) -> int:
        """Images in an epoch; 0 when the Hub does not tell."""
        return self.count or 0

    def __bool__(self) -> bool:
        return True

    def image(self, index: int) -> Tensor:
        """Raises UserError: a stream can't be asked for one image."""
        raise UserError(
            f"{self.name} is streamed, so its training images can't be drawn at random: set evaluation.reference: "
            f"held_out (and data.held_out above 0), or data.streaming: false."
        )

    def label_counts(self) -> dict[str, int]:
        """Empty: not known before the stream was read."""
        return {}

    def read(self, part: int) -> Iterator[dict[str, Any]]:
        """The undecoded rows of a part, in the order in which they are stored."""
        shard, left_out = self.parts[part]
        rows = self.rows if self.shards == 1 else self.rows.shard(num_shards=self.shards, index=shard)
        return iter(rows.skip(left_out) if left_out else rows)


def open_stream(table: Table, section: HubData, *, count: int | None, image_size: int, channels: int) -> Splits:
    """The stream's first images held out (share `section.held_out`, at most 1,000), the rest for training.

    Args:
        table: `dataset` and `held_out` are `datasets.IterableDataset`s here.
        count: Rows of the training split, when known.

    Raises:
        UserError: Missing columns, or labels that aren't numbered (a stream can't be searched for its classes).
    """
    stream = table.dataset
    features = stream.features or stream._resolve_features().features
    stream = stream.cast(features) if stream.features is None else stream
    wanted = {key: getattr(section, key) for key in ("image_column", "label_column", "caption_column")}
    require_columns(features, wanted, table.place)
    names = None
    if section.label_column is not None:
        feature = features[section.label_column]
        if not isinstance(feature, datasets.ClassLabel):
            raise UserError(
                f"data.label_column: while streaming, '{section.label_column}' must be a ClassLabel, not {feature}. "
                f"Set data.streaming: false, or data.label_column: null."
            )
        names = tuple(feature.names)
    shards = stream.num_shards
    if section.max_images is not None:
        stream, count = stream.take(section.max_images), min(count or section.max_images, section.max_images)
        shards = 1
    train = IterableImageSet(
        name=table.name,
        source=table.source,
        license=table.license,
        fingerprint="",
        rows=_undecoded(stream),
        parts=tuple((shard, 0) for shard in range(shards)),
        shards=shards,
        image_column=table.image_column,
        size=image_size,
        channels=channels,
        shuffle_buffer=section.shuffle_buffer,
        max_bad_images=section.max_bad_images,
        label_names=names,
        labels=section.label_column,
        count=count,
    )
    held_out = None
    if section.held_out_split is not None:
        rows = list(_undecoded(table.held_out.take(MAX_HELD_OUT)))
        held_out = datasets.Dataset.from_list(rows, features=table.held_out.features or features)
    elif section.held_out:
        wanted = min(MAX_HELD_OUT, max(1, round(section.held_out * count)) if count else MAX_HELD_OUT)
        rows, parts = _first(train, wanted)
        train = replace(train, parts=parts, count=None if count is None else count - len(rows))
        held_out = datasets.Dataset.from_list(rows, features=features)
    identity = (section.id, section.config, section.split, section.revision, image_size, channels)
    train.fingerprint = fingerprint(*identity, section.max_images, train.parts)
    return Splits(train, held_out and _kept(table, held_out, section, image_size, channels))


def _undecoded(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    for name, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream


def _first(image_set: IterableImageSet, wanted: int) -> tuple[list[dict[str, Any]], tuple[tuple[int, int], ...]]:
    """(the first rows, what is left of the parts): no process may train on what is held out, whichever shard it has."""
    rows: list[dict[str, Any]] = []
    for part, (shard, _) in enumerate(image_set.parts):
        found = list(itertools.islice(image_set.read(part), wanted - len(rows)))
        rows, left = rows + found, ((shard, len(found)), *image_set.parts[part + 1 :])
        if len(rows) == wanted:
            break
    return rows, left


def _kept(table: Table, held_out: datasets.Dataset, section: HubData, image_size: int, channels: int) -> ImageSet:
    whole = section.model_copy(update={"held_out": 0.0, "max_images": None, "on_device": "always"})
    part = Table(held_out, table.name, table.source, table.license, table.place, image_column=table.image_column)
    return open_table(part, whole, image_size=image_size, channels=channels).train


def stream_batches(
    image_set: IterableImageSet,
    *,
    seed: int,
    batch_size: int,
    start_images: int,
    rank: int,
    world_size: int,
    flip: bool,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """A process's share of each batch, on the CPU: images uint8 [n, C, H, W], labels int64 [n] or None, positions [n].

    With `num_workers` above 0, as many threads decode (Pillow lets go of the interpreter meanwhile), and reading runs
    some batches ahead.
    """
    share = batch_size // world_size
    rows = slice(rank * share, (rank + 1) * share)
    if splits(image_set, world_size):
        stream, step = shuffled(image_set, seed, start_images // world_size, rank, world_size), share
    else:
        stream, step = shuffled(image_set, seed, start_images), batch_size
    with ThreadPoolExecutor(max(1, num_workers)) as pool:

        def batch_at(start: int) -> tuple[Tensor, Tensor | None, Tensor, list[str]]:
            taken = list(itertools.islice(stream, step))
            taken = taken if step == share else taken[rows]
            decoded = list(pool.map(functools.partial(_decode, image_set), taken))
            images, labels, bad = _replaced(image_set, decoded, taken)
            positions = torch.arange(start + rows.start, start + rows.stop)
            if flip:
                drawn = [np.random.default_rng([seed, position, 2]).random() < 0.5 for position in positions.tolist()]
                images = torch.where(torch.tensor(drawn)[:, None, None, None], images.flip(-1), images)
            return images.pin_memory() if pin_memory else images, labels, positions, bad

        batches = map(batch_at, itertools.count(start_images, batch_size))
        for images, labels, positions, bad in ahead(batches, READ_AHEAD) if num_workers else batches:
            image_set.bad_images.extend(name for name in dict.fromkeys(bad) if name not in image_set.bad_images)
            check_bad_images(image_set.bad_images, image_set.max_bad_images, image_set.name)
            yield images, labels, positions


def _decode(image_set: IterableImageSet, row: dict[str, Any]) -> np.ndarray | BadImage:
    cell = row[image_set.image_column]
    try:
        return decode_cell(cell, f"image {fingerprint(cell)[:8]} of the stream", image_set.size, image_set.channels)
    except BadImage as error:
        return error


def _replaced(
    image_set: IterableImageSet, decoded: list[np.ndarray | BadImage], rows: list[dict[str, Any]]
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Images and labels, in which the readable image before (at first: after) it stands for an unreadable one."""
    bad = [str(image) for image in decoded if isinstance(image, BadImage)]
    pairs = list(zip(decoded, rows, strict=True))
    good = [pair for pair in pairs if not isinstance(pair[0], BadImage)]
    if not good:
        raise UserError(f"{image_set.name}: none of {len(bad)} images in a row can be read: {', '.join(bad[:5])} ...")
    last, kept = good[0], []
    for pair in pairs:
        last = last if isinstance(pair[0], BadImage) else pair
        kept.append(last)
    labels = torch.tensor([row[image_set.labels] for _, row in kept]) if image_set.labels else None
    return torch.from_numpy(np.stack([image for image, _ in kept])), labels, bad
