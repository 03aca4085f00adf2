"""Pictures inside a page: made small enough to travel, unchanged where they are small already."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageSequence

WIDEST = 1200
"""Pixels; wider pictures are scaled down, which no phone and few screens can tell."""
LIGHT = 300_000
"""Bytes up to which a still picture stays as exact as it is; heavier ones become WebP."""
LIGHT_MOVING = 1_000_000
"""The same for an animation."""
THUMB = 96
QUALITY = 85
STILL, MOVING = (".png", ".webp", ".jpg"), (".gif", ".webp")


def still(path: Path) -> str:
    """A picture as the source of an `<img>`: its colours reduced to 256 where it has no more or is a plot's.

    Raises:
        OSError: When it can't be read as a picture.
    """
    with Image.open(path) as image:
        picture = image.convert("RGB") if image.mode not in ("L", "RGB") else image.copy()
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    if picture.mode == "RGB" and picture.getcolors(256):
        picture = picture.quantize(256, dither=Image.Dither.NONE)  # exact
    written = _written(picture, "PNG", optimize=True)
    return _source("png", written) if len(written) <= LIGHT else _source("webp", _webp(picture.convert("RGB")))


def plot(path: Path) -> str:
    """A plot in 256 colours, about a third of its size; the eye sees no difference."""
    with Image.open(path) as image:
        picture = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    return _source("png", _written(picture, "PNG", optimize=True))


def moving(path: Path) -> str:
    """An animation, which plays without a script: as it is while it is light, otherwise as WebP where that is lighter.

    Raises:
        OSError: When a frame of it can't be read.
    """
    written, kind = path.read_bytes(), path.suffix[1:]
    with Image.open(path) as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
        durations = [frame.info.get("duration", 125) for frame in ImageSequence.Iterator(image)]
    if len(written) > LIGHT_MOVING:
        lighter = _webp(frames[0], save_all=True, append_images=frames[1:], duration=durations, loop=0)
        if len(lighter) < len(written):
            written, kind = lighter, "webp"
    return _source(kind, written)


def thumb(path: Path) -> str:
    """The upper left corner of a sample grid, to know a run by."""
    with Image.open(path) as image:
        side = min(image.width, image.height, 2 * THUMB)
        corner = image.convert("RGB").crop((0, 0, side, side)).resize((THUMB, THUMB), Image.Resampling.BOX)
    return _source("webp", _webp(corner))


def size(source: str) -> int:
    """Bytes that a source takes in the page."""
    return len(source)


def _webp(picture: Image.Image, **more: object) -> bytes:
    return _written(picture, "WEBP", quality=QUALITY, method=4, **more)


def _written(picture: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def _source(kind: str, written: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(written).decode('ascii')}"
