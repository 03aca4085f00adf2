"""Images read from the Hub while training, without downloading the set first."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from entrecipes.data.images import BadImage, ImageSet, Splits, check_bad_images, decode_cell
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
    """An image set that can only be read from front to back, for the loader.

    Epoch e is the stream shuffled by `datasets` through a buffer, from (seed, e). Positions count rows of that stream,
    so a run resumes at the same row: the stream is replayed up to it, without decoding, as fast as it can be read.
    Every process reads the whole stream and decodes its own part. What makes this approximate: an unreadable image is
    replaced by a readable one of its batch, and another version of `datasets` may shuffle in another way.

    Attributes:
        labels: The label column, or None without classes (a stream's labels aren't known beforehand).
        count: Images in an epoch; None when the Hub does not tell.
        Others as in ImageSet.
    """

    name: str
    source: str
    license: str
    fingerprint: str
    rows: datasets.IterableDataset
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
    if section.max_images is not None:
        stream, count = stream.take(section.max_images), min(count or section.max_images, section.max_images)
    held_out, skipped = None, 0
    if section.held_out_split is not None:
        held_out = _materialise(table.held_out.take(MAX_HELD_OUT))
    elif section.held_out:
        skipped = min(MAX_HELD_OUT, max(1, round(section.held_out * count)) if count else MAX_HELD_OUT)
        held_out = _materialise(stream.take(skipped))
    train = IterableImageSet(
        name=table.name,
        source=table.source,
        license=table.license,
        fingerprint=fingerprint(section.id, section.config, section.split, section.revision, image_size, channels),
        rows=stream.skip(skipped).cast_column(table.image_column, datasets.Image(decode=False)),
        image_column=table.image_column,
        size=image_size,
        channels=channels,
        shuffle_buffer=section.shuffle_buffer,
        max_bad_images=section.max_bad_images,
        label_names=names,
        labels=section.label_column,
        count=None if count is None else count - skipped,
    )
    return Splits(train, held_out and _kept(table, held_out, section, image_size, channels))


def _materialise(stream: datasets.IterableDataset) -> datasets.Dataset:
    images = [name for name, feature in stream.features.items() if isinstance(feature, datasets.Image)]
    encoded = stream
    for name in images:
        encoded = encoded.cast_column(name, datasets.Image(decode=False))
    return datasets.Dataset.from_list(list(encoded), features=stream.features)


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
    rows: slice,
    flip: bool,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(images uint8 [n, C, H, W], labels int64 [n] or None, positions int64 [n]) of `rows` of each global batch; CPU.

    With `num_workers` above 0, as many threads decode, and reading runs some batches ahead. Threads, for a `datasets`
    stream shuffles in another way inside a DataLoader's worker than outside.
    """
    stream = _rows(image_set, seed, start_images)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:

        def batch_at(start: int) -> tuple[Tensor, Tensor | None, Tensor, list[str]]:
            share = list(itertools.islice(stream, batch_size))[rows]
            decoded = list(pool.map(functools.partial(_decode, image_set), share))
            images, labels, bad = _replaced(image_set, decoded, share)
            positions = torch.arange(start + rows.start, start + rows.stop)
            if flip:
                drawn = [np.random.default_rng([seed, position, 2]).random() < 0.5 for position in positions.tolist()]
                images = torch.where(torch.tensor(drawn)[:, None, None, None], images.flip(-1), images)
            return images.pin_memory() if pin_memory else images, labels, positions, bad

        batches = map(batch_at, itertools.count(start_images, batch_size))
        for images, labels, positions, bad in _ahead(batches, READ_AHEAD) if num_workers else batches:
            image_set.bad_images.extend(name for name in dict.fromkeys(bad) if name not in image_set.bad_images)
            check_bad_images(image_set.bad_images, image_set.max_bad_images, image_set.name)
            yield images, labels, positions


def _rows(image_set: IterableImageSet, seed: int, start: int) -> Iterator[dict[str, Any]]:
    """Endless undecoded rows from position `start` on."""
    rows = image_set.rows.shuffle(seed=seed, buffer_size=image_set.shuffle_buffer)
    epoch, offset = divmod(start, image_set.count) if image_set.count else (0, start)
    for number in itertools.count(epoch):
        rows.set_epoch(number)
        read = 0
        for read, row in enumerate(rows, 1):
            if read > offset:
                yield row
        if not read:
            raise UserError(f"{image_set.name}: the stream has no images left to train on; lower data.held_out.")
        offset = max(0, offset - read)


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


def _ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, fetched up to `depth` ahead by one thread."""
    reader = ThreadPoolExecutor(1)
    try:
        waiting = collections.deque(reader.submit(next, items) for _ in range(depth))
        while True:
            yield waiting.popleft().result()
            waiting.append(reader.submit(next, items))
    finally:
        reader.shutdown(cancel_futures=True)
