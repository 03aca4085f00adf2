"""A look at a set of videos before training on it: counts by video, bad clips, film strips with their pose maps."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image

from entrecipes.data.clips import Clip, Videos, assemble, find_clips, motion, read_videos
from entrecipes.data.prepared import facts, prepared_folder, read_prepared
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.video_files import SUFFIXES
from entrecipes.data.video_folder import POSES, read_video_folder
from entrecipes.errors import UserError
from entrecipes.recipe.data import ClipsData, VideoData, VideoFolderData

SIZE = 64
"""Side, in pixels, at which clips are looked at."""


@dataclass(frozen=True)
class ClipInspection:
    """What can be said of a set of videos, cut into clips as recipes do unless told otherwise."""

    name: str
    source: str
    license: str
    videos: dict[str, tuple[int, int]]
    """Video -> (frames, good clips)."""
    frames: int
    """Of a clip."""
    frame_step: int
    motion: tuple[float, float, float]
    """Grey levels by which a clip changes from frame to frame: the least, the median, the most."""
    bad: tuple[str, ...]
    """Names of bad clips and videos, and why."""
    grid: Image.Image
    """Film strips: the reference image and the frames, below them the pose maps."""


def holds_clips(name: str) -> bool:
    """Whether `name` (prepared, a folder that `prepare` made, or a folder) is a set of videos with poses."""
    noted = facts(Path(name)) or (facts(prepared_folder(name)) if name in CATALOGUE else None)
    if noted is not None or name in CATALOGUE:
        return "videos" in (noted or {})
    files = list(Path(name).expanduser().rglob("*"))
    videos = [file for file in files if file.suffix.lower() in SUFFIXES]
    # a GIF may also be a picture
    return any(file.suffix.lower() != ".gif" or file.with_suffix(POSES).exists() for file in videos)


def inspect_clips(name: str, *, count: int = 8, seed: int = 0) -> ClipInspection:
    """Describe a set of videos.

    Args:
        name: A prepared set, a folder that `prepare` made, or a folder of videos with their poses.
        count: Clips shown, drawn by `seed`.

    Raises:
        UserError: No good clip is in it.
    """
    whole, section = _open(name)
    clips, bad = find_clips(whole, section)
    bad = whole.bad + bad
    if not clips:
        listed = "".join(f"\n  {entry}" for entry in bad[:20])
        raise UserError(f"{whole.place}: no clip of {section.frames} frames can be cut from it.{listed}")
    changes = [motion(whole.videos[clip.video].frames[clip.frames]) for clip in clips]
    cut = Counter(clip.video for clip in clips)
    shown = sorted(random.Random(seed).sample(range(len(clips)), min(count, len(clips))))
    return ClipInspection(
        name=whole.name,
        source=whole.source,
        license=whole.license,
        videos={video.name: (len(video.frames), cut[number]) for number, video in enumerate(whole.videos)},
        frames=section.frames,
        frame_step=section.frame_step,
        motion=(min(changes), float(np.median(changes)), max(changes)),
        bad=tuple(bad),
        grid=_strips(whole, [clips[i] for i in shown], section),
    )


def _open(name: str) -> tuple[Videos, VideoData]:
    folder = Path(name) if facts(Path(name)) else prepared_folder(name)
    noted = facts(folder)
    if noted is None:
        section = VideoFolderData(path=name, image_size=SIZE)
        return read_video_folder(section), section
    section = ClipsData(name=noted["name"], image_size=min(SIZE, noted["options"]["size"]))
    return read_videos(read_prepared(folder), section.image_size), section


def _strips(whole: Videos, clips: list[Clip], section: VideoData) -> Image.Image:
    """One row of pictures for the frames of a clip, one for its pose maps."""
    cells = []
    blank = Image.new("RGB", (section.image_size, section.image_size), "white")
    for clip in assemble(whole, clips, section).tensor:
        frames = [Image.fromarray(frame) for frame in clip.permute(1, 2, 3, 0).numpy()]
        cells += [frames[-1], *frames[: section.frames], blank, *frames[section.frames : -1]]
    return make_image_grid(cells, 2 * len(clips), section.frames + 1)
