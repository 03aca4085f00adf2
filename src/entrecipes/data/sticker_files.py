"""Reading stickers of any format, still or moving, as square pictures on white."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from entrecipes.data.images import why_unreadable
from entrecipes.data.video_files import SUFFIXES as VIDEOS
from entrecipes.data.video_files import BadVideo, read_video

PICTURES = (".webp", ".gif", ".png", ".apng", ".jpg", ".jpeg", ".avif")
LOTTIE = (".json", ".tgs")
SUFFIXES = (*PICTURES, *(suffix for suffix in VIDEOS if suffix not in PICTURES), *LOTTIE)
FPS = 10.0
"""Where a file does not say how fast it runs."""


class BadSticker(Exception):
    """A file that can't be used; the message says why."""


@dataclass(frozen=True)
class Sticker:
    """A decoded file: `frames` uint8 [T, S, S, 3], one for a still, and its frames a second."""

    frames: np.ndarray
    fps: float


def read_sticker(file: Path | bytes, suffix: str, size: int) -> Sticker:
    """Decode a file, or what is in one, whole: frames laid over white, the longer side resized with antialiasing.

    Args:
        suffix: What its name ends in, lower case, one of `SUFFIXES`; the pictures (WebP, GIF, PNG, ...) are told by
            their content. GIFs and the like are read by Pillow, videos by OpenCV, Lottie by rlottie-python.
        size: Side of the frames.

    Raises:
        BadSticker: It can't be decoded.
        UserError: OpenCV is not installed.
    """
    if isinstance(file, Path) and not file.is_file():
        raise BadSticker("not there")
    if isinstance(file, bytes) and suffix not in PICTURES:  # those decoders read only from disk
        with tempfile.NamedTemporaryFile(suffix=suffix) as copy:
            copy.write(file)
            copy.flush()
            return read_sticker(Path(copy.name), suffix, size)
    try:
        if suffix in PICTURES:
            return _picture(io.BytesIO(file) if isinstance(file, bytes) else file, size)
        frames, fps = _lottie(file) if suffix in LOTTIE else _video(file)
        if not frames:
            raise BadSticker("no frame can be decoded")
        return Sticker(np.stack([on_white(frame, size) for frame in frames]), fps)
    except BadVideo as error:
        raise BadSticker(str(error)) from None


def on_white(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture on a white square, uint8 [size, size, 3]; one that is no square has white beside it."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, color="white"))


def _picture(file: io.BytesIO | Path, size: int) -> Sticker:
    frames, milliseconds = [], 0.0
    try:
        with Image.open(file) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(on_white(frame, size))
                milliseconds += frame.info.get("duration") or 0
    except Exception as error:  # Pillow's decoders have no common error
        raise BadSticker(why_unreadable(error)) from None
    return Sticker(np.stack(frames), 1000 * len(frames) / milliseconds if milliseconds else FPS)


def _video(path: Path) -> tuple[list[Image.Image], float]:
    frames = [Image.fromarray(frame) for frame in read_video(path)]
    import cv2

    capture = cv2.VideoCapture(str(path))
    fps = capture.get(cv2.CAP_PROP_FPS) or FPS
    capture.release()
    return frames, fps


def _lottie(path: Path) -> tuple[list[Image.Image], float]:
    try:
        from rlottie_python import LottieAnimation
    except ImportError:
        raise BadSticker("a Lottie animation: run `pip install rlottie-python` to have it read") from None
    try:
        read = LottieAnimation.from_tgs if path.suffix == ".tgs" else LottieAnimation.from_file
        with read(str(path)) as animation:
            count = animation.lottie_animation_get_totalframe()
            frames = [animation.render_pillow_frame(number) for number in range(count)]
            return frames, animation.lottie_animation_get_framerate() or FPS
    except Exception as error:  # a binding of C: whatever it raises, the file is of no use
        raise BadSticker(why_unreadable(error)) from None
