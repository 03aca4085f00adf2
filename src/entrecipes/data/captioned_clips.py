"""Prepared videos as captioned clips: what a text-to-video model is pre-trained on before it sees a sticker."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from entrecipes.data.clips import Clip, Videos, check_patterns, find_clips, read_videos
from entrecipes.data.images import ImageSet, Splits, check_bad_images, split_indices
from entrecipes.data.prepared import facts, prepared_table
from entrecipes.data.sources import source as find_source
from entrecipes.data.stickers import motion_ranks
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import CaptionedClipsData, ClipsData

logger = logging.getLogger(__name__)

SIZE = 32
"""Side of the frames where neither the recipe nor the model says it."""


def load(section: CaptionedClipsData, *, image_size: int | None = None) -> Splits:
    """Clips of a set of videos that `entrecipes data prepare` has built, held out by whole motions.

    Args:
        image_size: Side of the frames where `section.image_size` is null.

    Returns:
        Sets with `tensor` uint8 [N, 3, F, S, S], `captions`, `lengths` (all F), `motion`. Still clips are bad ones.

    Raises:
        UserError: It holds no videos, is not prepared or drawn smaller, a pattern that no video matches, no good
            clips, or more bad ones than `section.max_bad_clips`.
    """
    noted = facts(Path(section.name).expanduser())
    source = find_source(noted["name"] if noted else section.name)
    if not source.clips:
        raise UserError(f"data.name: '{section.name}' holds no videos; say data.type: prepared")
    size = section.image_size or image_size or SIZE
    shared = {"held_out", "split_seed", "max_images", "name", "frames", "frame_step", "clip_step", "videos"}
    keys = ClipsData(**section.model_dump(include=shared), image_size=size, min_visibility=0, reference="first")
    whole = replace(read_videos(prepared_table(section.name, size), size, keys.videos), rendered=source.rendered)
    check_patterns(whole, keys)
    clips, bad = find_clips(whole, keys)
    bad = whole.bad + bad
    check_bad_images(bad, section.max_bad_clips, whole.place, what="bad clips", key="max_bad_clips")
    if bad:
        logger.warning("%d bad clips are left out: %s", len(bad), "; ".join(bad[:20]) + "; ..." * (len(bad) > 20))
    if not clips:
        raise UserError(f"{whole.place}: no clip of {section.frames} frames can be cut from it: {'; '.join(bad[:20])}")
    parts = split_indices(
        len(clips),
        section.held_out,
        section.split_seed,
        groups=[whole.videos[clip.video].group for clip in clips],
        max_images=section.max_images,
        place=whole.place,
    )
    sets = [_image_set(whole, [clips[i] for i in part], section.caption) if part else None for part in parts]
    return Splits(replace(sets[0], bad_images=bad), sets[1])


def _image_set(whole: Videos, clips: list[Clip], caption: str) -> ImageSet:
    frames = [whole.videos[clip.video].frames[clip.frames].swapaxes(0, 1) for clip in clips]
    tensor = torch.from_numpy(np.stack(frames))
    motions = [whole.videos[clip.video].name.split("/")[0].replace("_", " ") for clip in clips]
    captions = [caption.replace("{motion}", motion) for motion in motions]
    lengths = torch.full((len(clips),), tensor.shape[2])
    return ImageSet(
        name=whole.name,
        source=whole.source,
        license=whole.license,
        tensor=tensor,
        captions=captions,
        lengths=lengths,
        motion=motion_ranks(tensor, lengths),
        fingerprint=fingerprint(tensor, captions, lengths),
        rendered=whole.rendered,
    )
