"""`entrecipes generate` for clips: what is asked for, from files or the run's own data, and what is written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.errors import UserError
from entrecipes.recipe.load import load
from entrecipes.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from entrecipes.diffusion.families import Family
    from entrecipes.models.pose_video import PoseVideoPipeline

OWN_CLIPS = 4
"""How many of the run's own clips are taken when nothing is said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only clips are asked for with."""
    clips = parser.add_argument_group("clips of a person (without these: poses and people of the run's held-out clips)")
    clips.add_argument("--reference", type=Path, metavar="PICTURE", help="the person")
    clips.add_argument(
        "--poses", type=Path, metavar="FILE", help="pose maps as GIF, MP4 or folder of pictures; or NAME.poses.json"
    )
    clips.add_argument("--frames", type=int, metavar="N", help="frames of a clip (default: as in training)")
    clips.add_argument(
        "--frame-step", type=int, default=1, metavar="N", help="take every N-th pose of --poses (default 1)"
    )


def run(args: argparse.Namespace, pipeline: PoseVideoPipeline, family: Family) -> int:
    """Sample and write clips, each beside what it was asked for with."""
    from entrecipes.evaluation.generation import generate
    from entrecipes.evaluation.grid import SEEN_PIXELS
    from entrecipes.evaluation.side_by_side import moving, strips
    from entrecipes.report.plots import save_grid, save_moving

    reference, poses = _asked(args)
    try:
        condition = _condition(pipeline, reference, poses, args.batch_size)
        samples = generate(
            pipeline,
            family,
            condition,
            len(poses),
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=args.seed,
            batch_size=args.batch_size,
        )
    except ValueError as error:  # a size that the pipeline does not take
        raise UserError(f"{args.pipeline}: {error}; take other --frames, or poses of another size") from error
    shown, scale = (reference, poses, samples), max(1, SEEN_PIXELS // samples.shape[-1])
    if args.output.suffix == ".png":
        save_grid(strips(*shown), args.output, columns=1, scale=scale)
    else:
        save_moving(moving(*shown), args.output, scale)
    print(f"{len(samples)} clips of {samples.shape[2]} frames in {args.output}: reference, poses, generated")
    if args.separate:
        for i, clip in enumerate(samples):
            path = args.separate / f"{i:05d}{args.output.suffix}"
            if path.suffix == ".png":
                save_grid(clip.transpose(0, 1), path, columns=clip.shape[1], scale=1, gap=0)
            else:
                save_moving(clip.transpose(0, 1), path, scale=1)
        print(f"each of them in {args.separate}/")
    return 0


def _asked(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """References uint8 [n, 3, H, W] and pose maps uint8 [n, 3, F, H, W]."""
    if (args.reference is None) != (args.poses is None):
        raise UserError("--reference and --poses go together: the person, and how to move; or leave out both")
    if min(1 if args.frames is None else args.frames, args.frame_step) < 1:
        raise UserError("--frames and --frame-step must be at least 1")
    recipe = own_recipe(args.pipeline, "clips")
    if args.poses is None:
        return _own_clips(args, recipe)
    size = recipe.data.image_size if recipe else None
    poses = _read_poses(args.poses, size, args.reference)[:: args.frame_step]
    frames = args.frames or (recipe.data.frames if recipe else len(poses))
    if len(poses) < frames:
        step = f" with --frame-step {args.frame_step}" if args.frame_step > 1 else ""
        raise UserError(
            f"--poses {args.poses}: {len(poses)} poses{step}, but a clip has {frames} frames; give more, or --frames "
            f"{len(poses)}"
        )
    count = args.count or 1
    reference = _read_picture(args.reference, poses.shape[-1])[None].expand(count, -1, -1, -1)
    return reference, poses[:frames].transpose(0, 1)[None].expand(count, -1, -1, -1, -1)


def own_recipe(source: str, kind: str) -> Recipe | None:
    """The recipe in a run folder or a published pipeline, if it is about this kind of data."""
    path = Path(source) / "recipe.yaml"
    recipe = load(str(path)).recipe if path.exists() else None
    return recipe if recipe and recipe.data.kind == kind else None


def _own_clips(args: argparse.Namespace, recipe: Recipe | None) -> tuple[Tensor, Tensor]:
    """Of the run's own data: held-out clips, where there are any, drawn as its evaluation draws them."""
    import torch

    from entrecipes.diffusion.space import clip_parts
    from entrecipes.evaluation.drawing import draw
    from entrecipes.recipe.base import build

    if recipe is None:
        raise UserError(f"{args.pipeline}: no run folder with clips of its own; give --reference and --poses")
    count = args.count or OWN_CLIPS
    splits = build("data", recipe.data)
    drawn, _ = draw(splits.held_out or splits.train, count, recipe.evaluation.seed)
    _, poses, reference = clip_parts(drawn[torch.arange(count) % len(drawn)])
    if (args.frames or 1) > poses.shape[2]:
        raise UserError(f"--frames {args.frames}: the run's own clips have {poses.shape[2]}; give --poses")
    return reference, poses[:, :, : args.frames]


def _condition(pipeline: PoseVideoPipeline, reference: Tensor, poses: Tensor, batch_size: int) -> Tensor:
    """What the pipeline encodes of both, in batches, on the CPU."""
    import torch

    parts = []
    for start in range(0, len(poses), batch_size):
        rows = slice(start, start + batch_size)
        signed = [part[rows].to(pipeline._execution_device).float() / 127.5 - 1 for part in (poses, reference)]
        with torch.inference_mode():
            parts.append(pipeline.encode_condition(*signed).cpu())
    return torch.cat(parts)


def _read_picture(path: Path, size: int) -> Tensor:
    """uint8 [3, size, size]. Raises UserError."""
    import torch
    from PIL import Image

    from entrecipes.data.images import fit_image, why_unreadable

    try:
        with Image.open(path) as image:
            return torch.from_numpy(fit_image(image, size, 3))
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        why = "no such file" if isinstance(error, FileNotFoundError) else why_unreadable(error)
        raise UserError(f"{path}: no picture can be read ({why}); give a PNG or JPEG") from None


def _read_poses(path: Path, size: int | None, reference: Path) -> Tensor:
    """Pose maps uint8 [T, 3, S, S]; S is `size`, else that of the maps, or for joints that of the reference's picture.

    Raises:
        UserError: For what is neither video, folder of pictures nor joints.
    """
    import torch
    from PIL import Image

    from entrecipes.data.images import fit_image
    from entrecipes.data.skeleton import draw_poses
    from entrecipes.data.video_files import SUFFIXES, BadVideo, read_video
    from entrecipes.data.video_folder import read_keypoints

    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
            size = size or (_side(files[0]) if files else 0)
            maps = [_read_picture(file, size) for file in files]
        elif not path.is_file():
            raise BadVideo("no such file or folder")
        elif path.suffix == ".json":
            keypoints = read_keypoints(json.loads(path.read_text(encoding="utf-8")))
            maps = list(torch.from_numpy(draw_poses(keypoints, size or _side(reference))))
        elif path.suffix.lower() in SUFFIXES:
            frames = [Image.fromarray(frame) for frame in read_video(path)]
            size = size or min(frames[0].size)
            maps = [torch.from_numpy(fit_image(frame, size, 3)) for frame in frames]
        else:
            raise BadVideo("neither a video, a folder of pictures nor NAME.poses.json")
    except (BadVideo, ValueError, OSError) as error:
        raise UserError(f"--poses {path}: {error}; give a GIF, an MP4, a folder of PNGs or NAME.poses.json") from None
    if not maps:
        raise UserError(f"--poses {path}: no pictures in it; give pose maps 000.png, 001.png, ...")
    return torch.stack(maps)


def _side(path: Path) -> int:
    """The short side of a picture. Raises OSError."""
    from PIL import Image

    with Image.open(path) as image:
        return min(image.size)
