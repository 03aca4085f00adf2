"""From a `datasets` table with an image column to the image sets of a run: columns, labels, split, decoding, cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from entrecipes.data.images import (
    BadImage,
    ImageRows,
    ImageSet,
    Splits,
    check_bad_images,
    decode_cell,
    split_indices,
)
from entrecipes.data.places import atomic_folder, home
from entrecipes.errors import UserError, nearest
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import DecodedImageData

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 2 * 2**30
"""Sets up to this many bytes of uint8 pixels are decoded up front."""
TRANSFORM_VERSION = 1
"""Raise it when `fit_image` changes what comes out, so that caches are made anew."""
CHUNK = 256


@dataclass(frozen=True)
class Table:
    """An opened data set, not yet split or decoded.

    `dataset` has one row an image; `held_out` is a part to hold out as it is, in place of a share of `dataset`.
    """

    dataset: datasets.Dataset
    name: str
    source: str
    license: str
    place: str
    image_column: str = "image"
    held_out: datasets.Dataset | None = None


def require_columns(available: Iterable[str], wanted: dict[str, str | None], place: str) -> None:
    """Check `wanted` {recipe key: column, or None when not asked for} against a set's columns.

    Raises:
        UserError: Naming the key, the columns that there are, and the nearest of them.
    """
    available = list(available)
    for key, column in wanted.items():
        if column is not None and column not in available:
            hint = " (null trains without classes)" if key == "label_column" else ""
            raise UserError(
                f"data.{key}: {place} has no column '{column}'{nearest(column, available) or '.'} "
                f"Its columns: {', '.join(available)}. Set data.{key} to one of them{hint}."
            )


def open_table(table: Table, section: DecodedImageData, *, image_size: int, channels: int) -> Splits:
    """Split by `section.split_seed` (rows that share a `group` or a `video` stay together), decode what fits in memory.

    Raises:
        UserError: Missing columns, unusable labels, too few images, or more than `max_bad_images` unreadable ones.
    """
    label_column = getattr(section, "label_column", None)
    caption_column = getattr(section, "caption_column", None)
    wanted = {"image_column": table.image_column, "label_column": label_column, "caption_column": caption_column}
    parts = {"train": table.dataset} | ({} if table.held_out is None else {"held_out": table.held_out})
    for part in parts.values():
        require_columns(part.column_names, wanted, table.place)
        if not isinstance(part.features[table.image_column], datasets.Image):
            raise UserError(
                f"data.image_column: column '{table.image_column}' of {table.place} holds "
                f"{part.features[table.image_column]}, not images."
            )
    column = next((name for name in ("group", "video") if name in table.dataset.column_names), None)
    groups = table.dataset[column][:] if column else None
    share = 0 if table.held_out is not None else section.held_out
    train, kept = split_indices(
        len(table.dataset), share, section.split_seed, groups=groups, max_images=section.max_images, place=table.place
    )
    chosen = {"train": parts["train"].select(train)}
    if kept or table.held_out is not None:
        chosen["held_out"] = table.held_out if table.held_out is not None else parts["train"].select(kept)
    names = label_names(parts.values(), label_column, table.place) if label_column else None
    opened = {
        part: _image_set(table, dataset, section, names, image_size=image_size, channels=channels)
        for part, dataset in chosen.items()
    }
    return Splits(opened["train"], opened.get("held_out"))


def label_names(parts: Iterable[datasets.Dataset], column: str, place: str) -> tuple[str, ...]:
    """Class names: those of a ClassLabel, else the sorted distinct values (whole numbers or texts) of the column.

    Raises:
        UserError: When rows lack a label, or the column holds something else.
    """
    parts = list(parts)
    feature = parts[0].features[column]
    values = [value for part in parts for value in part[column][:]]
    missing = sum(value is None or (isinstance(feature, datasets.ClassLabel) and value < 0) for value in values)
    if missing:
        raise UserError(
            f"data.label_column: {missing} of {len(values)} images of {place} have no '{column}'. Label or remove "
            f"them, or set data.label_column: null to train without classes."
        )
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(
            f"data.label_column: column '{column}' of {place} holds {feature}; classes are whole numbers or texts."
        )
    return tuple(str(value) for value in sorted(set(values)))


def labels_of(dataset: datasets.Dataset, column: str, names: tuple[str, ...]) -> Tensor:
    """The column as positions in `names`, int64 [N]."""
    values = dataset[column][:]
    if not isinstance(dataset.features[column], datasets.ClassLabel):
        position = {name: index for index, name in enumerate(names)}
        values = [position[str(value)] for value in values]
    return torch.tensor(values, dtype=torch.int64)


def _captions(dataset: datasets.Dataset, column: str, place: str) -> list[str]:
    captions = ["" if caption is None else caption for caption in dataset[column][:]]
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"data.caption_column: '{column}' of {place} holds {dataset.features[column]}, not texts.")
    return captions


def _image_set(
    table: Table,
    dataset: datasets.Dataset,
    section: DecodedImageData,
    names: tuple[str, ...] | None,
    *,
    image_size: int,
    channels: int,
) -> ImageSet:
    """One part as an image set: in memory when it fits (or must), else decoded on demand."""
    column = table.image_column
    pixels = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    rows = ImageRows(pixels, column, image_size, channels)
    caption_column = getattr(section, "caption_column", None)
    whole = ImageSet(
        name=table.name,
        source=table.source,
        license=table.license,
        label_names=names,
        labels=None if names is None else labels_of(dataset, section.label_column, names),
        captions=None if caption_column is None else _captions(dataset, caption_column, table.place),
        rows=rows,
        fingerprint=fingerprint(TRANSFORM_VERSION, dataset._fingerprint, column, image_size, channels),
        max_bad_images=section.max_bad_images,
        num_workers=section.num_workers,
    )
    size = len(dataset) * channels * image_size**2
    if section.on_device == "never" or (section.on_device == "auto" and size > IN_MEMORY_BYTES):
        return whole
    return in_memory(whole, table.place)


def in_memory(lazy: ImageSet, place: str) -> ImageSet:
    """Decode a lazy set into one uint8 tensor, or take it from the cache where an earlier run left it.

    Raises:
        UserError: When more than `lazy.max_bad_images` images can't be read.
    """
    folder = home() / "images" / lazy.fingerprint
    cached = _read_cache(folder)
    if cached is None:
        pixels, bad = decode_all(lazy.rows, lazy.max_bad_images, place)
        content = fingerprint(pixels)
        with atomic_folder(folder, keep_existing=True) as scratch:
            np.save(scratch / "images.npy", pixels)
            (scratch / "info.json").write_text(json.dumps({"bad": list(bad.items()), "content": content}))
        logger.info("decoded %d images of %s, kept at %s", len(pixels), lazy.name, folder)
    else:
        pixels, bad, content = cached
        logger.info("took %d decoded images of %s from %s", len(pixels), lazy.name, folder)
    check_bad_images(list(bad.values()), lazy.max_bad_images, place)
    good = [index for index in range(len(lazy)) if index not in bad] if bad else range(len(lazy))
    kept = lazy if not bad else lazy.subset(good)
    kept.rows, kept.tensor, kept.bad_images = None, torch.from_numpy(pixels), list(bad.values())
    kept.fingerprint = fingerprint(content, kept.labels, kept.captions)
    return kept


def decode_all(rows: ImageRows, limit: int, place: str) -> tuple[np.ndarray, dict[int, str]]:
    """(uint8 [N - bad, C, H, W], {row: name and reason of each unreadable image}). Raises UserError past `limit`."""
    pixels = np.empty((len(rows), rows.channels, rows.size, rows.size), np.uint8)
    bad: dict[int, str] = {}
    count = 0

    def decode(numbered: tuple[int, dict]) -> np.ndarray | BadImage:
        try:
            return decode_cell(numbered[1], f"row {numbered[0]}", rows.size, rows.channels)
        except BadImage as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), CHUNK):
            cells = rows.dataset[start : start + CHUNK][rows.column]
            for offset, result in enumerate(pool.map(decode, enumerate(cells, start))):
                if isinstance(result, BadImage):
                    bad[start + offset] = str(result)
                else:
                    pixels[count] = result
                    count += 1
            check_bad_images(list(bad.values()), limit, place)
    if not count:
        raise UserError(f"{place}: none of the {len(rows)} images can be read.")
    return pixels[:count], bad


def _read_cache(folder: Path) -> tuple[np.ndarray, dict[int, str], str] | None:
    """What an earlier run decoded; a damaged cache is removed and counts as none."""
    if not folder.exists():
        return None
    try:
        info = json.loads((folder / "info.json").read_text())
        return np.load(folder / "images.npy"), {index: name for index, name in info["bad"]}, info["content"]
    except (OSError, ValueError, KeyError):
        logger.warning("the cache %s is damaged and made anew", folder)
        shutil.rmtree(folder, ignore_errors=True)
        return None
