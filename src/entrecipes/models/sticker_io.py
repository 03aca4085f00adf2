"""What goes into a sticker's pipeline and comes out: texts, pictures, animations.

Of torch, diffusers, transformers and PIL alone, since this file travels beside the weights with the pipeline's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageChops, ImageDraw, ImageOps
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEAR_WHITE = 240
"""The least value of red, green and blue that can be background."""


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    encoders: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    tokens: Sequence[int],
    device: torch.device | None = None,
) -> Tensor:
    """Last hidden states of frozen text encoders, one encoder's tokens after the other's: float16 [n, T, D].

    T is the sum of `tokens`, D the widest encoder's hidden size; narrower states are followed by zeros. Padding is
    zeros, and an empty caption nothing but zeros: that is how a model is told that there is no text (RDTF). It is on
    `device`, where encoders that are offloaded compute; None: where they are.
    """
    wide, there = max(encoder.config.hidden_size for encoder in encoders), [bool(text.strip()) for text in captions]
    parts = []
    for encoder, tokenizer, length in zip(encoders, tokenizers, tokens, strict=True):
        words = tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        ids, mask = (words[name].long().to(device or encoder.device) for name in ("input_ids", "attention_mask"))
        rows = mask.any(1) & torch.tensor(there, device=mask.device)
        part = torch.zeros(len(captions), length, wide, dtype=torch.float16, device=mask.device)
        if rows.any():  # some encoders refuse a batch without tokens
            states = encoder(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state.to(part)
            states = states.masked_fill(mask[rows, :, None] == 0, 0)
            part[rows, : states.shape[1], : states.shape[2]] = states
        parts.append(part)
    return torch.cat(parts, dim=1)


def place_frames(frames: Any, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The given pictures at their places [m, 3, F, H, W] in [0, 1], and which are given, bool [m, F]."""
    clips = [frames or {}] if frames is None or isinstance(frames, Mapping) else list(frames)
    pictures, given = torch.zeros(len(clips), 3, count, height, width), torch.zeros(len(clips), count).bool()
    for row, clip in enumerate(clips):
        for number, picture in clip.items():
            if not -count <= number < count:
                raise ValueError(f"frames: there is no frame {number} in a clip of {count}")
            if given[row, number]:
                raise ValueError(f"frames: frame {number % count} is given twice, also as {number % count - count}")
            pictures[row, :, number], given[row, number] = _pixels(picture, height, width), True
    return pictures, given


def as_asked(video: Tensor, output_type: str, transparent: bool) -> Any:
    """[n, 3, F, H, W] in [0, 1] as `output_type` asks."""
    if output_type == "pt":
        return video.transpose(1, 2)
    clips = video.permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "np":
        return clips
    lists = [DiffusionPipeline.numpy_to_pil(clip) for clip in clips]
    return [[clear_background(picture) for picture in clip] for clip in lists] if transparent else lists


def save_animation(frames: Sequence[Image.Image], path: str | Path, fps: float = 8) -> Path:
    """Write pictures, RGB or with transparency, as an endless animation: a .gif, .webp, .apng or .png (APNG).

    Raises:
        ValueError: For another ending of `path`, or without pictures.
    """
    path = Path(path)
    options: dict[str, dict[str, Any]] = {".gif": {"disposal": 2}, ".webp": {"lossless": True}, ".apng": {}, ".png": {}}
    if path.suffix.lower() not in options or not frames:
        raise ValueError(f"{path}: give at least one picture, and a path that ends in {', '.join(options)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    rest, duration = list(frames[1:]), round(1000 / fps)
    frames[0].save(path, save_all=True, append_images=rest, duration=duration, loop=0, **options[path.suffix.lower()])
    return path


def clear_background(picture: Image.Image) -> Image.Image:
    """RGB to RGBA: near-white that is connected with the border becomes transparent, white inside stays."""
    red, green, blue = picture.convert("RGB").split()
    least = ImageChops.darker(ImageChops.darker(red, green), blue)
    white = least.point(lambda value: 255 if value >= NEAR_WHITE else 0)
    white = ImageOps.expand(white, 1, 255)  # one pixel all around joins what touches the border
    ImageDraw.floodfill(white, (0, 0), 128)
    alpha = ImageOps.crop(white, 1).point(lambda value: 0 if value == 128 else 255)
    picture = picture.convert("RGB")
    picture.putalpha(alpha)
    return picture


def _pixels(picture: Any, height: int, width: int) -> Tensor:
    """[3, H, W] in [0, 1]."""
    if isinstance(picture, Tensor):
        if picture.shape != (3, height, width):
            raise ValueError(f"frames: a tensor of {list(picture.shape)}, not of [3, {height}, {width}]; resize it")
        return picture.float()
    if not isinstance(picture, Image.Image):
        raise ValueError(f"frames: give PIL images or tensors [3, H, W] in [0, 1], not {type(picture).__name__}")
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.size != (width, height):
        picture = ImageOps.pad(picture, (width, height), Image.Resampling.BICUBIC, "white")  # as stickers are prepared
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(picture))[0]
