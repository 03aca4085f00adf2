"""One's own videos with the poses of the person in each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.data.clips import Video, Videos, cut, wanted
from entrecipes.data.images import Splits
from entrecipes.data.places import atomic_folder, home
from entrecipes.data.skeleton import JOINTS, joints
from entrecipes.data.video_files import (
    SUFFIXES,
    BadVideo,
    centre_squares,
    crop,
    crop_keypoints,
    person_squares,
    read_video,
)
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.patterns import matches
from entrecipes.recipe.data import VideoFolderData

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
POSES = ".poses.json"


def load(section: VideoFolderData) -> Splits:
    """Clips of the videos under `section.path`; see [`entrecipes.data.clips.cut`].

    Raises:
        UserError: No such folder, no videos, unreadable metadata, or too many bad clips and videos.
    """
    return cut(read_video_folder(section), section)


def read_video_folder(section: VideoFolderData) -> Videos:
    """The videos that the recipe asks for, by their path in the folder; those that can't be used are in `bad`.

    The poses of `NAME.mp4` stand in `NAME.poses.json` (T poses of 13 joints or 33 landmarks times x, y, visibility, or
    null for a frame without one), or in the column `poses` of a metadata.jsonl.
    """
    folder = Path(section.path).expanduser()
    place = f"the folder {folder}"
    if not folder.is_dir():
        raise UserError(f"data.path: {place} does not exist")
    listed = _listed(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    if not files | set(listed):
        raise UserError(f"data.path: {place} holds no videos; they end in {', '.join(SUFFIXES)}")
    videos, bad, names = [], [], sorted(files | set(listed))
    for name in names:
        if not matches(name, wanted(section)):
            continue
        try:
            poses = _poses(folder / name, listed.get(name))
            videos.append(_read(name, folder / name, poses, section))
        except BadVideo as error:
            bad.append(f"{name} ({error})")
    source = f"Videos of the folder {folder.resolve().name}."
    return Videos(folder.resolve().name, source, "not stated", place, videos, tuple(names), bad)


def _listed(folder: Path) -> dict[str, Any]:
    """{file name: poses} of metadata.jsonl; empty without one. Raises UserError for lines that say neither."""
    path = folder / METADATA
    found = {}
    if path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                found[row["file_name"]] = row["poses"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'data.path: {path}:{number} is no row {{"file_name": ..., "poses": [one a frame]}}; mend that line'
                ) from None
    return found


def _poses(path: Path, poses: Any | None) -> np.ndarray:
    """float32 [T, 13, 3] of a video; visibility 0 where there is none. Raises BadVideo."""
    if poses is None:
        beside = path.with_suffix(POSES)
        if not beside.exists():
            raise BadVideo(f"no poses: there is no {beside.name} and no row in {METADATA}")
        try:
            poses = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadVideo(f"{beside.name} can't be read: {error}") from None
    return read_keypoints(poses)


def read_keypoints(poses: Any) -> np.ndarray:
    """float32 [T, 13, 3] of T poses of 13 joints or 33 landmarks times (x, y, visibility), null for a frame without.

    x and y are shares of the frame's width and height; the 13 joints are in the order of `JOINTS`.

    Raises:
        BadVideo: For anything else.
    """
    try:
        there = [pose for pose in poses if pose is not None]
        if not there:
            raise BadVideo(f"no pose in any of its {len(poses)} frames")
        known = joints(np.array(there, np.float32))
        if known.shape[1:] != (len(JOINTS), 3):
            raise ValueError(f"a joint has x, y, visibility, not {known.shape[-1]} numbers")
    except (TypeError, ValueError, IndexError) as error:
        raise BadVideo(f"its poses are not frames x 13 (or 33) x 3: {error}") from None
    if np.nanmedian(np.abs(known[..., :2])) > 2:
        raise BadVideo("its poses look like pixels: divide x by the frame's width and y by its height")
    found = np.zeros((len(poses), len(JOINTS), 3), np.float32)
    found[[pose is not None for pose in poses]] = known
    found[~np.isfinite(found).all((1, 2))] = 0
    return found


def _read(name: str, path: Path, poses: np.ndarray, section: VideoFolderData) -> Video:
    """Decode and crop a video, or take it from the cache. Raises BadVideo."""
    if not path.is_file():
        raise BadVideo(f"named in {METADATA}, but not there")
    status, size = path.stat(), section.image_size
    cut_out = (section.crop, section.min_visibility if section.crop == "person" else None)
    key = fingerprint(str(path.resolve()), status.st_size, status.st_mtime_ns, poses, size, cut_out)
    cache = home() / "videos" / key
    if not cache.exists():
        frames, keypoints = _cropped(path, poses, section)
        with atomic_folder(cache, keep_existing=True) as scratch:
            np.save(scratch / "frames.npy", frames)
            np.save(scratch / "keypoints.npy", keypoints)
    frames = np.load(cache / "frames.npy", mmap_mode="r")  # read as clips are cut from it
    return Video(name, frames, np.arange(len(frames)), np.load(cache / "keypoints.npy"))


def _cropped(path: Path, poses: np.ndarray, section: VideoFolderData) -> tuple[np.ndarray, np.ndarray]:
    """(frames uint8 [T, 3, S, S], keypoints [T, 13, 3] in them)."""
    size, frames, count = section.image_size, [], 0
    for picture in read_video(path):
        if not count:
            height, width = picture.shape[:2]
            squares = _squares(poses, width, height, section)
        if count < len(poses):
            frames.append(crop(picture, squares[count], size))
        count += 1
    if count != len(poses):
        raise BadVideo(f"{count} frames but {len(poses)} poses")
    keypoints = crop_keypoints(poses, squares, width, height)
    return np.stack(frames).transpose(0, 3, 1, 2), keypoints


def _squares(poses: np.ndarray, width: int, height: int, section: VideoFolderData) -> np.ndarray:
    """What is cut out of each frame, [T, 3]; where the pose is missing, between its neighbours'."""
    if section.crop == "centre":
        return centre_squares(len(poses), width, height)
    seen = np.flatnonzero(poses[..., 2].mean(1) >= max(section.min_visibility, 1e-6))
    if not len(seen):
        raise BadVideo(f"no pose in any of its {len(poses)} frames")
    squares = person_squares(poses[seen], width, height)
    return np.stack([np.interp(np.arange(len(poses)), seen, column) for column in squares.T], axis=1)
