"""Recorded human motion rendered to video with exact poses: a shaded figure, in any number of views and looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source

MOTIONS = (
    "backflip",
    "cartwheel",
    "crawl",
    "dance_a",
    "dance_b",
    "getup_facedown",
    "getup_faceup",
    "jump",
    "kick",
    "punch",
    "roll",
    "run",
    "spin",
    "spinkick",
    "walk",
)
FPS = 30
"""Frames a second; the recordings, at 16 to 60, are interpolated to it."""
FINE = 48
"""Pictures up to this size take nine rays a pixel, larger ones four."""


def videos(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """One row a frame: `image`, `video` (`motion/viewK`), `frame`, `keypoints` (13 times x, y, 1, flat)."""
    from entrecipes.data.sources.figure import Scene, draw_view
    from entrecipes.data.sources.kinematics import forward, read_motion, read_offsets

    (archive,) = files
    offsets = read_offsets(read_member(archive, "pybullet_data/humanoid/humanoid.urdf"), archive)
    views = [draw_view(number) for number in range(options.views)]
    for name in MOTIONS:
        content = read_member(archive, f"pybullet_data/data/motions/humanoid3d_{name}.txt")
        motion = forward(offsets, *read_motion(content, archive, FPS))
        for number, view in enumerate(views):
            scene = Scene(motion, view, FPS)
            for frame, keypoints in enumerate(scene.keypoints()):
                yield {
                    "image": scene.render(frame, options.size, 3 if options.size <= FINE else 2),
                    "video": f"{name}/view{number}",
                    "frame": frame,
                    "keypoints": keypoints.ravel().tolist(),
                }


SOURCES = (
    Source(
        name="mocap",
        description="15 recorded motions (1,010 frames a view) of a rendered figure with poses, any size, any views",
        license="zlib (the package's)",
        # one wheel a platform: held to what its text files must hold
        packages=(Package("pip", "pybullet", "3.2.7"),),
        download_mb=103,
        rows=videos,
        any_size=True,
        clips=True,
        rendered=True,
        size=48,
    ),
)
