"""Stickers as captioned clips: the embedded set, or a folder that scripts/prepare_stickers.py made."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy.stats import rankdata

from entrecipes.data.images import BadImage, ImageSet, Splits, check_bad_images, split_indices, why_unreadable
from entrecipes.data.key_frames import even_frames
from entrecipes.data.key_frames import motion as change
from entrecipes.data.prepared import facts
from entrecipes.data.sources.stickers import LICENSE
from entrecipes.data.tables import IN_MEMORY_BYTES
from entrecipes.errors import UserError, nearest
from entrecipes.fingerprint import fingerprint
from entrecipes.patterns import matches
from entrecipes.recipe.data import StickersData

logger = logging.getLogger(__name__)

EMBEDDED = "stickers"
FOLDER = Path(__file__).parent / "embedded_stickers"
KNOWN = ["id", "frames", "caption", "group", "base", "static", "motion"]
PREPARE = "scripts/prepare_stickers.py --size {size} --frames {frames} -o FOLDER"


@dataclass(frozen=True)
class Stickers:
    """An opened set: rows as sticker_preparation.FEATURES has them, images undecoded, and what was noted of them."""

    dataset: datasets.Dataset
    noted: dict[str, Any]
    place: str

    @property
    def name(self) -> str:
        """For logs and cards."""
        return self.noted["name"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What is known of each, without its image."""
        return self.dataset.select_columns(KNOWN).to_list()


