"""Reading video files with the poses of the person in them, as square pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from scipy.ndimage import gaussian_filter1d, maximum_filter1d

from entrecipes.errors import UserError

SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")
HEADROOM = 0.2
"""Left free around the joints' box, as a share of its longer side: the nose is not the top of the head."""
SMOOTHING = 12
"""Standard deviation, in frames, of the smoothing of a crop's path."""


class BadVideo(Exception):
    """A video that can't be used; the message says why."""


def read_video(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 [H, W, 3] in RGB, in order. GIFs are read by PIL, all else by OpenCV.

    Raises:
        BadVideo: The file can't be decoded.
        UserError: OpenCV is not installed.
    """
    frames = _gif(path) if path.suffix.lower() == ".gif" else _opencv(path)
    first = next(frames, None)
    if first is None:
        raise BadVideo("no frame can be decoded")
    yield first
    yield from frames


def _gif(path: Path) -> Iterator[np.ndarray]:
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.asarray(frame.convert("RGB"))
    except Exception as error:  # PIL's decoders have no common error
        why = "not a GIF" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadVideo(f"can't be decoded: {why}") from None


def _opencv(path: Path) -> Iterator[np.ndarray]:
    try:
        import cv2
    except ImportError:
        raise UserError(f"{path.name} is read by OpenCV: run `pip install 'entrecipes[video]'`") from None
    capture = cv2.VideoCapture(str(path))
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    except cv2.error as error:
        raise BadVideo(f"can't be decoded: {error}") from None
    finally:
        capture.release()


def centre_squares(count: int, width: int, height: int) -> np.ndarray:
    """The largest square in the middle of a picture, `count` times: float [count, 3], left, top, side in pixels."""
    side = min(width, height)
    return np.tile(np.array([(width - side) / 2, (height - side) / 2, side], float), (count, 1))


def person_squares(keypoints: np.ndarray, width: int, height: int) -> np.ndarray:
    """Squares around a person that move smoothly and stay inside the picture.

    Args:
        keypoints: [T, 13, 3] of successive frames, x and y in [0, 1] of the picture.

    Returns:
        float [T, 3]: left, top, side in pixels.
    """
    places = keypoints[..., :2] * [width, height]
    low, high = places.min(1), places.max(1)
    side = (high - low).max(1) * (1 + 2 * HEADROOM)
    side = gaussian_filter1d(maximum_filter1d(side, 2 * SMOOTHING + 1, mode="nearest"), SMOOTHING, mode="nearest")
    side = np.minimum(side, min(width, height))[:, None]
    corner = gaussian_filter1d((low + high) / 2, SMOOTHING / 2, axis=0, mode="nearest") - side / 2
    return np.concatenate([corner.clip(0, np.array([width, height]) - side), side], axis=1)


def crop(frame: np.ndarray, square: np.ndarray, size: int) -> np.ndarray:
    """The square (left, top, side) of a frame [H, W, 3], resized with antialiasing to uint8 [size, size, 3]."""
    left, top, side = map(float, square)
    image = Image.fromarray(frame)
    box = (left, top, min(left + side, image.width), min(top + side, image.height))  # rounding may exceed the edge
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def crop_keypoints(keypoints: np.ndarray, squares: np.ndarray, width: int, height: int) -> np.ndarray:
    """[T, 13, 3] in [0, 1] of the picture -> the same in [0, 1] of the squares [T, 3]."""
    places = (keypoints[..., :2] * [width, height] - squares[:, None, :2]) / squares[:, None, 2:]
    return np.concatenate([places, keypoints[..., 2:]], axis=-1).astype(np.float32)
