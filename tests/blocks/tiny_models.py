"""A tiny model of each family with inputs for it; text and image are of equal length where a family has both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from entrecipes.models.sequence import SequenceTransformer1DModel

TOKENS = 4
Tiny = tuple[nn.Module, dict[str, Any]]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TIME = torch.tensor([500, 20])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE, VIDEO, TEXT = noise(2, 4, 4, 4), noise(2, 4, 2, 4, 4), noise(2, TOKENS, 16)
PACKED = {"hidden_states": noise(2, TOKENS, 16), "encoder_hidden_states": TEXT}
IMAGE_AND_TEXT = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": TIME}
VIDEO_AND_TEXT = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": TIME}
MASK = torch.ones(2, TOKENS, dtype=torch.bool)


def dit() -> Tiny:
    model = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=4, sample_size=4, num_embeds_ada_norm=1000
    )
    return model, {"hidden_states": IMAGE, "timestep": TIME, "class_labels": torch.tensor([1, 3])}


def pixart() -> Tiny:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, num_layers=3, sample_size=4, cross_attention_dim=16, caption_channels=16
    )
    return model, IMAGE_AND_TEXT | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def sd3(dual: tuple[int, ...] = ()) -> Tiny:
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    return model, IMAGE_AND_TEXT | {"pooled_projections": noise(2, 16)}


def flux() -> Tiny:
    model = diffusers.FluxTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    ids = torch.arange(3 * TOKENS).reshape(TOKENS, 3) / 3
    return model, PACKED | {
        "pooled_projections": noise(2, 16),
        "timestep": TIME / 1000,
        "img_ids": ids,
        "txt_ids": 0 * ids,
    }


def flux2() -> Tiny:
    model = diffusers.Flux2Transformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    ids = torch.arange(4 * TOKENS).reshape(TOKENS, 4) / 4
    return model, PACKED | {"timestep": TIME / 1000, "guidance": TIME / 100, "img_ids": ids, "txt_ids": 0 * ids}


def auraflow() -> Tiny:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=4,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return model, IMAGE_AND_TEXT | {"timestep": TIME / 1000}


def qwen() -> Tiny:
    model = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
    )
    return model, PACKED | {
        "encoder_hidden_states_mask": MASK,
        "timestep": TIME / 1000,
        "img_shapes": [[(1, 2, 2)]] * 2,
    }


def cogview4() -> Tiny:
    model = diffusers.CogView4Transformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=3, text_embed_dim=16, time_embed_dim=16, condition_dim=4
    )
    size = torch.tensor([[4.0, 4.0]] * 2)
    return model, IMAGE_AND_TEXT | {"original_size": size, "target_size": size, "crop_coords": 0 * size}


def sana() -> Tiny:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
    )
    return model, IMAGE_AND_TEXT


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
        video_length=2,
        norm_elementwise_affine=False,
        attention_bias=True,
    )
    return model, VIDEO_AND_TEXT


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


def sequence() -> Tiny:
    model = SequenceTransformer1DModel(sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=8)
    return model, {"sample": noise(2, 4, 8), "timestep": TIME}


def unet(attention_last: bool = False, **config: Any) -> Tiny:
    """Attention in the first two of three down blocks (as in SD 1 and 2), or the last two (as in SDXL)."""
    config = config or {
        "transformer_layers_per_block": [[2, 1], 1, 3],
        "reverse_transformer_layers_per_block": [1, 2, [1, 2, 1]],
    }
    types = ["CrossAttn", "CrossAttn"]
    types.insert(0 if attention_last else 2, "")
    defaults = {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in types),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(types)),
    }
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        **(defaults | config),
    )
    return model, {"sample": noise(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": TEXT}


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd35": lambda: sd3(dual=(0, 2)),
    "flux": flux,
    "flux2": flux2,
    "auraflow": auraflow,
    "qwen": qwen,
    "cogview4": cogview4,
    "sana": sana,
    "latte": latte,
    "cogvideox": cogvideox,
    "allegro": allegro,
    "wan": wan,
    "ltx": ltx,
    "hunyuan_video": hunyuan_video,
    "mochi": mochi,
    "sequence": sequence,
    "unet": unet,
    "unet_attention_last": lambda: unet(attention_last=True),
}


def build(family: str) -> Tiny:
    """The model in eval mode, no weight at zero, so that every block counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval(), inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
