"""Layers of the Discrete Frame Generation Network (arXiv 2503.17735), and its stages, of these and diffusers' blocks.

Of torch and diffusers alone, since this file travels beside the weights with the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from torch import Tensor, nn
from torch.nn import functional

STI_HEAD_DIM = 32
"""Channels of a head of the attention in an STI layer."""
LONGEST = 64
"""Frames that sinusoidal positions are made for."""


def few_heads(channels: int) -> int:
    """8 heads as published, fewer in narrow nets."""
    return max(1, min(8, channels // STI_HEAD_DIM))


class TimeConv(nn.Conv3d):
    """A (3, 1, 1) convolution as one over frames and pixels, which CPUs run two to three times faster."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clip: Tensor) -> Tensor:
        """[n, C, F, h, w]."""
        hidden = functional.conv2d(clip.flatten(3), self.weight[..., 0], self.bias, padding=(1, 0))
        return hidden.unflatten(3, clip.shape[3:])


class SharedText(AttnProcessor2_0):
    """Attention of all frames of a clip to its text, whose keys and values are made once."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[n * F, pixels, C] and text [n, T, D] to [n * F, pixels, C]."""
        clips = hidden_states.reshape(len(encoder_hidden_states), -1, hidden_states.shape[-1])
        return super().__call__(attn, clips, encoder_hidden_states, **kwargs).view_as(hidden_states)


