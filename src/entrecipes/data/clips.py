"""Clips of people with their poses: cut from videos, judged, split by video, and laid out as a model takes them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch

from entrecipes.data.images import ImageRows, ImageSet, Splits, check_bad_images, split_indices
from entrecipes.data.prepared import facts, prepared_table
from entrecipes.data.skeleton import JOINTS, draw_poses
from entrecipes.data.sources import source as find_source
from entrecipes.data.tables import Table, in_memory, require_columns
from entrecipes.errors import UserError, nearest
from entrecipes.fingerprint import fingerprint
from entrecipes.patterns import matches
from entrecipes.recipe.data import ClipsData, VideoData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """One take with the poses in it.

    Attributes:
        name: Unique in its set.
        frames: uint8 [T, 3, S, S].
        numbers: int64 [T], ascending: which frames of the video these are. Where one is left out, no clip runs across.
        keypoints: float32 [T, 13, 3]: x and y in [0, 1] of the square picture, visibility (0 for a missing pose).
        group: What it shares with other videos, such as the motion that they show from other sides: all of a group are
            held out or none. None: nothing.
    """

    name: str
    frames: np.ndarray
    numbers: np.ndarray
    keypoints: np.ndarray
    group: str | None = None


@dataclass(frozen=True)
class Videos:
    """An opened set, not yet cut: the videos asked for, the names of all, and what could not be used, and why.

    `rendered` ones show a drawn figure, no real person.
    """

    name: str
    source: str
    license: str
    place: str
    videos: list[Video]
    names: tuple[str, ...]
    bad: list[str] = field(default_factory=list)
    rendered: bool = False


@dataclass(frozen=True)
class Clip:
    """Which frames (positions in the arrays of video number `video`) are a clip and its reference image."""

    video: int
    frames: np.ndarray
    reference: int


def load(section: ClipsData) -> Splits:
    """Clips of a set that `entrecipes data prepare` has built, by its name or its folder; see [`cut`].

    Raises:
        UserError: It holds no videos, is not prepared or drawn smaller, or [`cut`] refuses.
    """
    noted = facts(Path(section.name))
    source = find_source(noted["name"] if noted else section.name)
    if not source.clips:
        raise UserError(f"data.name: '{section.name}' holds no videos; say data.type: prepared")
    table = prepared_table(section.name, section.image_size)
    whole = read_videos(table, section.image_size, wanted(section))
    return cut(replace(whole, rendered=source.rendered), section)


def wanted(section: VideoData) -> tuple[str, ...]:
    """All patterns of videos that a recipe uses."""
    return section.videos + (section.held_out_videos or ())


def read_videos(table: Table, size: int, patterns: Sequence[str] = ("*",)) -> Videos:
    """The videos in a table with one row a frame: `image`, `video`, `frame`, `keypoints`; decoded frames are cached.

    What stands before the slash in a name (`walk/view0`) is its group: the same motion, or moments.

    Raises:
        UserError: Missing columns.
    """
    dataset, about = table.dataset, (table.name, table.source, table.license, table.place)
    require_columns(dataset.column_names, {"name": "video", "path": "frame", "poses": "keypoints"}, table.place)
    names, numbers = np.array(dataset["video"][:]), np.array(dataset["frame"][:])
    everything = tuple(dict.fromkeys(names.tolist()))
    chosen = np.isin(names, [name for name in everything if matches(name, patterns)])
    if not chosen.all():  # sets are big: decode only what is asked for
        dataset, names, numbers = dataset.select(np.flatnonzero(chosen)), names[chosen], numbers[chosen]
    if not len(dataset):
        return Videos(*about, [], everything)
    rows = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    keypoints = np.array(dataset["keypoints"][:], np.float32).reshape(-1, len(JOINTS), 3)
    decoded = in_memory(
        ImageSet(
            name=table.name,
            source=table.source,
            license=table.license,
            rows=ImageRows(rows, "image", size, 3),
            fingerprint=fingerprint("frames", dataset._fingerprint, size),
            labels=torch.arange(len(dataset)),  # to know the rows of what could be read
            max_bad_images=len(dataset) - 1,
        ),
        table.place,
    )
    kept, frames = decoded.labels.numpy(), decoded.tensor.numpy()
    videos = []
    for name in dict.fromkeys(names.tolist()):
        at = np.flatnonzero(names[kept] == name)
        at = at[np.argsort(numbers[kept][at])]
        videos.append(Video(name, frames[at], numbers[kept][at], keypoints[kept][at], name.split("/")[0]))
    return Videos(*about, videos, everything, decoded.bad_images)


def cut(whole: Videos, section: VideoData) -> Splits:
    """Cut videos into clips, leave out the bad ones, and hold out whole groups of videos.

    A clip is bad when its video (or the stretch of it without gaps) is too short, a frame lacks a pose, or nothing
    moves in it. Held out are the videos that `section.held_out_videos` names, else a share that `section.split_seed`
    draws, whole groups of videos (see [`Video`]).

    Returns:
        Sets with `tensor` uint8 [N, 3, 2F + 1, S, S] (frames, pose maps, reference image) and `keypoints` float32
        [N, F, 13, 3]. The bad ones are in `train.bad_images`.

    Raises:
        UserError: More bad ones than `section.max_bad_clips`, no good ones, or a pattern that no video matches.
    """
    check_patterns(whole, section)
    clips, bad = find_clips(whole, section)
    bad = whole.bad + bad
    check_bad_images(bad, section.max_bad_clips, whole.place, what="bad clips", key="max_bad_clips")
    if bad:
        logger.warning("%d bad clips are left out: %s", len(bad), "; ".join(bad[:20]) + "; ..." * (len(bad) > 20))
    if not clips:
        listed = "".join(f"\n  {name}" for name in bad[:20])
        raise UserError(f"{whole.place}: no clip of {section.frames} frames can be cut from it.{listed}")
    train, held_out = _split(whole, clips, section)
    train_set = assemble(whole, [clips[i] for i in train], section)
    held_out_set = assemble(whole, [clips[i] for i in held_out], section) if held_out else None
    return Splits(replace(train_set, bad_images=bad), held_out_set)


def find_clips(whole: Videos, section: VideoData) -> tuple[list[Clip], list[str]]:
    """(good clips, in the order of the videos; name and reason of each bad one)."""
    clips, bad = [], []
    span = (section.frames - 1) * section.frame_step + 1
    step = section.clip_step or max(1, section.frames * section.frame_step // 2)
    for number, video in enumerate(whole.videos):
        visible = np.nan_to_num(video.keypoints[..., 2]).mean(1) >= section.min_visibility
        breaks = np.flatnonzero(np.diff(video.numbers) != 1) + 1
        for run in np.split(np.arange(len(video.numbers)), breaks):
            where = (
                f"{video.name} frames {video.numbers[run[0]]} to {video.numbers[run[-1]]}" if len(run) else video.name
            )
            if len(run) < span:
                bad.append(f"{where} (too short: {len(run)} frames, a clip spans {span})")
                continue
            for start in range(0, len(run) - span + 1, step):
                at = run[start : start + span : section.frame_step]
                where = f"{video.name} frames {video.numbers[at[0]]} to {video.numbers[at[-1]]}"
                if not visible[at].all():
                    bad.append(f"{where} (no pose in {int((~visible[at]).sum())} of {len(at)} frames)")
                elif (change := motion(video.frames[at])) < section.min_motion:
                    bad.append(f"{where} (still: it changes by {change:.2g} grey levels a frame)")
                else:
                    clips.append(Clip(number, at, _reference(video, at, visible, section)))
    return clips, bad


def motion(frames: np.ndarray) -> float:
    """Mean difference between successive frames [F, 3, S, S] in grey levels; infinite for a single frame."""
    if len(frames) == 1:
        return float("inf")
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def _reference(video: Video, at: np.ndarray, visible: np.ndarray, section: VideoData) -> int:
    """A frame with a pose outside the clip; where there is none, any frame of the clip."""
    if section.reference == "first":
        return int(at[0])
    outside = np.flatnonzero(visible & ((np.arange(len(visible)) < at[0]) | (np.arange(len(visible)) > at[-1])))
    seed = [section.split_seed, zlib.crc32(video.name.encode()), int(video.numbers[at[0]])]
    return int(np.random.default_rng(seed).choice(outside if len(outside) else at))


def check_patterns(whole: Videos, section: VideoData) -> None:
    """Raise UserError for a pattern that matches no video."""
    for key in ("videos", "held_out_videos"):
        for pattern in getattr(section, key) or ():
            if not any(matches(name, [pattern]) for name in whole.names):
                hint = nearest(pattern, whole.names) or "."
                raise UserError(f"data.{key}: {whole.place} has no video called '{pattern}'{hint}")


def _split(whole: Videos, clips: list[Clip], section: VideoData) -> tuple[list[int], list[int]]:
    """Positions in `clips` (to train on, held out)."""
    owners = [whole.videos[clip.video] for clip in clips]
    if section.held_out_videos is None:
        return split_indices(
            len(clips),
            section.held_out,
            section.split_seed,
            groups=[video.group or video.name for video in owners],
            max_images=section.max_images,
            place=whole.place,
        )
    order = np.sort(np.random.default_rng(section.split_seed).permutation(len(clips))[: section.max_images])
    held_out = [int(i) for i in order if matches(owners[i].name, section.held_out_videos)]
    train = sorted(set(order.tolist()) - set(held_out))
    train = [i for i in train if matches(owners[i].name, section.videos)]
    if not train:
        raise UserError(f"data.held_out_videos: {whole.place} has no clip left to train on")
    return train, held_out


def assemble(whole: Videos, clips: list[Clip], section: VideoData) -> ImageSet:
    """Clips, at least one, as a set in memory; see [`cut`] for its fields."""
    count, size = section.frames, section.image_size
    tensor = torch.empty(len(clips), 3, 2 * count + 1, size, size, dtype=torch.uint8)
    places = torch.empty(len(clips), count, len(JOINTS), 3)
    maps: dict[int, np.ndarray] = {}
    for clip, pixels, joints in zip(clips, tensor.numpy(), places.numpy(), strict=True):
        video = whole.videos[clip.video]
        if clip.video not in maps:  # clips of a video overlap and come in a row: draw its poses once
            maps = {clip.video: draw_poses(video.keypoints, size)}
        pixels[:, :count] = video.frames[clip.frames].transpose(1, 0, 2, 3)
        pixels[:, count:-1] = maps[clip.video][clip.frames].transpose(1, 0, 2, 3)
        pixels[:, -1] = video.frames[clip.reference]
        joints[:] = video.keypoints[clip.frames]
    return ImageSet(
        name=whole.name,
        source=whole.source,
        license=whole.license,
        tensor=tensor,
        keypoints=places,
        fingerprint=fingerprint(tensor, places),
        rendered=whole.rendered,
    )
