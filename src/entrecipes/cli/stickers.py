"""`entrecipes generate` for stickers: from texts, given frames or the run's own held-out clips to animations."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.cli.clips import OWN_CLIPS, own_recipe
from entrecipes.errors import UserError
from entrecipes.recipe.masks import GIVEN, TASKS, Task, follows_text, given_at

if TYPE_CHECKING:
    from torch import Tensor

    from entrecipes.diffusion.families import Family
    from entrecipes.models.sticker import StickerPipeline
    from entrecipes.recipe.schema import Recipe

OUTPUTS = (".gif", ".webp", ".apng", ".mp4", ".png")
SEE_THROUGH = (".webp", ".apng", ".gif")
FRAMES, FPS = 8, 8.0
"""Where neither the command nor a recipe says more."""
ONLY = ("prompt", "frame", "task", "frame_guidance_scale", "pin", "transparent", "fps")
"""Options that only stickers have."""


@dataclass(frozen=True)
class Wanted:
    """The stickers that are asked for."""

    prompts: list[str] | None
    """A text each; None: none."""
    given: Tensor
    """Which frames are given, bool [n, F]."""
    pictures: Tensor
    """uint8 [n, 3, F, H, W], of which the given frames are shown to the model."""
    real: Tensor | None
    """What it would be in truth, of the same shape, where that is known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only stickers are asked for with; `--frames` is the clips' one."""
    group = parser.add_argument_group(
        "stickers (without --prompt and --frame: captions and frames of the run's held-out clips)"
    )
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a text, or @FILE with one a line; repeatable")
    group.add_argument(
        "--frame",
        action="append",
        metavar="INDEX=PICTURE",
        help="a given frame, such as 0=first.png; -1 is the last one, clip.gif#2 frame 2 of an animation; repeatable",
    )
    parser._negative_number_matcher = re.compile(r"-\d")  # `-1=last.png` is no option; argparse asks whether it may be
    group.add_argument("--task", choices=TASKS, help="what is asked of held-out clips (default: as the run evaluates)")
    group.add_argument("--frame-guidance-scale", type=float, metavar="SCALE", help="guidance to given frames; 1 is off")
    group.add_argument(
        "--pin", action="store_true", help="given frames stay pixel for pixel (not in a GIF: 256 colours)"
    )
    group.add_argument("--transparent", action="store_true", help="no white background (.webp, .apng or .gif)")
    group.add_argument("--fps", type=float, help=f"frames a second (default {FPS:g})")


def asked_for(args: argparse.Namespace) -> list[str]:
    """The options in `args` that only stickers have."""
    return [f"--{name.replace('_', '-')}" for name in ONLY if getattr(args, name) not in (None, False)]


