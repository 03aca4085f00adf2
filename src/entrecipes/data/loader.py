"""Batches that can start at any image: what is drawn is a function of (seed, position), not of how the run got there.

The positions 0, 1, 2, ... of a run are the concatenated epochs; epoch e is a permutation of the set drawn from (seed,
e) alone. A global batch that starts at image n takes positions n .. n + batch_size - 1, across epochs where need be,
and process r of w takes the r-th of w equal, contiguous parts. So a resumed run, also with another batch size or number
of processes, goes through the same images in the same order. Streams have an order of their own: see `data.shuffle`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from entrecipes.data.images import BadImage, ImageSet, Rows
from entrecipes.data.shards import LazyTensor
from entrecipes.data.stream import IterableImageSet, stream_batches
from entrecipes.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch, on the training device."""

    images: Tensor
    """uint8 [n, C, H, W]; for latent sets float [n, 2C, h, w]."""
    labels: Tensor | None
    """int64 [n], or None."""
    indices: Tensor
    """int64 [n]: which images of the set these are (after a bad image: the ones asked for)."""
    lengths: Tensor | None = None
    """Stickers only, as the next two: frames before the padding, int64 [n]."""
    motion: Tensor | None = None
    """Rank of the motion, float [n]."""
    text: Tensor | None = None
    """Embedded captions, float16 [n, T, D]."""


