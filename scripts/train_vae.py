"""Train a small AutoencoderKL on a recipe's images, for latent diffusion without a published VAE.

    python scripts/train_vae.py composed/pretrain -o outputs/composed/vae data.max_images=10k

Takes the recipe's `data:` section, in the size and channels given here; what is saved is an ordinary diffusers model,
with a scaling factor under which its latents have deviation 1. Prints the held-out error at the end. No perceptual and
no adversarial loss: latents to experiment with, not to publish pictures from. Exit code: 0, or 2 for what does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import mse_loss

from entrecipes.data.images import ImageSet
from entrecipes.data.loader import batches
from entrecipes.diffusion.pipelines import best_device
from entrecipes.errors import UserError
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load

CHECKED = 512
"""Images that the error and the deviation are measured on."""


def signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, C, H, W] -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def main(args: argparse.Namespace) -> None:
    """Train, measure, save."""
    section, device = load(args.recipe, args.overrides).recipe.data, best_device()
    if section.kind != "images":
        raise UserError(f"data.type: {section.type} holds {section.kind}; a VAE is trained on images")
    splits = build("data", section, image_size=args.size, channels=args.channels)
    torch.manual_seed(args.seed)
    levels = len(args.widths)
    vae = AutoencoderKL(
        in_channels=args.channels,
        out_channels=args.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=args.widths,
        layers_per_block=1,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        sample_size=args.size,
        mid_block_add_attention=False,
    ).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.images // args.batch_size + 1)
    drawn = batches(splits.train, seed=args.seed, batch_size=args.batch_size, device=device)
    for _ in range(0, args.images, args.batch_size):
        x = signed(next(drawn).images)
        posterior = vae.encode(x).latent_dist
        loss = (
            mse_loss(vae.decode(posterior.sample()).sample, x) + args.kl_weight * posterior.kl().mean() / x[0].numel()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    checked: ImageSet = splits.held_out or splits.train
    x = signed(torch.stack([checked.image(i) for i in range(min(CHECKED, len(checked)))])).to(device)
    with torch.no_grad():
        posterior = vae.eval().encode(x).latent_dist
        error = mse_loss(vae.decode(posterior.mode()).sample, x).item()
        vae.register_to_config(scaling_factor=1 / posterior.sample().std().item())
    vae.save_pretrained(args.output)
    whose = "held-out" if splits.held_out else "training"
    shape = "x".join(map(str, posterior.mean.shape[1:]))
    print(f"{args.output}: latents {shape}, mean squared error {error:.4f} on {len(x)} {whose} images in [-1, 1]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="whose data section is trained on")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32, help="pixels (%(default)s)")
    parser.add_argument("--channels", type=int, default=1, help="of the images (%(default)s)")
    parser.add_argument("--latent-channels", type=int, default=4, help="(%(default)s)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 32, 32], help="of the levels; each but the last halves"
    )
    parser.add_argument("--images", type=int, default=60_000, help="to train on (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    try:
        main(parser.parse_intermixed_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
