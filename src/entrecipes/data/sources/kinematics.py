"""Recorded human motion as joint positions: the motion files, their humanoid, and its forward kinematics."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from entrecipes.data.sources.base import expect

CHANNELS = {
    "root": 4,
    "chest": 4,
    "neck": 4,
    "right_hip": 4,
    "right_knee": 1,
    "right_ankle": 4,
    "right_shoulder": 4,
    "right_elbow": 1,
    "left_hip": 4,
    "left_knee": 1,
    "left_ankle": 4,
    "left_shoulder": 4,
    "left_elbow": 1,
}
"""Numbers a joint has in a frame, after the frame's duration and the root's position: a quaternion (w, x, y, z), or an
angle about z."""
NUMBERS = 4 + sum(CHANNELS.values())
SCALE = 0.25
"""Metres to a unit of the humanoid's file."""


@dataclass(frozen=True)
class Motion:
    """Where every link of the humanoid is: x is forward at the start, y is up, z is the person's right; metres."""

    positions: dict[str, np.ndarray]
    """Link -> [T, 3], the joint that it turns about."""
    orientations: dict[str, np.ndarray]
    """Link -> [T, 3, 3], its axes as columns."""

    def point(self, link: str, local: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
        """[T, 3] of a point given in a link's own axes."""
        return self.positions[link] + self.orientations[link] @ np.asarray(local, float)


def read_offsets(urdf: bytes, archive: Path) -> dict[str, tuple[str, np.ndarray]]:
    """{link: (parent link, offset [3] of its joint in the parent's axes, metres)}, parents first."""
    robot = ElementTree.fromstring(urdf.rstrip(b"\0"))  # the file ends in a NUL
    offsets = {}
    for joint in robot.iter("joint"):
        place = np.array(joint.find("origin").get("xyz").split(), float) * SCALE
        offsets[joint.find("child").get("link")] = (joint.find("parent").get("link"), place)
    expect(set(CHANNELS) <= set(offsets), "the humanoid lacks joints", archive)
    return offsets


def read_motion(content: bytes, archive: Path, fps: float) -> tuple[np.ndarray, dict[str, Rotation]]:
    """(root positions [T, 3] in metres, {link: rotations [T] against its parent}), at `fps` frames a second.

    Files come at 16 to 60 frames a second; positions are interpolated linearly, rotations along great circles.
    """
    frames = np.array(json.loads(content)["Frames"], float)
    expect(frames.ndim == 2 and frames.shape[1] == NUMBERS, f"a frame has not {NUMBERS} numbers", archive)
    expect(bool((frames[:-1, 0] > 0).all()), "a frame has no duration", archive)
    times = np.concatenate([[0], np.cumsum(frames[:-1, 0])])
    at = np.arange(0, times[-1] + 1e-9, 1 / fps).clip(max=times[-1])
    root = np.stack([np.interp(at, times, frames[:, axis]) for axis in (1, 2, 3)], axis=1)
    rotations, column = {}, 4
    for link, width in CHANNELS.items():
        values = frames[:, column : column + width]
        turns = Rotation.from_quat(values[:, [1, 2, 3, 0]]) if width == 4 else Rotation.from_euler("z", values)
        rotations[link] = Slerp(times, turns)(at)
        column += width
    return root, rotations


def forward(offsets: dict[str, tuple[str, np.ndarray]], root: np.ndarray, rotations: dict[str, Rotation]) -> Motion:
    """Forward kinematics: a link sits at its parent's origin plus the turned offset, and turns further by its own
    rotation; links without one (wrists) are rigid."""
    base = next(iter(offsets.values()))[0]
    positions, orientations = {base: root}, {base: np.broadcast_to(np.eye(3), (len(root), 3, 3))}
    for link, (parent, offset) in offsets.items():
        positions[link] = positions[parent] + orientations[parent] @ offset
        turn = rotations.get(link)
        orientations[link] = orientations[parent] if turn is None else orientations[parent] @ turn.as_matrix()
    return Motion(positions, orientations)
