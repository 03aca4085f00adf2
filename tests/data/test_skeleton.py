"""Pose maps: every joint under its keypoint, left and right apart, what is not seen left out."""

from __future__ import annotations

import numpy as np
import pytest

from entrecipes.data import skeleton
from entrecipes.data.skeleton import COLORS, FROM_33, JOINTS, LIMBS, draw_poses, joints

STANDING = np.array(
    [
        [0.5, 0.1],
        *([0.62, 0.25], [0.38, 0.25]),
        *([0.75, 0.4], [0.25, 0.4]),
        *([0.85, 0.52], [0.15, 0.52]),
        *([0.57, 0.55], [0.43, 0.55]),
        *([0.6, 0.75], [0.4, 0.75]),
        *([0.63, 0.95], [0.37, 0.95]),
    ]
)
"""Facing us: the person's left is on the right."""


def pose(**hidden: float) -> np.ndarray:
    """The standing pose, [1, 13, 3]; `joint=visibility`."""
    whole = np.concatenate([STANDING, np.ones((13, 1))], axis=1)
    for name, visibility in hidden.items():
        whole[JOINTS.index(name), 2] = visibility
    return whole[None]


@pytest.mark.parametrize("size", [24, 32, 200])
def test_every_joint_is_drawn_under_its_keypoint(size: int) -> None:
    drawn = draw_poses(pose(), size)
    assert drawn.shape == (1, 3, size, size) and drawn.dtype == np.uint8
    for x, y in STANDING:
        assert drawn[0, :, int(y * size), int(x * size)].max() > 60
    assert (drawn.max(1) == 0).mean() > 0.6


def test_limbs_have_their_colors() -> None:
    drawn = draw_poses(pose(), 200)[0]
    for limb in (("left_elbow", "left_wrist"), ("right_elbow", "right_wrist"), ("left_knee", "left_ankle")):
        x, y = np.mean([STANDING[JOINTS.index(name)] for name in limb], axis=0) * 200
        assert tuple(drawn[:, int(y), int(x)]) == COLORS[LIMBS.index(limb)]
    mirrored = draw_poses(pose() * [-1, 1, 1] + [1, 0, 0], 200)[0]  # as seen from behind
    assert ((drawn.max(0) > 0) == (mirrored.max(0) > 0)).mean() > 0.99
    assert np.abs(drawn.astype(int) - mirrored).max() > 200


def test_a_hidden_joint_takes_its_limbs_away() -> None:
    whole, without = draw_poses(pose(), 100)[0], draw_poses(pose(left_wrist=0.4), 100)[0]
    x, y = (STANDING[JOINTS.index("left_wrist")] * 100).astype(int)
    assert whole[:, y, x].max() > 100 and without[:, y, x].max() == 0
    assert np.array_equal(whole[..., :50], without[..., :50])
    assert np.array_equal(draw_poses(pose(left_wrist=np.nan), 100)[0], without)
    assert draw_poses(np.zeros((2, 13, 3)), 32).max() == 0


def test_many_frames_are_drawn_like_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    poses = np.concatenate([random.random((5, 13, 2)), np.ones((5, 13, 1))], axis=2)
    monkeypatch.setattr(skeleton, "CHUNK_PIXELS", 2 * 50**2)
    together = draw_poses(poses, 50)
    assert np.array_equal(together[4], draw_poses(poses[4:], 50)[0])


def test_33_landmarks_become_13_joints() -> None:
    landmarks = np.arange(2 * 33 * 3.0).reshape(2, 33, 3)
    assert np.array_equal(joints(landmarks), landmarks[:, FROM_33]) and joints(landmarks[:, :13]).shape == (2, 13, 3)
    with pytest.raises(ValueError, match="not 17"):
        joints(landmarks[:, :17])