def run(args: argparse.Namespace, pipeline: StickerPipeline, family: Family) -> int:
    """Sample and write stickers, each beside what it was asked for with."""
    from entrecipes.evaluation.grid import SEEN_PIXELS
    from entrecipes.evaluation.side_by_side import hide

    _check(args)
    wanted = _wanted(args, pipeline)
    try:
        samples = _sample(args, pipeline, family, wanted)
    except ValueError as error:  # what does not fit the models
        raise UserError(f"{args.pipeline}: {error}") from error
    shown = {"given": hide(wanted.pictures, wanted.given)} if wanted.given.any() else {}
    shown |= {} if wanted.real is None else {"real": wanted.real}
    shown |= {"generated": samples}
    _write(list(shown.values()), args.output, args, scale=max(1, SEEN_PIXELS // samples.shape[-1]))
    print(f"{len(samples)} stickers of {samples.shape[2]} frames in {args.output}: {', '.join(shown)}")
    if wanted.prompts:
        texts = args.output.with_suffix(".txt")
        texts.write_text("\n".join(wanted.prompts) + "\n", encoding="utf-8")
        print(f"their texts, from the top, in {texts}")
    if args.separate:
        for i, clip in enumerate(samples):
            _write([clip[None]], args.separate / f"{i:05d}{args.output.suffix}", args, scale=1, gap=0)
        print(f"each of them in {args.separate}/")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.reference or args.poses or args.frame_step != 1:
        raise UserError("--reference, --poses, --frame-step: this pipeline takes no poses; give --frame, or --prompt")
    if any(number is not None and number <= 0 for number in (args.frames, args.fps)):
        raise UserError("--frames and --fps must be above 0")
    if args.transparent and args.output.suffix not in SEE_THROUGH:
        raise UserError(f"--transparent: {args.output} can't be; name it {', '.join(SEE_THROUGH)}")


def _wanted(args: argparse.Namespace, pipeline: StickerPipeline) -> Wanted:
    """Of the user's texts and frames, or of the run's own clips."""
    from entrecipes.data.text import TextEncoders

    recipe, size, told = own_recipe(args.pipeline, "stickers"), _side(pipeline), TextEncoders.of(pipeline) is not None
    if args.prompt is None and args.frame is None and args.task != "uncond":
        return _own(args, recipe, size, told)
    prompts = _prompts(args.prompt or [])
    if prompts and not told:
        raise UserError(f"--prompt: {args.pipeline} has no text encoder; leave it out")
    frames = args.frames or (recipe.data.frames if recipe else FRAMES)
    given, pictures = _given(args.frame or [], frames, size)
    if args.task and not fits(args.task, given.tolist(), bool(prompts)):
        text = "a --prompt" if args.task in ("t2v", "it2v") else "no --prompt" if not follows_text(args.task) else ""
        asks = " and ".join(filter(None, (f"{GIVEN[args.task]} of {frames}", text)))
        raise UserError(f"--task {args.task}: asks for {asks}; give that, or leave out --task")
    count = args.count or max(1, len(prompts))
    texts = [prompts[i % len(prompts)] for i in range(count)] if prompts else None
    return Wanted(texts, given.expand(count, -1), pictures.expand(count, -1, -1, -1, -1), None)


def _own(args: argparse.Namespace, recipe: Recipe | None, size: int, told: bool) -> Wanted:
    """Held-out clips of the run, where there are any, drawn as its evaluation draws them."""
    import torch

    from entrecipes.evaluation.drawing import draw
    from entrecipes.recipe.base import build

    if recipe is None:
        raise UserError(f"{args.pipeline}: no run folder with stickers of its own; give --prompt, --frame or both")
    splits = build("data", recipe.data, image_size=size)
    images, count = splits.held_out or splits.train, args.count or OWN_CLIPS
    drawn, indices = draw(images, count, recipe.evaluation.seed)
    frames = args.frames or drawn.shape[2]
    if frames > drawn.shape[2]:
        raise UserError(f"--frames {frames}: the run's own clips have {drawn.shape[2]}; give --prompt or --frame")
    task, turn = args.task or recipe.evaluation.task, torch.arange(count) % len(drawn)
    real = drawn[turn][:, :, :frames]
    prompts = [images.captions[indices[i]] for i in turn.tolist()] if told and follows_text(task) else None
    return Wanted(prompts, torch.tensor(given_at(task, frames)).expand(count, -1), real, real)


def fits(task: Task, given: Sequence[bool], text: bool) -> bool:
    """Whether the task is asked with these frames of a clip, and with or without a text."""
    places = [place for place, there in enumerate(given) if there]
    together = bool(places) and len(places) == places[-1] - places[0] + 1 < len(given)
    if task in ("t2v", "it2v") and not text or task in ("i2v", "uncond") and text:
        return False
    if task in ("i2v", "it2v"):
        return len(places) == 1
    if task == "interpolation":
        return bool(places) and not together and len(places) < len(given)
    if task == "pre_frame_prediction":
        return together and given[-1]
    if task == "post_frame_prediction":
        return together and given[0]
    return not places


def _prompts(texts: Sequence[str]) -> list[str]:
    """The texts, of a file `@FILE` its lines. Raises UserError."""
    prompts: list[str] = []
    for text in texts:
        lines = [text]
        if text.startswith("@"):
            try:
                lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "no UTF-8 text"
                raise UserError(f"--prompt {text}: {why}; give a file with one text a line") from None
        prompts += filter(None, map(str.strip, lines))
    if texts and not prompts:
        raise UserError("--prompt: there is no text in it; give one, or leave it out")
    return prompts


def _given(frames: Sequence[str], count: int, size: int) -> tuple[Tensor, Tensor]:
    """Which of `count` frames are given, bool [F], and their pictures uint8 [3, F, size, size]. Raises UserError."""
    import torch

    given, pictures = torch.zeros(count, dtype=torch.bool), torch.full((3, count, size, size), 255, dtype=torch.uint8)
    for text in frames:
        number, equals, path = text.partition("=")
        try:
            place = int(number)
        except ValueError:
            equals = ""
        if not (equals and path):
            raise UserError(f"--frame {text}: write INDEX=PICTURE, such as 0=first.png")
        if not -count <= place < count:
            raise UserError(f"--frame {text}: a clip has frames 0 to {count - 1}, or -{count} to -1 from its end")
        if given[place]:
            raise UserError(f"--frame {text}: frame {place % count} is given twice; leave one out")
        pictures[:, place], given[place] = _picture(path, size, text), True
    return given, pictures


def _picture(name: str, size: int, text: str) -> Tensor:
    """A picture, or with `#N` frame N of an animation, on a white square: uint8 [3, size, size]. Raises UserError."""
    import torch

    from entrecipes.data.sticker_files import SUFFIXES, BadSticker, read_sticker

    path, number = Path(name), 0
    file, _, after = name.rpartition("#")
    if not path.is_file() and file and after.isdecimal():
        path, number = Path(file), int(after)
    if not path.is_file():
        raise UserError(f"--frame {text}: {path} is no file; give a PNG, JPEG, GIF or WebP")
    try:
        if path.suffix.lower() not in SUFFIXES:
            raise BadSticker("not an image")
        frames = read_sticker(path, path.suffix.lower(), size).frames
    except BadSticker as error:
        raise UserError(f"--frame {text}: {path} can't be read ({error}); give a PNG, JPEG, GIF or WebP") from None
    if number >= len(frames):
        raise UserError(f"--frame {text}: {path} has {len(frames)} frame(s), 0 to {len(frames) - 1}")
    return torch.from_numpy(frames[number]).permute(2, 0, 1)


def _side(pipeline: StickerPipeline) -> int:
    """Of the frames that the pipeline makes, in pixels."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def _sample(args: argparse.Namespace, pipeline: StickerPipeline, family: Family, wanted: Wanted) -> Tensor:
    """uint8 [n, 3, F, H, W]; sticker i starts from the seed `--seed` + i. Raises ValueError."""
    import torch

    count, clips = len(wanted.given), []
    pictures = wanted.pictures / 255
    for start in range(0, count, args.batch_size):
        rows = range(start, min(start + args.batch_size, count))
        output = pipeline(
            prompt=[wanted.prompts[i] for i in rows] if wanted.prompts else None,
            frames=[{f: pictures[i, :, f] for f in wanted.given[i].nonzero().flatten().tolist()} for i in rows],
            num_frames=wanted.given.shape[1],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            frame_guidance_scale=1.0 if args.frame_guidance_scale is None else args.frame_guidance_scale,
            pin=args.pin,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in rows],
            output_type=family.output_type,
        )
        clips.append(family.as_held(output).cpu())
    return torch.cat(clips)


def _write(columns: Sequence[Tensor], path: Path, args: argparse.Namespace, scale: int, gap: int = 4) -> None:
    """Clips uint8 [n, 3, F, H, W] beside each other: film strips in a PNG, or an animation."""
    from PIL import Image

    from entrecipes.evaluation.side_by_side import beside, under
    from entrecipes.models.sticker_io import save_animation
    from entrecipes.report.plots import save_grid, save_moving

    fps = args.fps or FPS
    if path.suffix == ".png":
        save_grid(under(*columns), path, columns=1, scale=scale, gap=gap)
    elif path.suffix == ".mp4":
        save_moving(beside(*columns), path, scale, fps)
    else:
        frames = beside(*map(_cleared, columns) if args.transparent else columns).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(frame) for frame in frames.contiguous().numpy()]
        size = pictures[0].width * scale, pictures[0].height * scale
        save_animation([picture.resize(size, Image.Resampling.NEAREST) for picture in pictures], path, fps)


def _cleared(clips: Tensor) -> Tensor:
    """uint8 [n, 3, F, H, W] to [n, 4, F, H, W] with a see-through background."""
    import numpy as np
    import torch
    from PIL import Image

    from entrecipes.models.sticker_io import clear_background

    frames = clips.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().numpy()
    cleared = [np.asarray(clear_background(Image.fromarray(frame))) for frame in frames]
    return torch.from_numpy(np.stack(cleared)).unflatten(0, clips.shape[0:3:2]).permute(0, 4, 1, 2, 3)
