"""Which frames of a clip to keep: key frames by clustering or by equal spacing, and ping-pong for clips too short."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

KeyFrames = Literal["cluster", "even"]

GREY = 32
"""Side of the grey pictures that frames are compared by."""
COMPONENTS = 16
"""Principal components that are left of them."""


def key_frames(frames: np.ndarray, count: int, how: KeyFrames = "even") -> list[int]:
    """`count` positions in a clip, uint8 [T, S, S, 3]; ascending, unless it has fewer frames than that.

    `even` takes every T/count-th frame from the first on: a clip that loops then loops on at the same pace. `cluster`
    takes the first frame of each of `count` clusters of the frames' looks, in time order (RDTF, arXiv 2503.17735, where
    the clusters are of VGG features; here of the principal components of grey 32x32 pixels): it follows what changes
    and passes over rests. A clip without that many different frames is spaced evenly. A clip of fewer than `count`
    frames runs to and fro.
    """
    total = len(frames)
    if total < count:
        return ping_pong(total, count)
    if how == "cluster":
        pixels = np.stack([_grey(frame) for frame in frames])
        if len(np.unique(pixels, axis=0)) >= count:
            return _first_of_clusters(pixels, count)
    return even_frames(total, count)


def even_frames(total: int, count: int) -> list[int]:
    """`count` of `total` positions, equally far apart as if the clip went round; the first one is 0."""
    return [position * total // count for position in range(count)]


def ping_pong(total: int, count: int) -> list[int]:
    """Positions of a clip of `total` frames that runs to and fro for `count` frames: 0 1 2 1 0 1 ..."""
    there_and_back = [*range(total), *range(total - 2, 0, -1)]
    return [there_and_back[position % len(there_and_back)] for position in range(count)]


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference between successive frames uint8 [F, ...], in grey levels; 0 for a single frame."""
    if len(frames) == 1:
        return 0.0
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def _grey(frame: np.ndarray) -> np.ndarray:
    image = Image.fromarray(frame).convert("L").resize((GREY, GREY), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).ravel()


def _first_of_clusters(pixels: np.ndarray, count: int) -> list[int]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    parts = PCA(min(COMPONENTS, *pixels.shape), svd_solver="full").fit_transform(pixels)
    clusters = KMeans(count, n_init=4, random_state=0).fit_predict(parts)
    return sorted(int(np.flatnonzero(clusters == cluster)[0]) for cluster in range(count))
