"""Clips of a stick figure that walks about, with its exact joints: a data set that is drawn in a moment, for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.skeleton import draw_poses
from entrecipes.fingerprint import fingerprint

STANDING = np.array(
    [[0, -8], [-2, -5], [2, -5], [-3, -2], [3, -2], [-4, 1], [4, 1], [-1.5, 1], [1.5, 1],
     [-2, 5], [2, 5], [-2, 9], [2, 9]],
    np.float32,
)  # fmt: skip


def figures(count: int, frames: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips uint8 [count, 3, frames, size, size] and their keypoints [count, frames, 13, 3]."""
    random = np.random.default_rng(seed)
    start = random.uniform(0.4, 0.6, (count, 1, 1, 2))
    speed = random.uniform(0.008, 0.025, (count, 1, 1, 2)) * random.choice([-1, 1], (count, 1, 1, 2))
    swing = 2.5 * np.sin(random.uniform(0, 6, (count, 1)) + np.arange(frames) * 0.4)[..., None]
    joints = np.broadcast_to(STANDING, (count, frames, 13, 2)).copy()
    joints[..., [5, 11], 0] += swing
    joints[..., [6, 12], 0] -= swing
    joints = start + speed * np.arange(frames)[:, None, None] + joints / 26
    keypoints = np.concatenate([joints, np.ones((count, frames, 13, 1))], 3).astype(np.float32)
    pictures = draw_poses(keypoints.reshape(-1, 13, 3), size).reshape(count, frames, 3, size, size)
    clips = torch.from_numpy(np.maximum(pictures, 40)).transpose(1, 2).contiguous()
    return clips, torch.from_numpy(keypoints)


def figure_set(count: int, frames: int, size: int = 24, seed: int = 0) -> ImageSet:
    """The same as a clip data set: frames, pose maps and, as the reference, the first frame."""
    clips, keypoints = figures(count, frames, size, seed)
    poses = draw_poses(keypoints.reshape(-1, 13, 3).numpy(), size).reshape(count, frames, 3, size, size)
    tensor = torch.cat([clips, torch.from_numpy(poses).transpose(1, 2), clips[:, :, :1]], dim=2)
    name, source = "figures", "stick figures drawn for a test"
    return ImageSet(name, source, "none", fingerprint(tensor), tensor=tensor, keypoints=keypoints)
