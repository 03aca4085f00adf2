"""Tiny real recipes, one a method and choice, that are trained by one process and by two and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL
from moving import figures
from PIL import Image
from tiny import DIT, EDM, FLOW, SEQUENCE, TEXT, UNET, tiny, tiny_recipe
from tiny_dfgn import CONFIG, shake
from tiny_stickers import FRAMES, as_list, save_stickers
from tiny_text import save_tiny_text
from tiny_video import WAN, wan_vae

from entrecipes.diffusion.pipelines import load_components

Recipe = dict[str, Any]

VP = {"class": "DDIMScheduler", "config": {"beta_schedule": "squaredcos_cap_v2"}}
EULER = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}}
STILL = {**UNET, "config": {**UNET["config"], "dropout": 0.0}}
WIDE = {**UNET, "config": {**STILL["config"], "block_out_channels": [16, 16], "norm_num_groups": 8}}
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 6}}
WORDS = {**SEQUENCE, "config": {**SEQUENCE["config"], "dropout": 0.0}}
LEARNED = {"type": "infonoise", "warmup": 32, "ramp": 32, "refresh_every": 32, "buffer": 100}
DRAWS = {"images": 9, "noise_levels": 4}
"""An odd number: shares of two processes differ in length."""
SHORT = {"images": 128, "checkpoint_every": 64, "clip_grad_norm": 1.0}


class Places:
    """What recipes need beside themselves, made when first asked for.

    Args:
        folder: Where it is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _made(self, name: str, make: Callable[[Path], object]) -> str:
        path = self.folder / name
        if not path.exists():
            make(path)
        return str(path)

    @property
    def base(self) -> str:
        """A DiT of 6 blocks as a pipeline, no block at zero."""

        def make(path: Path) -> None:
            components = load_components(tiny_recipe(DEEP, FLOW).pipeline)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weight in components.model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
            components.pipeline().save_pretrained(path)

        return self._made("base", make)

    @property
    def stickers(self) -> str:
        """A prepared set of stickers."""
        return self._made("stickers", save_stickers) + "/set"

    @property
    def text(self) -> str:
        """A text encoder."""
        return self._made("bert", save_tiny_text)

    @property
    def sticker_base(self) -> str:
        """A sticker pipeline, nothing in it at zero."""

        def make(path: Path) -> None:
            components = load_components(type(tiny_recipe()).model_validate(stickers(self)).pipeline)
            shake(components.model)
            components.pipeline().save_pretrained(path)

        return self._made("sticker_base", make)

    @property
    def vae(self) -> str:
        """A VAE of images that halves their sides."""

        def make(path: Path) -> None:
            torch.manual_seed(0)
            AutoencoderKL(
                in_channels=1,
                out_channels=1,
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2,
                block_out_channels=[4, 4],
                norm_num_groups=2,
                latent_channels=3,
            ).save_pretrained(path)

        return self._made("vae", make)

    @property
    def video_vae(self) -> str:
        """A VAE of clips."""
        return self._made("video_vae", lambda path: wan_vae().save_pretrained(path))

    @property
    def videos(self) -> str:
        """Three GIFs of 16 frames with their poses."""

        def make(path: Path) -> None:
            path.mkdir()
            clips, keypoints = figures(3, 16, size=16)
            for i in range(3):
                first, *rest = (Image.fromarray(frame) for frame in clips[i].permute(1, 2, 3, 0).numpy())
                first.save(path / f"take{i}.gif", save_all=True, append_images=rest, duration=100)
                (path / f"take{i}.poses.json").write_text(json.dumps(keypoints[i].tolist()))

        return self._made("videos", make)

    @property
    def pictures(self) -> str:
        """44 images of two classes as a data set of parquet files, for streams."""

        def make(path: Path) -> None:
            random = np.random.default_rng(0)
            pixels = [random.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(44)]
            rows = [{"image": Image.fromarray(image), "label": i % 2} for i, image in enumerate(pixels)]
            names = datasets.ClassLabel(names=["cat", "dog"])
            features = datasets.Features({"image": datasets.Image(), "label": names})
            path.mkdir()
            datasets.Dataset.from_list(rows, features=features).to_parquet(path / "train.parquet")

        return self._made("pictures", make)

    @property
    def files(self) -> str:
        """The same as a folder of files."""

        def make(path: Path) -> None:
            random = np.random.default_rng(0)
            for i in range(44):
                file = path / ("cat", "dog")[i % 2] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)

        return self._made("files", make)


