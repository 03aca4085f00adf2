"""Measure the pose of the person in videos: writes NAME.poses.json beside each, for `data: {type: video_folder}`.

    python scripts/measure_poses.py ~/videos

It runs MediaPipe Pose, whose old protobuf does not go with this package's requirements: give it an environment of its
own. The script needs nothing else, and the models are in MediaPipe's wheel.

    python -m venv poses && poses/bin/pip install 'numpy' 'protobuf<5' absl-py attrs flatbuffers matplotlib
    poses/bin/pip install --no-deps mediapipe==0.10.14 opencv-python-headless
    poses/bin/python scripts/measure_poses.py ~/videos

A file holds one entry a frame: 33 landmarks times (x, y, visibility), x and y in [0, 1] of the picture, or null where
nobody was found. Exit code: 0, or 2 when something is missing or no video could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")


def frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 [H, W, 3] in RGB; as `video_folder` reads them, so that the numbers agree."""
    import cv2

    if path.suffix.lower() == ".gif":
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.array(frame.convert("RGB"))
        return
    capture = cv2.VideoCapture(str(path))
    while True:
        there, frame = capture.read()
        if not there:
            break
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    capture.release()


def measure(path: Path, complexity: int) -> list[list[list[float]] | None]:
    """The pose in every frame; poses are followed from frame to frame."""
    from mediapipe.python.solutions.pose import Pose

    poses = []
    with Pose(model_complexity=complexity) as detector:
        for frame in frames(path):
            found = detector.process(frame).pose_landmarks
            points = found and [[round(p.x, 4), round(p.y, 4), round(p.visibility, 3)] for p in found.landmark]
            poses.append(points)
    return poses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="videos, or folders of videos")
    parser.add_argument("--model-complexity", type=int, choices=(0, 1, 2), default=1, help="1 is in the wheel")
    parser.add_argument("--force", action="store_true", help="measure again what is measured")
    args = parser.parse_args()
    try:
        import cv2  # noqa: F401
        import mediapipe  # noqa: F401
    except ImportError as error:
        print(
            f"error: {error}. Install MediaPipe and OpenCV in an environment of their own:\n{__doc__}", file=sys.stderr
        )
        return 2
    videos = [
        file
        for path in args.paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.suffix.lower() in SUFFIXES
    ]
    done = 0
    for video in videos:
        target = video.with_suffix(".poses.json")
        if target.exists() and not args.force:
            print(f"{target} is there (--force measures again)")
            done += 1
            continue
        try:
            poses = measure(video, args.model_complexity)
        except OSError as error:
            poses = []
            print(f"{video}: {error}", file=sys.stderr)
        if not poses:
            print(f"{video}: no frame can be decoded", file=sys.stderr)
            continue
        target.write_text("[\n" + ",\n".join(json.dumps(pose, separators=(",", ":")) for pose in poses) + "\n]\n")
        print(f"{target}: a pose in {sum(pose is not None for pose in poses)} of {len(poses)} frames")
        done += 1
    if not done:
        print("error: no video could be measured", file=sys.stderr)
    return 0 if done else 2


if __name__ == "__main__":
    raise SystemExit(main())
