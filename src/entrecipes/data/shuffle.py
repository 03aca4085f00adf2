"""The order in which a stream is read: by whom, shuffled how, and from where a run goes on.

Where the number of shards can be divided by the number of processes, process r of w reads the shards r, r + w, ... and
no other. It passes from one of its epochs to the next on its own: shards of unequal length hold nobody up, and no image
comes twice in an epoch of its process. Otherwise every process reads all shards, and decodes its share of each batch.
So in the first case the order depends on the number of processes, in the second it does not.

Epoch e of a process is its shards in an order drawn from (seed, e), of which each `shuffle_buffer` successive rows are
shuffled among themselves, from (seed, e, their number). Every position can be found again from the images seen alone:
a checkpoint holds nothing of the stream. (The shuffle buffer of `datasets` can't be restored; blocks need not be.)
A resumed run passes over the shards before its position without opening them where their lengths are known: each is
noted under `streams/` when it was first read to its end. Otherwise this epoch's rows are read again, not decoded.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrecipes.data.places import home
from entrecipes.errors import UserError

if TYPE_CHECKING:
    from entrecipes.data.stream import IterableImageSet

Row = dict[str, Any]


def splits(image_set: IterableImageSet, world_size: int) -> bool:
    """Whether each process reads shards of its own."""
    return world_size > 1 and len(image_set.parts) % world_size == 0


def shuffled(image_set: IterableImageSet, seed: int, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
    """Endless undecoded rows of the parts rank, rank + world_size, ..., from position `start` of theirs on."""
    lengths = _Lengths(home() / "streams" / image_set.fingerprint)
    stream = _Stream(image_set, [seed, rank, world_size], range(rank, len(image_set.parts), world_size), lengths)
    return itertools.chain.from_iterable(ahead(stream.blocks(start), 1))


def ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, fetched up to `depth` ahead by one thread."""
    reader = ThreadPoolExecutor(1)
    try:
        waiting = collections.deque(reader.submit(next, items) for _ in range(depth))
        while True:
            yield waiting.popleft().result()
            waiting.append(reader.submit(next, items))
    finally:
        reader.shutdown(cancel_futures=True)


@dataclass
class _Lengths:
    """Rows of the parts that were read to their end, by this process or by any before; one small file each."""

    folder: Path
    known: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder.is_dir():
            self.known = {
                int(path.name): int(path.read_text()) for path in self.folder.iterdir() if path.name.isdigit()
            }

    def learn(self, part: int, length: int) -> None:
        if self.known.get(part) == length:
            return
        self.known[part] = length
        with contextlib.suppress(OSError):  # a full disk: known to this process at least
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=self.folder)
            with os.fdopen(handle, "w") as file:
                file.write(str(length))
            os.replace(name, self.folder / str(part))


@dataclass
class _Stream:
    """The parts that one process reads, over and over."""

    image_set: IterableImageSet
    seed: list[int]
    parts: range
    lengths: _Lengths

    @property
    def total(self) -> int | None:
        """Rows of an epoch; None while a part's length isn't known."""
        found = [self.lengths.known.get(part) for part in self.parts]
        return None if None in found else sum(found)

    def blocks(self, start: int) -> Iterator[list[Row]]:
        """Shuffled blocks of rows, without end; the first begins at position `start`."""
        epoch, offset = 0, start
        while True:
            if self.total:
                epoch, offset = epoch + offset // self.total, offset % self.total
            yield from self._epoch(epoch, offset)
            if not self.total:  # by now all parts were read to their ends
                name = self.image_set.name
                raise UserError(f"{name}: the stream has no images left to train on; lower data.held_out.")
            epoch, offset = epoch + 1, max(0, offset - self.total)

    def _epoch(self, epoch: int, offset: int) -> Iterator[list[Row]]:
        """The blocks of an epoch from a position on."""
        size = self.image_set.shuffle_buffer
        block, offset = divmod(offset, size)
        rows = self._rows(epoch, block * size)
        while part := list(itertools.islice(rows, size)):
            order = np.random.default_rng([*self.seed, epoch, block]).permutation(len(part))
            yield [part[index] for index in order[offset:]]
            block, offset = block + 1, 0

    def _rows(self, epoch: int, skip: int) -> Iterator[Row]:
        """The rows of an epoch without the first `skip`, not yet shuffled within blocks."""
        for part in np.random.default_rng([*self.seed, epoch]).permutation(self.parts).tolist():
            known = self.lengths.known.get(part)
            if known is not None and known <= skip:
                skip -= known
                continue
            read = 0
            for read, row in enumerate(self.image_set.read(part), 1):
                if read > skip:
                    yield row
            self.lengths.learn(part, read)
            skip = max(0, skip - read)
