"""`entrecipes generate`: images from a trained pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from entrecipes.cli import clips, stickers
from entrecipes.errors import UserError
from entrecipes.recipe.load import import_plugins
from entrecipes.reference import HELP as PIPELINE

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

HELP = "sample images (or sequences, clips, stickers) from a run folder, a pipeline folder or a Hub id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("pipeline", help=PIPELINE)
    parser.add_argument("-n", "--count", type=int, help="images (default 40), clips (default 4, or 1 of --poses)")
    parser.add_argument("--labels", help="classes asked for, such as 3,1,4; they repeat in turn (default: all in turn)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument(
        "--guidance-scale", type=float, default=1.0, help="classifier-free guidance; 1 is off (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i starts from seed + i (default 0)")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time (default 100)")
    parser.add_argument(
        "--offload",
        choices=("model", "group"),
        help="keep weights in the host's memory: all but the model that computes, or all but the layer (slower)",
    )
    parser.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="grid to write (default samples.png; clips: samples.gif, .mp4 or .png; stickers: also .webp, .apng)",
    )
    parser.add_argument("--separate", type=Path, metavar="FOLDER", help="also write every image into this folder")
    clips.add_arguments(parser)
    stickers.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb."""
    from entrecipes.diffusion.families import family_of_pipeline
    from entrecipes.diffusion.pipelines import best_device, load_pipeline
    from entrecipes.evaluation.generation import generate
    from entrecipes.report.plots import save_grid

    if min(1 if args.count is None else args.count, args.steps, args.batch_size) < 1:
        raise UserError("--count, --steps and --batch-size must be at least 1")
    if args.output and args.output.suffix not in stickers.OUTPUTS:
        raise UserError(
            f"--output {args.output}: name it .png (a grid or film strips) or, for clips, .gif or .mp4 (stickers: also "
            ".webp or .apng)"
        )
    if (recipe := Path(args.pipeline) / "recipe.yaml").is_file():
        import_plugins(recipe)
    pipeline = load_pipeline(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, best_device(), args)
    family = family_of_pipeline(pipeline)
    if args.guidance_scale != 1 and not family.guidance:
        raise UserError(f"--guidance-scale: {type(pipeline).__name__} has no guidance; leave it out")
    if family.kind in ("clips", "stickers"):
        _labels(args.labels, None, 0)
        args.output = args.output or Path("samples.gif")
    if family.kind == "stickers":
        return stickers.run(args, pipeline, family)
    if options := stickers.asked_for(args):
        raise UserError(f"{', '.join(options)}: {type(pipeline).__name__} makes no stickers; leave them out")
    if family.kind == "clips":
        return clips.run(args, pipeline, family)
    args.count, args.output = args.count or 40, args.output or Path("samples.png")
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: the grid is a PNG; name it {args.output.with_suffix('.png')}")
    if args.reference or args.poses:
        raise UserError(f"--reference, --poses: {type(pipeline).__name__} makes no clips; leave them out")
    num_classes = family.num_classes(family.denoiser(pipeline))
    labels = _labels(args.labels, num_classes, args.count)
    images = generate(
        pipeline,
        family,
        labels,
        args.count,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    space = family.space(family.denoiser(pipeline))
    pictures = space.pictures(images)
    save_grid(pictures, args.output, columns=min(space.columns, args.count), texts=space.texts(images))
    print(f"{len(images)} {family.kind} in {args.output}" + (f", classes {sorted(set(labels))}" if labels else ""))
    if args.separate:
        from PIL import Image

        args.separate.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pictures):
            pixels = image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
                args.separate / f"{i:05d}.png"
            )
        print(f"each of them in {args.separate}/")
    return 0


def place(pipeline: DiffusionPipeline, device: torch.device, args: argparse.Namespace) -> None:
    """Bring a pipeline to the device as the options say. Raises UserError where they can't help."""
    from entrecipes.evaluation.generation import offload

    if args.vae_tiling:
        if not hasattr(vae := getattr(pipeline, "vae", None), "enable_tiling"):
            raise UserError(f"--vae-tiling: this {type(pipeline).__name__} has no VAE that can; leave it out")
        vae.enable_tiling()
    if args.offload is None:
        pipeline.to(device)
    elif device.type == "cpu":
        raise UserError(
            f"--offload {args.offload}: there is no GPU here, so that all weights are in the host's memory as it is; "
            "leave it out, and take a smaller --batch-size if memory is short"
        )
    else:
        offload(pipeline, args.offload, device)


def _labels(text: str | None, num_classes: int | None, count: int) -> list[int] | None:
    """The class of every image."""
    if num_classes is None:
        if text:
            raise UserError("--labels: this pipeline is unconditional; leave it out")
        return None
    try:
        wanted = [int(part) for part in text.split(",")] if text else list(range(min(num_classes, 10)))
    except ValueError:
        raise UserError(f"--labels: '{text}' is not a list of whole numbers such as 3,1,4") from None
    if bad := [label for label in wanted if not 0 <= label < num_classes]:
        raise UserError(f"--labels: {bad[0]} is not a class of this pipeline (0 to {num_classes - 1})")
    return [wanted[i % len(wanted)] for i in range(count)]
