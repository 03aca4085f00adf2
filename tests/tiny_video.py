"""A Wan transformer and a Wan VAE that are small enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 9,
    "out_channels": 3,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan(**config: Any) -> WanTransformer3DModel:
    """A random transformer whose output depends on everything; on pixels, if not said otherwise."""
    torch.manual_seed(0)
    return WanTransformer3DModel(**(WAN | config)).eval()


def wan_vae(channels: int = 4) -> AutoencoderKLWan:
    """A random VAE with Wan's factors: 8 in space, 4 in time; the latents' channels are scaled unlike each other."""
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.linspace(-0.2, 0.3, channels).tolist(),
        latents_std=torch.linspace(0.5, 2.0, channels).tolist(),
    ).eval()