def batches(
    image_set: ImageSet | IterableImageSet,
    *,
    seed: int,
    batch_size: int,
    start_images: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    flip: bool = False,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Endless batches from position `start_images` on.

    Sets in memory are moved to `device` once and indexed there, without host synchronisation; others are decoded by
    `num_workers` processes that read ahead (0: in this process). The global random state is not touched.

    Args:
        batch_size: Images over all processes.
        flip: Mirror each image with probability one half, drawn from (seed, position).

    Raises:
        UserError: When `world_size` does not divide `batch_size`; while iterating, when too many images are unreadable.
    """
    if batch_size % world_size:
        raise UserError(
            f"training.batch_size: {batch_size} images can't be shared evenly by {world_size} processes; "
            f"take a multiple of {world_size}."
        )
    device = torch.device(device)
    share = batch_size // world_size
    if isinstance(image_set, IterableImageSet):
        parts = stream_batches(
            image_set,
            seed=seed,
            batch_size=batch_size,
            start_images=start_images,
            rank=rank,
            world_size=world_size,
            flip=flip,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
        )
        return (Batch(*_move(part, device)) for part in parts)
    starts = _Starts(start_images + rank * share, batch_size)
    if image_set.rows is None:
        return _from_memory(image_set, Order(len(image_set), seed, device), starts, share, flip)
    return _from_files(image_set, Order(len(image_set), seed), starts, share, flip, num_workers, device)


class Order:
    """Which image, and whether mirrored, at each position; one epoch is held at a time (8 + 1 bytes an image)."""

    def __init__(self, count: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.count, self.seed, self.device = count, seed, torch.device(device)
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def epoch(self, number: int) -> tuple[Tensor, Tensor]:
        """(permutation int64 [N], mirrored bool [N]) of an epoch, on the device."""
        if number not in self._epochs:
            permutation = np.random.default_rng([self.seed, number, 0]).permutation(self.count)
            mirrored = np.random.default_rng([self.seed, number, 1]).random(self.count) < 0.5
            self._epochs = {old: self._epochs[old] for old in self._epochs if old == number - 1}
            parts = (torch.from_numpy(part) for part in (permutation, mirrored))
            if self.device.type == "cuda":  # pinned, so that the copy does not wait for the device
                parts = (part.pin_memory() for part in parts)
            self._epochs[number] = tuple(part.to(self.device, non_blocking=True) for part in parts)
        return self._epochs[number]

    def at(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """(indices int64 [count], mirrored bool [count]) at positions start .. start + count - 1."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.count)
            taken = min(count, self.count - offset)
            parts.append([values[offset : offset + taken] for values in self.epoch(epoch)])
            start, count = start + taken, count - taken
        return tuple(values[0] if len(parts) == 1 else torch.cat(values) for values in zip(*parts, strict=True))


@dataclass(frozen=True)
class _Starts:
    """start, start + step, start + 2 step, ..."""

    start: int
    step: int

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield position
            position += self.step


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images [n, C, H, W] with those turned left to right that `mirrored` [n] says."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def _from_memory(image_set: ImageSet, order: Order, starts: _Starts, share: int, flip: bool) -> Iterator[Batch]:
    if flip and image_set.mirrored is None and image_set.tensor.is_floating_point():
        raise ValueError("latents can't be mirrored: cache them with flip=True")
    images = image_set.tensor.to(order.device)
    flipped = image_set.mirrored.to(order.device) if flip and image_set.mirrored is not None else None
    beside = {name: value.to(order.device) for name, value in _beside(image_set).items() if isinstance(value, Tensor)}
    lazy = {name: value for name, value in _beside(image_set).items() if name not in beside}
    on_host = Order(len(image_set), order.seed) if lazy else None
    for start in starts:
        indices, mirrored = order.at(start, share)
        batch = images.index_select(0, indices)
        if flipped is not None:
            batch = torch.where(mirrored[:, None, None, None], flipped.index_select(0, indices), batch)
        elif flip:
            batch = mirror(batch, mirrored)
        chosen = {name: values.index_select(0, indices) for name, values in beside.items()}
        for name, values in lazy.items():  # rows on disk are asked for without waiting for the device
            chosen[name] = values[on_host.at(start, share)[0]].to(order.device, non_blocking=True)
        yield Batch(batch, **({"labels": None} | chosen), indices=indices)


def _beside(image_set: ImageSet) -> dict[str, Tensor | LazyTensor]:
    """What a batch carries beside the images."""
    names = ("labels", "lengths", "motion", "text")
    return {name: value for name in names if (value := getattr(image_set, name)) is not None}


@dataclass(frozen=True)
class _BatchPlan:
    """Sampler of a DataLoader: the indices and mirrorings of one share after the other."""

    order: Order
    starts: _Starts
    share: int
    flip: bool

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for start in self.starts:
            indices, mirrored = self.order.at(start, self.share)
            yield list(zip(indices.tolist(), (mirrored & self.flip).tolist(), strict=True))


@dataclass(frozen=True)
class _ReadRows(Dataset):
    """Reads in a worker. An unreadable image is replaced by the next readable one and reported by name: only the main
    process sees all workers' reports, so it is the one that counts."""

    rows: Rows
    max_bad_images: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, drawn: tuple[int, bool]) -> tuple[Tensor, int, int, list[str]]:
        index, mirrored = drawn
        bad: list[str] = []
        image, used = torch.zeros(self.rows.shape, dtype=torch.uint8), index
        for step in range(min(self.max_bad_images + 1, len(self.rows))):
            used = (index + step) % len(self.rows)
            try:
                image = self.rows.image(used, mirrored)
                break
            except BadImage as error:
                bad.append(str(error))
        return image, used, index, bad


def _collate(samples: list[tuple]) -> tuple[list[Tensor], list[str]]:
    return default_collate([sample[:-1] for sample in samples]), [name for sample in samples for name in sample[-1]]


def _from_files(
    image_set: ImageSet, order: Order, starts: _Starts, share: int, flip: bool, num_workers: int, device: torch.device
) -> Iterator[Batch]:
    loader = DataLoader(
        _ReadRows(image_set.rows, image_set.max_bad_images),
        batch_sampler=_BatchPlan(order, starts, share, flip),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # its own: by default a DataLoader draws from the global random state
    )
    for (images, used, indices), bad in loader:
        image_set.check_bad(bad)
        beside = {name: values[used] for name, values in _beside(image_set).items()}
        images, indices, *values = _move((images, indices, *beside.values()), device)
        yield Batch(images, **({"labels": None} | dict(zip(beside, values, strict=True))), indices=indices)


def _move(tensors: tuple[Tensor | None, ...], device: torch.device) -> list[Tensor | None]:
    """To the device, without waiting where the memory is pinned."""
    return [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors]
