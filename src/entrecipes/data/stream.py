"""Images read from the Hub while training, without downloading the set first."""

from __future__ import annotations

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
from torch.utils.data import DataLoader, IterableDataset

from entrecipes.data.images import BadImage, ImageSet, Splits, check_bad_images, decode_cell, fingerprint
from entrecipes.data.tables import Table, open_table, require_columns
from entrecipes.errors import UserError
from entrecipes.recipe.data import HubData

MAX_HELD_OUT = 1000
"""Images held out of a stream at most: they are downloaded before training starts."""
DECODING_THREADS = 8


@dataclass
class IterableImageSet:
    """An image set that can only be read from front to back, for the loader.

    Epoch e is the stream shuffled by `datasets` through a buffer, from (seed, e). Positions count rows of that stream,
    so a run resumes at the same row: the stream is replayed up to it, without decoding, as fast as it can be read.
    Every process reads the whole stream and decodes its own part. What makes this approximate: an unreadable image is
    replaced by the last readable one of the process, and another version of `datasets` may shuffle in another way.

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


@dataclass
class _StreamedBatches(IterableDataset):
    """Decoded batches of one process, from a position on; lives in the reading process."""

    image_set: IterableImageSet
    seed: int
    batch_size: int
    start: int
    part: slice
    flip: bool

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Endless undecoded rows from position `start` on."""
        rows = self.image_set.rows.shuffle(seed=self.seed, buffer_size=self.image_set.shuffle_buffer)
        epoch, offset = divmod(self.start, self.image_set.count) if self.image_set.count else (0, self.start)
        for number in itertools.count(epoch):
            rows.set_epoch(number)
            read = 0
            for read, row in enumerate(rows, 1):
                if read > offset:
                    yield row
            if not read:
                raise UserError(f"{self.image_set.name}: the stream has no images left to train on.")
            offset = max(0, offset - read)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, list[str]]]:
        rows, last = self._rows(), None
        size, channels, column = self.image_set.size, self.image_set.channels, self.image_set.image_column
        decode = functools.partial(_decoded, size=size, channels=channels, column=column)
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for start in itertools.count(self.start, self.batch_size):
                batch = list(itertools.islice(rows, self.batch_size))[self.part]
                positions = torch.arange(start + self.part.start, start + self.part.stop)
                decoded, bad = list(pool.map(decode, batch)), []
                images, labels = [], []
                pairs = list(zip(decoded, batch, strict=True))
                good = (pair for pair in pairs if not isinstance(pair[0], BadImage))
                last = last or next(good, (np.zeros((channels, size, size), np.uint8), batch[0]))
                for image, row in pairs:
                    if isinstance(image, BadImage):
                        bad.append(str(image))
                        image, row = last
                    last = image, row
                    images.append(image)
                    labels.append(row[self.image_set.labels] if self.image_set.labels else -1)
                stacked = torch.from_numpy(np.stack(images))
                if self.flip:
                    drawn = [np.random.default_rng([self.seed, position, 2]).random() < 0.5 for position in positions]
                    stacked = torch.where(torch.tensor(drawn)[:, None, None, None], stacked.flip(-1), stacked)
                yield stacked, torch.tensor(labels) if self.image_set.labels else None, positions, bad


def _decoded(row: dict[str, Any], *, column: str, size: int, channels: int) -> np.ndarray | BadImage:
    try:
        return decode_cell(row[column], f"image {fingerprint(row[column])[:8]} of the stream", size, channels)
    except BadImage as error:
        return error


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

    With `num_workers` above 0, one process reads and decodes ahead (more would change the order).
    """
    loader = DataLoader(
        _StreamedBatches(image_set, seed, batch_size, start_images, rows, flip),
        batch_size=None,
        num_workers=min(1, num_workers),
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),
    )
    for images, labels, positions, bad in loader:
        image_set.bad_images.extend(name for name in dict.fromkeys(bad) if name not in image_set.bad_images)
        check_bad_images(image_set.bad_images, image_set.max_bad_images, image_set.name)
        yield images, labels, positions
