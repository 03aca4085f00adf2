"""Turn an original DiT or SiT checkpoint into a pipeline that plain diffusers loads.

    python scripts/convert_dit.py DiT-XL-2-256x256.pt outputs/dit-xl-256 --type dit --vae stabilityai/sd-vae-ft-ema
    python scripts/convert_dit.py SiT-XL-2-256x256.pt outputs/sit-xl-256 --type sit --vae stabilityai/sd-vae-ft-ema

CHECKPOINT is a released `.pt` of github.com/facebookresearch/DiT or github.com/willisma/SiT, what their `train.py`
saves, or such weights as safetensors. OUTPUT samples with `DiffusionPipeline.from_pretrained(OUTPUT)`, and recipes
train it on with `pipeline: {pretrained: OUTPUT}`. Exit code: 0, or 2 for a file that can't be converted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from diffusers import AutoencoderKL

from entrecipes.diffusion.convert import KINDS, convert_dit, read_checkpoint
from entrecipes.diffusion.pipelines import load_vae
from entrecipes.errors import UserError
from entrecipes.reference import split


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--type", choices=KINDS, required=True, help="the two can't be told apart by their weights")
    parser.add_argument(
        "--vae", help="folder or Hub id (owner/name, owner/name@revision) of the VAE; left out for a model of pixels"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a training checkpoint, take the averaged weights (the default) or the raw",
    )
    parser.add_argument("--num-attention-heads", type=int, help="for a width other than those of S, B, L and XL")
    arguments = parser.parse_args()
    if arguments.output.exists() and not (arguments.output.is_dir() and not any(arguments.output.iterdir())):
        raise UserError(f"{arguments.output}: exists already; give a new folder")
    state = read_checkpoint(arguments.checkpoint, arguments.ema)
    vae = load_vae(AutoencoderKL, *split(arguments.vae)) if arguments.vae else None
    try:
        pipeline = convert_dit(state, arguments.type, vae=vae, num_attention_heads=arguments.num_attention_heads)
    except UserError as error:
        raise UserError(f"{arguments.checkpoint}: {error}") from error
    pipeline.save_pretrained(arguments.output)
    print(f"{arguments.output}: {sum(p.numel() for p in pipeline.transformer.parameters()):,} weights")
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("entrecipes").setLevel(logging.INFO)
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