def images(model: Recipe = STILL, scheduler: Recipe = EDM, **sections: Any) -> Recipe:
    """A short run on digits."""
    sections["training"] = SHORT | sections.get("training", {})
    held_out = {"images": 9, "noise_levels": 4}
    sections["evaluation"] = {"held_out": held_out} | sections.get("evaluation", {})
    return tiny(model, scheduler, **sections)


def opening(blocks: Recipe, **sections: Any) -> Recipe:
    """A run that opens blocks of a DiT."""
    keys = {"type": "entprog", "step": 0.17, **blocks}
    if keys.get("growth", "adaptive") == "adaptive":
        keys = {"holdout": DRAWS, **keys} if keys.get("mode") == "snapshot" else {"holdout": DRAWS, "burst": 1, **keys}
    if keys.get("order") not in ("random", "last_first", "first_first"):
        keys = {"draws": DRAWS, **keys}
    sections["training"] = {"images": 256, "checkpoint_every": 128} | sections.get("training", {})
    return images(DEEP, FLOW, blocks=keys, **sections)


def pruned(prune: Recipe, **sections: Any) -> Recipe:
    """A run that removes blocks of a DiT."""
    draws = {} if prune["type"] == "written" or prune.get("score") in ("random", "spread") else {"draws": DRAWS}
    return images(DEEP, FLOW, prune={**draws, **prune}, **sections)


def on(base: str, recipe: Recipe) -> Recipe:
    """The same recipe, begun from a published pipeline."""
    return recipe | {"pipeline": {"pretrained": base}}


def adapted(places: Places, adapter: Recipe, **sections: Any) -> Recipe:
    """A run that trains an adapter beside a DiT."""
    return on(places.base, images(DEEP, FLOW, blocks={"type": "all", "adapter": adapter}, **sections))


def stickers(places: Places, config: Recipe | None = None, **sections: Any) -> Recipe:
    """A short run on drawn stickers."""
    model = {"class": "DFGNModel", "config": {k: as_list(v) for k, v in (CONFIG | (config or {})).items()}}
    sections = {
        "data": {"type": "stickers", "name": places.stickers, "frames": FRAMES, "held_out": 0.25},
        "masks": {"type": "dual", "lengths": [2, FRAMES]},
        **sections,
        "training": {"images": 64, "batch_size": 8, "log_every": 8} | sections.get("training", {}),
        "evaluation": {"held_out": {"images": 3, "noise_levels": 4}, "batch_size": 4, "grid": 2, "task": "it2v"}
        | sections.get("evaluation", {}),
    }
    recipe = tiny(model, FLOW, **sections)
    recipe["pipeline"]["build"]["text"] = [{"id": places.text, "tokens": 5}]
    return recipe


def clips(places: Places, latents: bool = False, **sections: Any) -> Recipe:
    """A short run on clips of a stick figure."""
    config = WAN | ({"in_channels": 12, "out_channels": 4} if latents else {})
    data = {"type": "video_folder", "path": places.videos, "image_size": 16, "frames": 5 if latents else 4}
    recipe = tiny(
        {"class": "WanTransformer3DModel", "config": config},
        EULER,
        **{
            "data": data | {"frame_step": 1, "min_motion": 0.0, "held_out": 0.3},
            **sections,
            "training": {"images": 64, "batch_size": 8, "log_every": 8} | sections.get("training", {}),
            "evaluation": {"held_out": {"images": 3, "noise_levels": 4}, "grid": 2, "batch_size": 4}
            | sections.get("evaluation", {}),
        },
    )
    if latents:
        recipe["pipeline"]["build"]["vae"] = places.video_vae
    return recipe


def on_latents(recipe: Recipe, vae: str) -> Recipe:
    """The same recipe behind a VAE."""
    recipe["pipeline"]["build"]["vae"] = vae
    return recipe


FEW = {"metrics_every": 64, "samples": 11, "reference_samples": 13, "reference": "held_out", "batch_size": 4}
SEARCH = {
    "rounds": 2,
    "candidates": 2,
    "recovery": {"steps": 1, "batch_size": 4},
    "draws": {"images": 5, "noise_levels": 4},
    "tolerance": 0.1,
}
VOTE = {"samples": 3, "batches": 2, "batch_size": 4}
ENTPRUNER = {"type": "entpruner", "stages": 3, "until": 0.7, "vote": VOTE}
SMALL = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "patch_size": 1}
LATENTS = {**DIT, "config": {**DIT["config"], **SMALL}}

