"""Sticker runs side by side: the same held-out clips by each, as an animation and as film strips.

    python scripts/show_stickers.py outputs/compare/stickers/runs/*/seed-0 -o stickers.png

writes stickers.png and stickers.gif: the real clips, then those of each run, in the order given (runs of one
`evaluation.seed`, so that all were asked for the same clips).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from entrecipes.diffusion.space import PixelSpace
from entrecipes.errors import UserError
from entrecipes.evaluation.side_by_side import beside, under
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load
from entrecipes.report.plots import save_grid, save_moving


def main(runs: list[Path], count: int, output: Path) -> None:
    """Sample `count` clips from each run, as its recipe's evaluation says, and write both pictures."""
    from entrecipes.data.text import TextEncoders, embed
    from entrecipes.diffusion.families import family_of_pipeline
    from entrecipes.diffusion.pipelines import load_pipeline
    from entrecipes.evaluation.drawing import asked, draw
    from entrecipes.evaluation.generation import generate

    shown: list[Tensor] = []
    for run in runs:
        recipe, pipeline = load(run / "recipe.yaml").recipe, load_pipeline(str(run))
        pipeline.set_progress_bar_config(disable=True)
        section = recipe.evaluation
        images = build("data", recipe.data, image_size=pipeline.unet.config.sample_size).held_out
        images = replace(images, text=embed(images.captions, TextEncoders.of(pipeline)))
        drawn, indices = draw(images, count, section.seed)
        samples = generate(
            pipeline,
            family_of_pipeline(pipeline),
            asked(PixelSpace().encode(drawn), images, indices, section.task),
            len(drawn),
            steps=section.steps,
            guidance_scale=section.guidance_scale,
            seed=section.seed,
            batch_size=section.batch_size,
            frame_guidance_scale=section.frame_guidance_scale,
        )
        shown += [drawn, samples] if not shown else [samples]
    save_grid(under(*shown), output, columns=1, scale=2)
    save_moving(beside(*shown), output.with_suffix(".gif"), scale=2)
    names = ", ".join(["real", *(str(run) for run in runs)])
    print(f"{output} (from the top) and {output.with_suffix('.gif')} (from the left): {names}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders, on pixels")
    parser.add_argument("-n", "--count", type=int, default=6, help="clips (default 6)")
    parser.add_argument("-o", "--output", type=Path, default=Path("stickers.png"), help="film strips to write")
    args = parser.parse_args()
    try:
        main(args.runs, args.count, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
