"""A tiny model of each video family, with inputs for it."""

from __future__ import annotations

import diffusers
import torch
from tiny_inputs import HEADS, MASK, PACKED, TIME, TOKENS, VIDEO, VIDEO_AND_TEXT, Tiny, noise


def latte() -> Tiny:
    model = diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=4,
        num_layers=3,
        sample_size=4,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        video_length=4,
        norm_elementwise_affine=False,
        attention_bias=True,
    )
    return model, VIDEO_AND_TEXT | {"hidden_states": noise(2, 4, 4, 4, 4)}  # as many frames as tokens in a frame


def cogvideox() -> Tiny:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        text_embed_dim=16,
        time_embed_dim=16,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=TOKENS,
    )
    return model, VIDEO_AND_TEXT | {"hidden_states": VIDEO.transpose(1, 2)}


def allegro() -> Tiny:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=24,
        caption_channels=16,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
    )
    places = torch.arange(2 * TOKENS)[None]
    rope = ((noise(2 * TOKENS, 4), noise(2 * TOKENS, 4)),) * 3, (places,) * 3
    return model, VIDEO_AND_TEXT | {"image_rotary_emb": rope}


def wan() -> Tiny:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
    )
    return model, VIDEO_AND_TEXT


def ltx() -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, num_layers=3, cross_attention_dim=16, caption_channels=16
    )
    return model, PACKED | {
        "timestep": TIME,
        "encoder_attention_mask": MASK,
        "num_frames": 1,
        "height": 2,
        "width": 2,
    }


def hunyuan_video() -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    return model, VIDEO_AND_TEXT | {
        "hidden_states": VIDEO[:, :, :1],
        "encoder_attention_mask": MASK,
        "pooled_projections": noise(2, 16),
        "guidance": TIME,
    }


def mochi() -> Tiny:
    model = diffusers.MochiTransformer3DModel(
        **HEADS,
        in_channels=4,
        num_layers=3,
        pooled_projection_dim=16,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=TOKENS,
    )
    return model, VIDEO_AND_TEXT | {"hidden_states": VIDEO[:, :, :1], "encoder_attention_mask": MASK}
