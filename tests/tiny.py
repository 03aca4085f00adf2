"""A recipe small enough to train in seconds, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from entrecipes.recipe.schema import Recipe

if TYPE_CHECKING:
    from entrecipes.training.run import Run

UNET = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 10,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "dropout": 0.1,
    },
}
DIT = {
    "class": "DiTTransformer2DModel",
    "config": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_embeds_ada_norm": 1000,
    },
}
SEQUENCE = {
    "class": "SequenceTransformer1DModel",
    "config": {
        "sample_size": 16,
        "alphabet": " abcdefghijklmnopqrstuvwxyz",
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "dropout": 0.1,
    },
}
TEXT = {"type": "sequences", "max_images": 200}
EDM = {"class": "EDMEulerScheduler"}
FLOW = {
    "class": "DPMSolverMultistepScheduler",
    "config": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
}


def tiny(model: dict[str, Any] = UNET, scheduler: dict[str, Any] = EDM, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a mapping; `sections` replace or extend the defaults one key deep."""
    recipe: dict[str, Any] = {
        "description": "tiny",
        "pipeline": {"build": {"model": model, "scheduler": scheduler}},
        "data": {"type": "digits", "max_images": 200},
        "noise": {"type": "log_normal"},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "training": {
            "images": 160,
            "batch_size": 16,
            "log_every": 16,
            "checkpoint_every": 48,
            "cpu_threads": 1,
            "ema": {"half_life": 100},
        },
        "evaluation": {"held_out": {"images": 8, "noise_levels": 4}, "every": 64, "steps": 2, "grid": 1},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if "type" not in section else section
    return recipe


def tiny_recipe(*args: Any, **kwargs: Any) -> Recipe:
    """The same, validated."""
    return Recipe.model_validate(tiny(*args, **kwargs))


def state(run: Run) -> dict[str, torch.Tensor]:
    """A run's weights, their average and the optimizer's moments."""
    parts = {"model": run.model.state_dict(), "ema": run.ema.state_dict()}
    moments = run.optimizer.optimizer.state_dict()["state"]
    parts |= {f"moments {i}": {k: v for k, v in of.items() if torch.is_tensor(v)} for i, of in moments.items()}
    return {f"{part} {name}": value.clone() for part, of in parts.items() for name, value in of.items()}
