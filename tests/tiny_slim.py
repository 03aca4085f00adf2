"""Small UNets and DiTs with everything that can be cut, and weights under which all of it counts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from torch import Tensor

PLAIN = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "scale_shift": PLAIN
    | {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_scale_factor": 1.4,
        "num_class_embeds": 10,
        "dropout": 0.1,
    },
    "skip": PLAIN
    | {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 32),
        "time_embedding_type": "fourier",
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
}
DITS: dict[str, dict[str, Any]] = {
    name: {
        "sample_size": 8,
        "in_channels": 1,
        "num_attention_heads": 4,
        "attention_head_dim": 4,
        "num_layers": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "activation_fn": name,
    }
    for name in ("gelu-approximate", "geglu")
}
ALL = [*UNETS, *DITS]


def network(name: str) -> ModelMixin:
    """One of `ALL`, in eval mode."""
    torch.manual_seed(0)
    model = UNet2DModel(**UNETS[name]) if name in UNETS else DiTTransformer2DModel(**DITS[name])
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            mean = 1.0 if "norm" in key and key.endswith("weight") and parameter.ndim == 1 else 0.0
            torch.nn.init.normal_(parameter, mean, 0.1)
    return model.eval()


def predict(model: ModelMixin, n: int = 2) -> Tensor:
    """The prediction for fixed inputs [n, 1, 8, 8]."""
    config, generator = model.config, torch.Generator().manual_seed(n)
    labelled = "num_embeds_ada_norm" in config or config.get("num_class_embeds")
    labels = {"class_labels": torch.arange(n)} if labelled else {}
    channels = config.in_channels
    return model(torch.randn(n, channels, 8, 8, generator=generator), 1.0 + torch.arange(n), **labels).sample


def one(model: ModelMixin) -> Tensor:
    """The prediction of one sample."""
    return predict(model, 1)