CASES: dict[str, Callable[[Places], Recipe]] = {
    # noise
    **{
        f"noise {name}": lambda places, name=name, scheduler=scheduler: images(
            scheduler=scheduler, noise={"type": name}
        )
        for name, scheduler in {
            "uniform": VP,
            "cosine": VP,
            "log_uniform": EDM,
            "log_normal": EDM,
            "logit_normal": FLOW,
            "mode": FLOW,
        }.items()
    },
    "noise loss_aware": lambda places: images(
        scheduler=VP, noise={"type": "loss_aware", "bins": 4, "history": 2, "refresh_every": 32}
    ),
    "infonoise": lambda places: images(noise=LEARNED, training={"images": 192}),
    "infonoise discrete": lambda places: images(
        scheduler=FLOW,
        data={"type": "digits", "max_images": 200, "binarize": True},
        noise=LEARNED | {"new_weight": 0.5, "weight_compensation": "full"},
        training={"images": 192},
    ),
    # training
    "label dropout, flip, micro batches": lambda places: images(
        DIT,
        VP,
        data={"type": "digits", "max_images": 200, "horizontal_flip": True},
        training={"label_dropout": 0.3, "micro_batch_size": 4},
        evaluation={"guidance_scale": 1.5, "every": 32},
        noise=LEARNED,
    ),
    "no average, checkpointing, channels last": lambda places: images(
        training={"ema": None, "gradient_checkpointing": True, "channels_last": True}
    ),
    "bf16": lambda places: images(WORDS, FLOW, data=TEXT, training={"precision": "bf16", "ema": {"half_life": 50}}),
    "adamw8bit": lambda places: images(WIDE, optimizer={"type": "adamw8bit", "learning_rate": 1e-3}),
    "sgd": lambda places: images(
        optimizer={
            "type": "torch", "name": "SGD", "options": {"momentum": 0.9}, "learning_rate": 0.05,
            "schedule": {"decay": "cosine", "warmup": 32},
        }
    ),  # fmt: skip
    # blocks
    "staged": lambda places: images(
        blocks={
            "type": "staged",
            "stages": [
                {"train": ["up_blocks.*", "conv_out.*"]},
                {"from_images": 48, "train": ["*"]},
                {"from_images": 96, "train": ["down_blocks.*"]},
            ],
        }
    ),
    "entprog, as published": lambda places: opening({"supernet": 0.5}, noise=LEARNED),
    "entprog, cost aware": lambda places: opening(
        {"order": "cost_aware", "inputs": "never", "largest": 0.67, "final": "search", "rerank": True}
    ),
    "entprog, snapshots": lambda places: opening(
        {"mode": "snapshot", "order": "loss_rise", "supernet": 0.75, "inputs": "never"}
    ),
    "entprog, linear taylor": lambda places: opening({"growth": "linear", "order": "taylor", "rerank": True}),
    "entprog, linear random": lambda places: opening({"growth": "linear", "order": "random"}),
    "entprog, last first, measured": lambda places: opening({"order": "last_first", "clock": "measured"}),
    "entprog, first first, at once": lambda places: opening(
        {"growth": "none", "order": "first_first", "largest": 0.5, "stages": 1}
    ),
    # adapters
    "lora": lambda places: adapted(places, {"type": "lora", "rank": 2}),
    "qlora": lambda places: adapted(places, {"type": "qlora", "rank": 2}),
    "bitfit": lambda places: adapted(places, {"type": "bitfit"}),
    "difffit": lambda places: adapted(places, {"type": "difffit"}),
    "lora in snapshots": lambda places: on(
        places.base,
        opening(
            {"mode": "snapshot", "order": "last_first", "largest": 0.67, "adapter": {"type": "lora", "rank": 2}}
        ),
    ),
    # pruning
    "prune written": lambda places: pruned({"type": "written", "remove": [2, 3]}),
    "prune one_shot": lambda places: on(
        places.base, pruned({"type": "one_shot", "score": "bi", "at": 0.3, "distill": {"weight": 0.5}})
    ),
    "prune linear": lambda places: on(
        places.base,
        pruned({"type": "linear", "score": "taylor", "stages": 2, "until": 0.6, "rerank": "block", "rewarmup": 32}),
    ),
    "prune random": lambda places: pruned({"type": "linear", "score": "random", "stages": 2, "until": 0.6}),
    "entpruner": lambda places: on(places.base, pruned(ENTPRUNER | {"score": "ced"}, noise=LEARNED)),
    "entpruner by information, taught": lambda places: pruned(
        ENTPRUNER | {"score": "information", "distill": {"weight": 0.1}}, noise=LEARNED
    ),
    # samples
    "masks": lambda places: stickers(places, masks={"type": "none"}),
    **{
        f"masks dual, {name}": lambda places, name=name: stickers(
            places, curriculum={"type": name}, noise=LEARNED | {"warmup": 16, "refresh_every": 16}
        )
        for name in ("none", "linear", "adaptive", "entropy")
    },
    "masks dual as published": lambda places: stickers(
        places,
        masks={
            "type": "dual",
            "lengths": [2, FRAMES],
            "draw": "batch",
            "normalize": "paper",
            "given_frames": "skip",
            "token_dropout": 0.2,
        },
        curriculum={"type": "entropy"},
    ),
    "masks dual, adaptive, raw": lambda places: stickers(
        places,
        masks={"type": "dual", "lengths": [2, FRAMES], "normalize": "paper", "uncond": 0.0},
        curriculum={"type": "adaptive", "scores": "raw", "history": 10, "smoothing": 0.0},
        training={"images": 160, "micro_batch_size": 2},
    ),
    "simda": lambda places: on(
        places.sticker_base, stickers(places, blocks={"type": "all", "adapter": {"type": "simda"}})
    ),
    "i2v adapter": lambda places: on(
        places.sticker_base, stickers(places, blocks={"type": "all", "adapter": {"type": "i2v_adapter"}})
    ),
    "phases": lambda places: clips(
        places,
        curriculum={
            "type": "phases",
            "phases": [
                {"frames": 1, "poses": False, "train": ["*proj_out*", "blocks.1.*"]},
                {"from_images": 24, "frames": 2},
                {"from_images": 40},
            ],
        },
        noise=LEARNED | {"warmup": 16, "refresh_every": 16},
    ),
    # data
    "latents": lambda places: on_latents(
        images(LATENTS, VP, data={"type": "digits", "max_images": 200, "horizontal_flip": True}), places.vae
    ),
    "clips": lambda places: clips(places),
    "clips on latents": lambda places: clips(places, latents=True),
    "sequences": lambda places: images(
        WORDS, FLOW, data=TEXT, evaluation={"metrics": ["ngrams"], **FEW, "reference": "held_out"}
    ),
    "stream": lambda places: images(
        data={"type": "hub", "id": places.pictures, "streaming": True, "shuffle_buffer": 8, "max_images": 44},
        training={"images": 96},
    ),
    "stream, read ahead": lambda places: images(
        data={
            "type": "hub", "id": places.pictures, "streaming": True, "shuffle_buffer": 8, "max_images": 44,
            "num_workers": 2, "horizontal_flip": True,
        },
        training={"images": 96},
    ),  # fmt: skip
    "files": lambda places: images(
        data={"type": "folder", "path": places.files, "on_device": "never", "num_workers": 1, "held_out": 0.2},
        training={"images": 96},
    ),
    # measures
    "metrics of images": lambda places: images(
        scheduler=FLOW, training={"images": 64}, evaluation={"metrics": ["fid", "kid", "precision_recall"], **FEW}
    ),
    "metrics of clips": lambda places: clips(
        places,
        evaluation={
            "metrics": ["ssim", "psnr", "perceptual", "kid", "fvd", "motion", "pose"],
            "samples": 5,
            "reference": "held_out",
            "pose": {"images": 64},
        },
    ),
    "metrics of stickers": lambda places: stickers(
        places,
        data={"type": "stickers", "name": places.stickers, "frames": FRAMES, "held_out": 0.6},
        evaluation={
            "metrics": ["kid", "fvd", "text", "consistency", "motion", "given"],
            "samples": 5,
            "reference": "held_out",
            "text_features": {"type": "caption_alignment", "steps": 10},
        },
    ),
    # experts
    "tdc": lambda places: tiny(
        WIDE, VP, experts={"type": "tdc", "groups": 2, "k": 0.7, "search": SEARCH}, training={"images": 480}
    ),
    "tdc by information": lambda places: tiny(
        WIDE,
        VP,
        experts={
            "type": "tdc", "groups": 2, "k": 0.7, "by": "information", "search": SEARCH | {"criterion": "taylor"},
        },
        training={"images": 960},
    ),
}  # fmt: skip