@dataclass(frozen=True)
class StickerRows:
    """Stickers that stay on disk, decoded when asked for; see `images.Rows`."""

    dataset: datasets.Dataset
    size: int
    frames: int

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one clip."""
        return 3, self.frames, self.size, self.size

    def image(self, index: int, mirrored: bool = False) -> torch.Tensor:
        """uint8 [3, F, S, S]. Raises BadImage."""
        row = self.dataset[int(index)]
        try:
            clip = torch.from_numpy(read_clip(row, self.size, self.frames).transpose(3, 0, 1, 2))
        except Exception as error:  # Pillow's decoders have no common error
            raise BadImage(f"{row['id']} ({why_unreadable(error)})") from error
        return clip.flip(-1) if mirrored else clip.contiguous()

    def select(self, indices: Sequence[int]) -> StickerRows:
        """Only those, in that order."""
        return replace(self, dataset=self.dataset.select(indices))


def holds_stickers(name: str) -> bool:
    """Whether `name` is the embedded set, or a folder that scripts/prepare_stickers.py made."""
    return name == EMBEDDED or "animated" in (facts(Path(name).expanduser()) or {})


def open_stickers(name: str) -> Stickers:
    """The embedded set by its name, or a prepared folder. Raises UserError when it is neither, or damaged."""
    if name == EMBEDDED:
        return _embedded()
    folder = Path(name).expanduser()
    if not holds_stickers(name):
        raise UserError(
            f"data.name: '{name}' is neither 'stickers', the embedded set, nor a folder made by "
            "`scripts/prepare_stickers.py -o FOLDER`" + nearest(name, [EMBEDDED])
        )
    try:
        dataset = datasets.load_from_disk(str(folder)).cast_column("image", datasets.Image(decode=False))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it and make it again") from None
    return Stickers(dataset, facts(folder), f"the stickers in {folder}")


@cache
def _embedded() -> Stickers:
    dataset = datasets.Dataset(pq.read_table(FOLDER / "stickers.parquet").replace_schema_metadata())
    return Stickers(dataset, json.loads((FOLDER / "prepared.json").read_text()), "the embedded stickers")


def load(section: StickersData, *, image_size: int | None = None) -> Splits:
    """The stickers, moving ones before their padding whole, split so that no drawing is on both sides.

    `section.held_out` of the drawings that move (by `base`: a drawing in all skin tones, of a man and of a woman) are
    held out, drawn by `split_seed`; their stills are left out of both sides. Held-out stickers all move.

    Args:
        image_size: Side of the frames where `section.image_size` is null; the set's own where both are.

    Returns:
        Sets of uint8 [N, 3, F, S, S] (a still: its frame F times), with `captions`, `lengths` (F or 1), `motion`. They
        are in memory where `section.on_device` says so. Those that stay on disk are ranked by the motion that was noted
        when they were prepared, over all key frames, and unreadable ones are found when they are met.

    Raises:
        UserError: No such set, larger or longer clips than it has, no such group, more unreadable than
            `section.max_bad_clips`.
    """
    whole = open_stickers(section.name)
    size = section.image_size or image_size or whole.noted["options"]["size"]
    _check_extent(whole, size, section.frames)
    train, held_out = _split(whole, _chosen(whole, section), section)
    bad: list[str] = []
    train_set = _image_set(whole, train, size, section, bad)
    held_out_set = _image_set(whole, held_out, size, section, bad) if held_out else None
    check_bad_images(bad, section.max_bad_clips, whole.place, what="bad clips", key="max_bad_clips")
    if bad:
        logger.warning("%d bad clips are left out: %s", len(bad), "; ".join(bad[:20]) + "; ..." * (len(bad) > 20))
    return Splits(replace(train_set, bad_images=bad), held_out_set)


def _check_extent(whole: Stickers, size: int, frames: int) -> None:
    own = whole.noted["options"]
    advice = PREPARE.format(size=max(size, own["size"]), frames=max(frames, own["frames"]))
    if size > own["size"]:
        raise UserError(
            f"data.image_size: {size}, but {whole.place} are {own['size']} px: make a larger set with "
            f"`{advice}` and set data.name: FOLDER"
        )
    if frames > own["frames"]:
        raise UserError(
            f"data.frames: {frames}, but {whole.place} have {own['frames']}: make a longer set with "
            f"`{advice}` and set data.name: FOLDER"
        )


def _chosen(whole: Stickers, section: StickersData) -> list[int]:
    """The numbers of the rows of the groups asked for, at most `max_images` of them."""
    groups = sorted({row["group"] for row in whole.rows})
    for pattern in section.groups:
        if not any(matches(group, [pattern]) for group in groups):
            raise UserError(
                f"data.groups: {whole.place} have no group '{pattern}'{nearest(pattern, groups) or '.'} "
                f"There are: {', '.join(groups)}"
            )
    wanted = {group for group in groups if matches(group, section.groups)}
    rows = [number for number, row in enumerate(whole.rows) if row["group"] in wanted]
    rows = [number for number in rows if section.static or not whole.rows[number]["static"]]
    order = np.random.default_rng(section.split_seed).permutation(len(rows))[: section.max_images]
    return [rows[i] for i in np.sort(order)]


def _split(whole: Stickers, chosen: list[int], section: StickersData) -> tuple[list[int], list[int]]:
    """Numbers of the rows (to train on, held out)."""
    rows = [(number, whole.rows[number]) for number in chosen]
    bases = sorted({row["base"] for _, row in rows if not row["static"]})
    if not bases:
        raise UserError(
            f"{whole.place}: none of the {len(rows)} stickers chosen moves; widen data.groups or data.max_images"
        )
    _, kept = split_indices(len(bases), section.held_out, section.split_seed, place=whole.place)
    kept = {bases[i] for i in kept}
    train = [number for number, row in rows if row["base"] not in kept]
    return train, [number for number, row in rows if row["base"] in kept and not row["static"]]


def _image_set(whole: Stickers, numbers: list[int], size: int, section: StickersData, bad: list[str]) -> ImageSet:
    """Those rows, decoded where they are to be in memory; names of unreadable ones are added to `bad`."""
    rows = StickerRows(whole.dataset.select(numbers), size, section.frames)
    lazy = len(rows) * math.prod(rows.shape) > IN_MEMORY_BYTES if section.on_device == "auto" else False
    if section.on_device == "never" or lazy:
        good, tensor = numbers, None
    else:
        good, tensor = _decoded(rows, numbers, bad)
        if not good:
            raise UserError(f"{whole.place}: none of {len(rows)} stickers can be read: {'; '.join(bad[:5])}")
    about = [whole.rows[number] for number in good]
    captions = [row["caption"] for row in about]
    lengths = torch.tensor([1 if row["static"] else section.frames for row in about])
    noted = None if tensor is not None else np.array([row["motion"] for row in about])
    content = tensor if tensor is not None else fingerprint(rows.dataset._fingerprint, rows.shape)
    return ImageSet(
        name=whole.name,
        source=whole.noted["source"],
        license=whole.noted["license"],
        tensor=tensor,
        rows=rows if tensor is None else None,
        captions=captions,
        lengths=lengths,
        motion=motion_ranks(tensor, lengths, noted),
        rendered=whole.noted["license"] == LICENSE,  # emoji; nobody knows what other sets show
        fingerprint=fingerprint(content, captions, lengths),
        max_bad_images=section.max_bad_clips,
        bad_key="max_bad_clips",
        num_workers=section.num_workers,
    )


def _decoded(rows: StickerRows, numbers: list[int], bad: list[str]) -> tuple[list[int], torch.Tensor]:
    """(the numbers of those that can be read, their frames); names of the others are added to `bad`."""
    clips, good = torch.empty((len(rows), *rows.shape), dtype=torch.uint8), []
    for index, number in enumerate(numbers):
        try:
            clips[len(good)] = rows.image(index)
            good.append(number)
        except BadImage as error:
            bad.append(str(error))
    return good, clips[: len(good)]


def read_clip(row: dict[str, Any], size: int, frames: int) -> np.ndarray:
    """uint8 [F, S, S, 3]: frames spread evenly over the strip; a still's frame over and over."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        strip = np.asarray(image.convert("RGB"))
    own = strip.shape[0]
    pictures = strip.reshape(own, row["frames"], own, 3).swapaxes(0, 1)
    pictures = pictures[[0] * frames if row["static"] else even_frames(row["frames"], frames)]
    if size == own:
        return pictures
    return np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BOX)) for p in pictures])


def motion_ranks(tensor: torch.Tensor | None, lengths: torch.Tensor, noted: np.ndarray | None = None) -> torch.Tensor:
    """How much each clip uint8 [N, 3, F, S, S] moves among the others: float [N], 0 for stills, 1 for the liveliest.

    Where `noted` gives the motions [N], the clips are not looked at.
    """
    moving = np.flatnonzero(lengths.numpy() > 1)
    changes = [change(tensor[i].numpy().swapaxes(0, 1)) for i in moving] if noted is None else noted[moving]
    ranks = torch.zeros(len(lengths))
    ranks[moving] = torch.from_numpy(rankdata(changes) / max(len(moving), 1)).float()
    return ranks
