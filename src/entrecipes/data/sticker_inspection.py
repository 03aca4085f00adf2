"""A look at a set of stickers before training on it: counts by group, motion, film strips, a page that moves."""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

from entrecipes.data.images import why_unreadable
from entrecipes.data.stickers import open_stickers, read_clip
from entrecipes.errors import UserError
from entrecipes.models.sticker_io import save_animation

SIZE = 64
"""Side, in pixels, at which a sticker is shown at least."""
WIDTH = 112
"""Of a cell of the moving page."""
LINE = 11
LINES = 4
FPS = 4
"""Of the moving page: key frames are far apart."""


@dataclass(frozen=True)
class StickerInspection:
    """What can be said of a set of stickers."""

    name: str
    source: str
    license: str
    options: dict[str, Any]
    """Side, frames of a clip, how they were chosen."""
    groups: dict[str, tuple[int, int]]
    """Group -> (moving, still); the largest first."""
    bases: int
    """Drawings, of which the stickers are variants."""
    motion: tuple[float, float, float]
    """Grey levels by which a moving one changes from key frame to key frame: the least, the median, the most."""
    captions: tuple[str, ...]
    """Of those shown."""
    bad: tuple[str, ...]
    """Names of unusable files, and why: those left out when the set was made, those unreadable among the ones drawn."""
    grid: Image.Image
    """Film strips with their captions."""
    page: tuple[Image.Image, ...]
    """The same stickers in motion, one picture a frame."""

    def save_page(self, path: str | Path) -> None:
        """Write the moving page as a GIF."""
        save_animation(self.page, path, FPS)


def inspect_stickers(name: str, *, count: int = 48, seed: int = 0) -> StickerInspection:
    """Describe the embedded set or a prepared folder.

    Args:
        count: Stickers shown, drawn by `seed`.

    Raises:
        UserError: There is no such set, or none of those drawn can be read.
    """
    whole = open_stickers(name)
    options, rows = whole.noted["options"], whole.rows
    bad, shown = list(whole.noted["bad"]), []
    for index in sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))):
        try:
            clip = read_clip(whole.dataset[index], options["size"], options["frames"])
            shown.append((rows[index]["caption"], clip))
        except Exception as error:  # Pillow's decoders have no common error
            bad.append(f"{rows[index]['id']} ({why_unreadable(error)})")
    if not shown:
        raise UserError(f"{whole.place}: none of those drawn at random can be read: {'; '.join(bad[:20])}")
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(row["group"] or "no group", [0, 0])[row["static"]] += 1
    moving = [row["motion"] for row in rows if not row["static"]] or [0.0]
    return StickerInspection(
        name=whole.name,
        source=whole.noted["source"],
        license=whole.noted["license"],
        options=options,
        groups={group: tuple(counts) for group, counts in sorted(groups.items(), key=lambda item: -sum(item[1]))},
        bases=len({row["base"] for row in rows}),
        motion=(min(moving), float(np.median(moving)), max(moving)),
        captions=tuple(caption for caption, _ in shown),
        bad=tuple(bad),
        grid=_grid([_strip(caption, clip) for caption, clip in shown], 2),
        page=tuple(
            _grid([_cell(caption, clip[frame]) for caption, clip in shown], round(len(shown) ** 0.5) + 1)
            for frame in range(options["frames"])
        ),
    )


def _strip(caption: str, clip: np.ndarray) -> Image.Image:
    """A clip's frames in a row over its caption."""
    pictures = [_enlarged(frame) for frame in clip]
    side = pictures[0].width
    image = Image.new("RGB", (side * len(pictures) + 8, side + LINE + 6), "white")
    for position, picture in enumerate(pictures):
        image.paste(picture, (position * side, 0))
    _write(image, caption, (2, side + 1))
    return image


def _cell(caption: str, frame: np.ndarray) -> Image.Image:
    """One frame over the caption in several lines."""
    picture = _enlarged(frame)
    width = max(WIDTH, picture.width)
    lines = textwrap.wrap(caption, width // 6, max_lines=LINES, placeholder=" ...")
    image = Image.new("RGB", (width, picture.height + LINES * LINE + 6), "white")
    image.paste(picture, ((width - picture.width) // 2, 0))
    for number, line in enumerate(lines):
        _write(image, line, (2, picture.height + number * LINE))
    return image


def _enlarged(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    factor = max(1, SIZE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _write(image: Image.Image, text: str, place: tuple[int, int]) -> None:
    ImageDraw.Draw(image).text(place, text, fill="black", font=ImageFont.load_default(LINE - 1))


def _grid(cells: list[Image.Image], columns: int) -> Image.Image:
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    blank = Image.new("RGB", cells[0].size, "white")
    return make_image_grid(cells + [blank] * (rows * columns - len(cells)), rows, columns)
