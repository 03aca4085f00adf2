"""Stickers as captioned clips: the embedded set, or a folder that scripts/prepare_stickers.py made."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy.stats import rankdata

from entrecipes.data.images import ImageSet, Splits, check_bad_images, split_indices, why_unreadable
from entrecipes.data.key_frames import even_frames
from entrecipes.data.key_frames import motion as change
from entrecipes.data.prepared import facts
from entrecipes.data.sources.stickers import LICENSE
from entrecipes.errors import UserError, nearest
from entrecipes.fingerprint import fingerprint
from entrecipes.patterns import matches
from entrecipes.recipe.data import StickersData

logger = logging.getLogger(__name__)

EMBEDDED = "stickers"
FOLDER = Path(__file__).parent / "embedded_stickers"
PREPARE = "scripts/prepare_stickers.py --size {size} --frames {frames} -o FOLDER"


@dataclass(frozen=True)
class Stickers:
    """An opened set, not yet decoded: `rows` as sticker_preparation.FEATURES has them, and what was noted of them."""

    rows: list[dict[str, Any]]
    noted: dict[str, Any]
    place: str

    @property
    def name(self) -> str:
        """For logs and cards."""
        return self.noted["name"]


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
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder)).cast_column("image", datasets.Image(decode=False))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it and make it again") from None
    return Stickers(dataset.to_list(), facts(folder), f"the stickers in {folder}")


@cache
def _embedded() -> Stickers:
    table: pa.Table = pq.read_table(FOLDER / "stickers.parquet")
    return Stickers(table.to_pylist(), json.loads((FOLDER / "prepared.json").read_text()), "the embedded stickers")


def load(section: StickersData, *, image_size: int | None = None) -> Splits:
    """The stickers, moving ones before their padding whole, split so that no drawing is on both sides.

    `section.held_out` of the drawings that move (by `base`: a drawing in all skin tones, of a man and of a woman) are
    held out, drawn by `split_seed`; their stills are left out of both sides. Held-out stickers all move.

    Args:
        image_size: Side of the frames where `section.image_size` is null; the set's own where both are.

    Returns:
        Sets with `tensor` uint8 [N, 3, F, S, S] (a still: its frame F times), `captions`, `lengths` (F or 1), `motion`.

    Raises:
        UserError: No such set, larger or longer clips than it has, no such group, more unreadable than
            `section.max_bad_clips`.
    """
    whole = open_stickers(section.name)
    size = section.image_size or image_size or whole.noted["options"]["size"]
    _check_extent(whole, size, section.frames)
    rows = _chosen(whole, section)
    train, held_out = _split(rows, section, whole.place)
    bad: list[str] = []
    train_set = _image_set(whole, [rows[i] for i in train], size, section.frames, bad)
    held_out_set = _image_set(whole, [rows[i] for i in held_out], size, section.frames, bad) if held_out else None
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


def _chosen(whole: Stickers, section: StickersData) -> list[dict[str, Any]]:
    """The rows of the groups asked for, at most `max_images` of them."""
    groups = sorted({row["group"] for row in whole.rows})
    for pattern in section.groups:
        if not any(matches(group, [pattern]) for group in groups):
            raise UserError(
                f"data.groups: {whole.place} have no group '{pattern}'{nearest(pattern, groups) or '.'} "
                f"There are: {', '.join(groups)}"
            )
    rows = [row for row in whole.rows if matches(row["group"], section.groups)]
    rows = [row for row in rows if section.static or not row["static"]]
    order = np.random.default_rng(section.split_seed).permutation(len(rows))[: section.max_images]
    return [rows[i] for i in np.sort(order)]


def _split(rows: list[dict[str, Any]], section: StickersData, place: str) -> tuple[list[int], list[int]]:
    """Positions (to train on, held out)."""
    bases = sorted({row["base"] for row in rows if not row["static"]})
    if not bases:
        raise UserError(f"{place}: none of the {len(rows)} stickers chosen moves; widen data.groups or data.max_images")
    _, kept = split_indices(len(bases), section.held_out, section.split_seed, place=place)
    kept = {bases[i] for i in kept}
    train = [i for i, row in enumerate(rows) if row["base"] not in kept]
    return train, [i for i, row in enumerate(rows) if row["base"] in kept and not row["static"]]


def _image_set(whole: Stickers, rows: list[dict[str, Any]], size: int, frames: int, bad: list[str]) -> ImageSet:
    """Decode the film strips; names of unreadable ones are added to `bad`."""
    clips, good = np.empty((len(rows), 3, frames, size, size), np.uint8), []
    for row in rows:
        try:
            clips[len(good)] = read_clip(row, size, frames).transpose(3, 0, 1, 2)
            good.append(row)
        except Exception as error:  # Pillow's decoders have no common error
            bad.append(f"{row['id']} ({why_unreadable(error)})")
    if not good:
        raise UserError(f"{whole.place}: none of {len(rows)} stickers can be read: {'; '.join(bad[:5])}")
    tensor = torch.from_numpy(clips[: len(good)])
    captions = [row["caption"] for row in good]
    lengths = torch.tensor([1 if row["static"] else frames for row in good])
    return ImageSet(
        name=whole.name,
        source=whole.noted["source"],
        license=whole.noted["license"],
        tensor=tensor,
        captions=captions,
        lengths=lengths,
        motion=motion_ranks(tensor, lengths),
        rendered=whole.noted["license"] == LICENSE,  # emoji; nobody knows what other sets show
        fingerprint=fingerprint(tensor, captions, lengths),
    )


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


def motion_ranks(tensor: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """How much each clip uint8 [N, 3, F, S, S] moves among the others: float [N], 0 for stills, 1 for the liveliest."""
    moving = np.flatnonzero(lengths.numpy() > 1)
    changes = [change(tensor[i].numpy().swapaxes(0, 1)) for i in moving]
    ranks = torch.zeros(len(tensor))
    ranks[moving] = torch.from_numpy(rankdata(changes) / max(len(moving), 1)).float()
    return ranks
