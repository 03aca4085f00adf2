"""A tiny model of each family with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tiny_inputs import HEADS, IMAGE, IMAGE_AND_TEXT, MASK, PACKED, TEXT, TIME, TOKENS, Tiny, noise
from tiny_video_models import allegro, cogvideox, hunyuan_video, latte, ltx, mochi, wan
from torch import Tensor, nn

from entrecipes.models.sequence import SequenceTransformer1DModel


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


def flux(kind: str = "Flux", axes: tuple[int, ...] = (2, 2, 4), **config: Any) -> Tiny:
    """Flux and the classes made after it."""
    options = {"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 16}
    model = getattr(diffusers, f"{kind}Transformer2DModel")(**HEADS, **options, axes_dims_rope=axes, **config)
    ids = torch.arange(len(axes) * TOKENS).reshape(TOKENS, -1) / 4
    inputs = PACKED | {"timestep": TIME / 1000, "img_ids": ids, "txt_ids": 0 * ids}
    inputs |= {"pooled_projections": noise(2, 16)} if kind == "Flux" else {}
    return model, inputs | ({"guidance": TIME / 100} if kind == "Flux2" else {})


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


def lumina2() -> Tiny:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(8, 8, 8),
        cap_feat_dim=16,
    )
    return model, IMAGE_AND_TEXT | {"encoder_attention_mask": MASK}


def prx() -> Tiny:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, num_heads=2, depth=3, axes_dim=[4, 4]
    )
    return model, IMAGE_AND_TEXT | {"timestep": TIME / 1000}


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
    "flux": lambda: flux(pooled_projection_dim=16),
    "flux2": lambda: flux("Flux2", (2, 2, 2, 2), timestep_guidance_channels=16),
    "bria": lambda: flux("Bria"),
    "ovis": lambda: flux("OvisImage", out_channels=16),
    "longcat": lambda: flux("LongCatImage"),
    "auraflow": auraflow,
    "qwen": qwen,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "prx": prx,
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
