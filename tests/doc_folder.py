"""What the code blocks of the documentation find in their folder: small pipelines, data and runs, by their names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from tiny import DIT, FLOW, UNET, tiny
from tiny_stickers import save_stickers, train_stickers

from entrecipes import ExpertsPipeline, TimestepExperts
from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.recipe.load import load
from entrecipes.recipe.tree import to_yaml
from entrecipes.training.launch import run_recipe

SMALL_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def make_prepared(folder: Path) -> None:
    """Make it all in a new folder: pipelines, tensors, pictures, finished runs, and the demo's recipe."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(**{**DIT["config"], "num_layers": 6}).eval()
    DiTPipeline(transformer=dit, scheduler=DDIMScheduler(), vae=build_pixel_vae(1, 8)).save_pretrained(
        folder / "my-dit"
    )
    torch.save((torch.randn(80, 1, 8, 8), torch.arange(80) % 10), folder / "some-of-my-data.pt")
    DDIMPipeline(UNet2DModel(**SMALL_UNET), DDIMScheduler()).save_pretrained(folder / "my-pipeline")
    torch.save(2 * torch.rand(64, 1, 8, 8) - 1, folder / "my-data.pt")
    clips, lengths = 2 * torch.rand(6, 3, 8, 8, 8) - 1, torch.tensor([8, 8, 8, 8, 5, 1])
    torch.save((clips, lengths, torch.randn(6, 4, 12)), folder / "my-stickers.pt")
    for name in ("me.png", "heart.png", "first.png", "last.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "demo.yaml").symlink_to(load("digits/demo").path.resolve())
    (folder / "recipes").symlink_to(Path(__file__).parents[1] / "recipes")
    (folder / "scripts").symlink_to(Path(__file__).parents[1] / "scripts")
    (folder / "outputs/stickers").mkdir(parents=True)
    train_stickers(folder / "outputs/stickers", save_stickers(folder / "outputs/stickers"), "scratch-rdtf")
    experts = TimestepExperts(
        [UNet2DModel(**SMALL_UNET, num_class_embeds=10) for _ in range(5)], boundaries=[800, 600, 400, 200]
    )
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    ExpertsPipeline(experts, scheduler).save_pretrained(folder / "outputs/tdc/digits_unet/pipeline")
    _run(folder, "digits/demo", tiny(UNET))
    _run(folder, "digits/dit", tiny({**DIT, "config": {**DIT["config"], "num_layers": 6}}, FLOW))


def _run(folder: Path, name: str, recipe: dict) -> None:
    """A finished run of a small recipe in outputs/NAME."""
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(recipe))
    run_recipe(load(path, [f"training.output={folder / 'outputs' / name}"]))
    os.unlink(path)
