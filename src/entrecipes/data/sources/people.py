"""Real clips of people from the demonstration videos of two packages, cropped to the person, with measured poses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source, expect

POSES = Path(__file__).parents[1] / "human_poses.json"
"""{file in its package: one pose a frame, 13 joints times (x, y, visibility) flat, or null}; see measure_poses.py."""
VIDEOS = {
    **{f"balance/cam0{i}": (0, f"Pose2Sim/Demo_SinglePerson/videos/cam0{i}.mp4", slice(100)) for i in (1, 2, 3, 4)},
    "street/jumping": (1, "Sports2D/Demo/demo.mp4", slice(169)),
    "street/walking": (1, "Sports2D/Demo/demo.mp4", slice(169, 230)),
}
"""Name -> (number of its package, file in it, frames that follow one person). The first four show the same moments from
four sides."""
VISIBLE = 0.8
"""Frames in which the joints are less visible on average are left out."""


def videos(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """One row a frame: `image`, `video`, `frame`, `keypoints` (13 times x, y, visibility, flat).

    Left out are frames without a pose, of low visibility, or with a joint outside the picture; what lies between two
    gaps is cropped on its own.
    """
    from entrecipes.data.video_files import BadVideo, crop, read_video

    measured = json.loads(POSES.read_text())
    for name, (package, file, part) in VIDEOS.items():
        poses = np.array([pose or [np.nan] * 39 for pose in measured[file]]).reshape(-1, 13, 3)
        with tempfile.NamedTemporaryFile(suffix=".mp4") as unpacked:
            unpacked.write(read_member(files[package], file))
            unpacked.flush()
            count = 0
            try:
                for count, picture in enumerate(read_video(Path(unpacked.name)), 1):
                    if count == 1:
                        plan = _plan(poses, part, picture.shape[1], picture.shape[0])
                    if found := plan.get(count - 1):
                        square, pose = found
                        image, keypoints = crop(picture, square, options.size), pose.ravel().tolist()
                        yield {"image": image, "video": name, "frame": count - 1, "keypoints": keypoints}
            except BadVideo as error:
                expect(False, f"{file} {error}", files[package])
        expect(count == len(poses), f"{file} has {count} frames, not {len(poses)}", files[package])


def _plan(poses: np.ndarray, part: slice, width: int, height: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{frame of `part` to keep: (its square [3], its pose [13, 3] there)} from poses [T, 13, 3] in the picture."""
    from entrecipes.data.video_files import crop_keypoints, person_squares

    good = (poses[..., 2].mean(1) >= VISIBLE) & _inside(poses)  # a missing pose is NaN, and neither
    good = np.arange(len(poses))[part][good[part]]
    plan = {}
    for run in np.split(good, np.flatnonzero(np.diff(good) != 1) + 1):
        squares = person_squares(poses[run], width, height)
        keypoints = crop_keypoints(poses[run], squares, width, height)
        plan |= {int(frame): (squares[i], keypoints[i]) for i, frame in enumerate(run) if _inside(keypoints[i])}
    return plan


def _inside(poses: np.ndarray) -> np.ndarray:
    """Whether all joints of poses [..., 13, 3] lie in the picture."""
    return ((poses[..., :2] >= 0) & (poses[..., :2] <= 1)).all((-2, -1))


SOURCES = (
    Source(
        name="people",
        description="6 real videos of people (552 frames) with poses, any size; not to be passed on",
        license="BSD-3 (the packages')",
        packages=(
            Package("pip", "pose2sim", "0.10.49", "403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1"),
            Package("pip", "sports2d", "0.8.34", "733b6db70742636ae9c35d870c22bd416582f579abd5881bee93a14bb0e2655d"),
        ),
        download_mb=60,
        rows=videos,
        any_size=True,
        clips=True,
        size=64,
        kept_private="real people are to be seen in it, and the packages' licence was given for their code",
    ),
)