class STILayer(nn.Module):
    """Attention over all frames and pixels of a clip, pooled, fused with convolutions over time.

    Published: the semantic branch (2x2 pooling, one sequence of all pixels of all frames, 8 heads of 32, nearest
    upsampling, plus input), kernel (3, 1, 1) and two layers in the other branch, and the fusion, whose learned weights
    start at 0 for attention and 1 for convolutions, with a GroupNorm behind it against overflow. Ours: the norm before
    the attention, a narrow inside of the convolutions in place of kernels that mix a fixed number of frames, and their
    shortcut.

    Args:
        channels: Channels of input and output.
        groups: Groups of the norms.
        inner: Channels between the two convolutions.
        fusion: `scalar`, two learned numbers, or `mlp`, two numbers predicted from the pooled input.
    """

    def __init__(self, channels: int, groups: int, inner: int, fusion: str) -> None:
        super().__init__()
        self.attn = Attention(
            channels, heads=few_heads(channels), dim_head=min(STI_HEAD_DIM, channels), norm_num_groups=groups
        )
        inner = min(inner, channels)
        self.detail = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            TimeConv(channels, inner),
            nn.GroupNorm(math.gcd(groups, inner), inner),
            nn.SiLU(),
            TimeConv(inner, channels),
        )
        self.fusion_mlp = None
        if fusion == "mlp":
            self.fusion_mlp = nn.Sequential(nn.Linear(channels, channels // 4), nn.SiLU(), nn.Linear(channels // 4, 2))
            nn.init.zeros_(self.fusion_mlp[-1].weight)
            with torch.no_grad():
                self.fusion_mlp[-1].bias.copy_(torch.tensor([0.0, 1.0]))
        else:
            self.fusion_weights = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """[n * F, C, h, w] to the same shape; the frames of a clip stand together."""
        clip = hidden.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [n, C, F, h, w]
        semantic = self._semantic(hidden, num_frames).unflatten(0, (-1, num_frames)).transpose(1, 2)
        detail = clip + self.detail(clip)
        if self.fusion_mlp is None:
            first, second = self.fusion_weights
        else:
            first, second = self.fusion_mlp(clip.mean(dim=(2, 3, 4)))[:, :, None, None, None, None].unbind(1)
        return self.norm(first * semantic + second * detail).transpose(1, 2).flatten(0, 1)

    def _semantic(self, hidden: Tensor, num_frames: int) -> Tensor:
        """[n * F, C, h, w]; an odd side is pooled with its last row alone."""
        height, width = hidden.shape[-2:]
        pooled = functional.avg_pool2d(hidden, 2, ceil_mode=True) if min(height, width) > 1 else hidden
        tokens = pooled.unflatten(0, (-1, num_frames)).permute(0, 1, 3, 4, 2)
        seen = self.attn(tokens.flatten(1, 3)).view(tokens.shape).flatten(0, 1).permute(0, 3, 1, 2)
        if seen.shape[-2:] != (height, width):
            seen = functional.interpolate(seen, scale_factor=2.0, mode="nearest")[..., :height, :width]
        return hidden + seen


class ConditionProjection(nn.Module):
    """What goes beside the noisy clip: given frames through three convolutions and attention over frames at each pixel.

    Args:
        channels: Channels of input and output, 4 as published with 16 between; never fewer between than outside.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(16, channels)
        self.convs = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(inner, channels, 3, padding=1),
        )
        # Two heads as wide as the input each, as in I2VGen-XL: so any number of channels goes.
        self.temporal = I2VGenXLTransformerTemporalEncoder(channels, 2, channels, "gelu", ff_inner_dim=4 * channels)

    def forward(self, frames: Tensor, num_frames: int) -> Tensor:
        """[n * F, C, h, w] to the same shape."""
        hidden = self.convs(frames).unflatten(0, (-1, num_frames)).permute(0, 3, 4, 1, 2)  # [n, h, w, F, C]
        seen = self.temporal(hidden.flatten(0, 2)).view(hidden.shape)
        return seen.permute(0, 3, 4, 1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """What all stages of a model have in common; see `DFGNModel`."""

    time_channels: int
    norm_num_groups: int
    attention_head_dim: int
    cross_attention_dim: int
    temporal_layer: str
    fusion: str
    detail_channels: int
    positional: str

    def temporal_transformer(self, channels: int, heads: int) -> TransformerTemporalModel:
        """Attention over the frames at each pixel."""
        place = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": LONGEST}
        return TransformerTemporalModel(
            heads,
            self.attention_head_dim,
            in_channels=channels,
            norm_num_groups=self.norm_num_groups,
            **(place if self.positional == "sinusoidal" else {}),
        )

    def temporal(self, channels: int) -> nn.Module:
        """What stands between a resnet block and the attention."""
        if self.temporal_layer == "conv":
            layer = TemporalConvLayer(channels, channels, norm_num_groups=self.norm_num_groups)
            for conv in (module for module in layer.modules() if isinstance(module, nn.Conv3d)):
                conv.__class__ = TimeConv
            return layer
        return STILayer(channels, self.norm_num_groups, self.detail_channels, self.fusion)


class Stage(nn.Module):
    """The layers of one resolution on the way down or up, or those in the middle.

    Args:
        channels_in: Channels that come into each resnet block, skips included.
        channels: Channels behind each.
        attentions: How many of the layers have attention, from the first on.
        layout: The rest.
        resample: `down`, `up` or nothing behind the last layer.
    """

    def __init__(
        self, channels_in: list[int], channels: int, attentions: int, layout: Layout, resample: str | None = None
    ) -> None:
        super().__init__()
        groups, head_dim = layout.norm_num_groups, layout.attention_head_dim
        heads = max(1, channels // head_dim)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels=width, out_channels=channels, temb_channels=layout.time_channels, groups=groups, eps=1e-5
            )
            for width in channels_in
        )
        self.temporal_layers = nn.ModuleList(layout.temporal(channels) for _ in channels_in)
        self.attentions = nn.ModuleList(
            Transformer2DModel(
                heads,
                head_dim,
                in_channels=channels,
                norm_num_groups=groups,
                cross_attention_dim=layout.cross_attention_dim,
                use_linear_projection=True,
            )
            for _ in range(attentions)
        )
        for block in (block for attention in self.attentions for block in attention.transformer_blocks):
            block.attn2.set_processor(SharedText())
        self.temporal_attentions = nn.ModuleList(
            layout.temporal_transformer(channels, heads) for _ in range(attentions)
        )
        down = [Downsample2D(channels, use_conv=True, name="op")] if resample == "down" else []
        self.downsamplers = nn.ModuleList(down)
        self.upsamplers = nn.ModuleList([Upsample2D(channels, use_conv=True)] if resample == "up" else [])
        self.gradient_checkpointing = False

    def layer(self, index: int, hidden: Tensor, time: Tensor, text: Tensor, num_frames: int) -> Tensor:
        """One layer: resnet block, layer over time, and attention over pixels, text and frames if there is any."""
        hidden = self._run(self.resnets[index], hidden, time)
        hidden = self._run(self.temporal_layers[index], hidden, num_frames)
        if index < len(self.attentions):
            hidden = self.attentions[index](hidden, text, return_dict=False)[0]  # checkpoints on its own
            temporal = self.temporal_attentions[index]
            hidden = self._run(lambda x: temporal(x, num_frames=num_frames, return_dict=False)[0], hidden)
        return hidden

    def _run(self, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)
