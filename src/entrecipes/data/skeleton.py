"""The 13 joints that every pose here consists of, and the pose maps drawn from them."""

from __future__ import annotations

import numpy as np

JOINTS = (
    "nose",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
"""Left and right are the person's own."""
FROM_33 = (0, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
"""These joints among the 33 landmarks of MediaPipe Pose."""
LIMBS = (
    ("left_hip", "right_hip"),
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_hip"),
    ("right_shoulder", "right_hip"),
    ("nose", "left_shoulder"),
    ("nose", "right_shoulder"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
)
"""Pairs of joints, in the order in which they are drawn: arms last, on top."""
COLORS = (
    (110, 110, 110),
    (150, 150, 150),
    (90, 110, 160),
    (160, 110, 90),
    (200, 200, 255),
    (255, 200, 200),
    (0, 90, 255),
    (0, 190, 255),
    (255, 60, 0),
    (255, 160, 0),
    (0, 160, 90),
    (60, 255, 120),
    (200, 0, 160),
    (255, 90, 255),
)
"""RGB of each limb: blue (leg) and green (arm) on the person's left, red and magenta on the right."""
LINE = 0.045
"""Width of a limb as a share of the picture's side; at least `THINNEST` pixels."""
THINNEST = 1.25
VISIBLE = 0.5
"""Joints of less visibility, and limbs that end in one, are left out."""
CHUNK_PIXELS = 2**15
"""Drawn at a time: few enough to stay in the processor's cache."""

_PAIRS = np.array([[JOINTS.index(name) for name in limb] for limb in LIMBS])


def joints(landmarks: np.ndarray) -> np.ndarray:
    """[..., 13, C] of [..., 33, C] landmarks (MediaPipe Pose); 13 are passed through.

    Raises:
        ValueError: For any other number.
    """
    if landmarks.shape[-2] == len(JOINTS):
        return landmarks
    if landmarks.shape[-2] == 33:
        return landmarks[..., FROM_33, :]
    raise ValueError(f"a pose has {len(JOINTS)} joints or 33 landmarks, not {landmarks.shape[-2]}")


def draw_poses(keypoints: np.ndarray, size: int, *, threshold: float = VISIBLE) -> np.ndarray:
    """Pose maps: coloured limbs on black, antialiased, as uint8 [T, 3, size, size].

    Args:
        keypoints: [T, 13, 3], (x, y, visibility), x and y in [0, 1] of the square picture (outside it is allowed).
        threshold: Joints that are less visible, or not finite, are left out.
    """
    keypoints = np.asarray(keypoints, np.float32)
    maps = np.empty((len(keypoints), 3, size, size), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)
    for start in range(0, len(keypoints), step):
        maps[start : start + step] = _draw(keypoints[start : start + step], size, threshold)
    return maps


def _draw(keypoints: np.ndarray, size: int, threshold: float) -> np.ndarray:
    """A pixel is covered by a line as far as its centre lies within it, with a ramp of one pixel at the edge."""
    shown = np.isfinite(keypoints).all(-1) & (keypoints[..., 2] >= threshold)
    points = np.where(shown[..., None], keypoints[..., :2], 0) * size
    half = max(THINNEST, LINE * size) / 2
    canvas = np.zeros((len(points), 3, size, size), np.float32)
    for (first, second), color in zip(_PAIRS, COLORS, strict=True):
        _line(canvas, points[:, first], points[:, second], shown[:, first] & shown[:, second], half, color)
    nose = points[:, 0]  # a dot for the head, which no limb ends in visibly
    _line(canvas, nose, nose, shown[:, 0], 1.6 * half, (255, 255, 255))
    return np.round(canvas).astype(np.uint8)


def _line(
    canvas: np.ndarray, a: np.ndarray, b: np.ndarray, shown: np.ndarray, half: float, color: tuple[int, int, int]
) -> None:
    """Lay a line from a [T, 2] to b [T, 2], in pixels, over each picture of the canvas [T, 3, S, S] where `shown`."""
    if not shown.any():
        return
    size = canvas.shape[-1]
    ends = np.concatenate([a[shown], b[shown]])
    left, top = np.floor(ends.min(0) - half - 1).clip(0, size).astype(int)
    right, bottom = np.ceil(ends.max(0) + half + 1).clip(0, size).astype(int)
    x = np.arange(left, right, dtype=np.float32) + 0.5 - a[:, 0, None, None]
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] - a[:, 1, None, None]
    along_x, along_y = ((b - a)[:, axis, None, None] for axis in (0, 1))
    t = np.clip((x * along_x + y * along_y) / np.maximum(along_x**2 + along_y**2, 1e-6), 0, 1)
    distance = np.sqrt((x - t * along_x) ** 2 + (y - t * along_y) ** 2)
    cover = np.clip(half + 0.5 - distance, 0, 1) * shown[:, None, None]
    part = canvas[:, :, top:bottom, left:right]
    for channel, level in enumerate(color):
        part[:, channel] += cover * (level - part[:, channel])
