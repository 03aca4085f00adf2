"""The Discrete Frame Generation Network of RDTF (arXiv 2503.17735): a UNet for short clips of widely spaced frames.

It follows I2VGen-XL (Zhang et al. 2023) without its image and fps embeddings, and has a layer of its own between a
resnet block and the attention, STI: between discrete frames the same thing moves far, so that a convolution over time
alone, at one pixel, misses it. Of torch and diffusers alone, so that this file can travel beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional

STI_HEAD_DIM = 32
"""Channels of a head of the attention in an STI layer, and of `transformer_in` heads' count; 8 heads at most."""
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
        semantic, detail = self._semantic(hidden, num_frames).unflatten(0, (-1, num_frames)).transpose(1, 2), clip
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


@dataclass
class DFGNOutput(BaseOutput):
    """What the model predicts."""

    sample: Tensor
    """[n, out_channels, F, h, w]."""


class DFGNModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Denoises short clips, given a text, some of the frames, both or nothing.

    Each layer is a resnet block, an STI layer, attention over the pixels of a frame and the text, and attention over
    the frames at a pixel. Given frames come in beside the noisy ones, with zeros where none is given; there is no mask,
    frame number or frame rate. The defaults are the published size: 0.96 B parameters, 256 px as 8 x 32 x 32 latents.

    Args:
        in_channels: Channels of the clip, and of the given frames.
        out_channels: Channels of the prediction.
        sample_size: Side of the clip, in pixels or latents; a note for pipelines, other sides go as well.
        patch_size: 1 as published; 2 moves 2x2 neighbours to channels before the first layer and back behind the last.
        block_out_channels: Channels of each level, from fine to coarse; the side halves in between.
        attention_levels: Which levels have attention over pixels, text and frames; the middle always has.
        layers_per_block: Layers of each level on the way down; one more on the way up.
        attention_head_dim: Channels of a head.
        norm_num_groups: Groups of the norms.
        cross_attention_dim: Channels of the text that is attended to.
        text_channels: Channels of each text encoder's tokens, the first ones of the text's; where they are not
            `cross_attention_dim`, two layers bring them there. None: one text that has them already.
        text_tokens: Tokens of each text encoder, which stand one after another.
        temporal_layer: `sti`, or I2VGen-XL's convolutions over time: `conv`.
        fusion: How STI weighs its branches: `scalar` or `mlp` (see `STILayer`).
        detail_channels: Channels between the two convolutions of STI, at most.
        temporal_in: Whether the frames attend to each other once at full resolution, before the first level; slow.
        positional: What the attention over frames knows of their order: `none` as published, where only STI's
            convolutions know, or `sinusoidal`.
        timestep_scale: Factor on the timestep before its sines and cosines, which are made for 0 to 1000: 1 for VP and
            flow schedulers; 100 suits EDM, whose log(sigma) / 4 spans less than three units.

    Raises:
        ValueError: For unknown kinds of layers or lists of different lengths.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Stage"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] = (320, 640, 1024, 1280),
        attention_levels: tuple[bool, ...] = (True, True, True, False),
        layers_per_block: int = 2,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 1024,
        text_channels: tuple[int, ...] | None = None,
        text_tokens: tuple[int, ...] | None = None,
        temporal_layer: str = "sti",
        fusion: str = "scalar",
        detail_channels: int = 32,
        temporal_in: bool = True,
        positional: str = "none",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._check()
        widths, patch = list(block_out_channels), patch_size**2
        layout = Layout(
            4 * widths[0],
            norm_num_groups,
            attention_head_dim,
            cross_attention_dim,
            temporal_layer,
            fusion,
            detail_channels,
            positional,
        )
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0, scale=timestep_scale)
        self.time_embedding = TimestepEmbedding(widths[0], layout.time_channels)
        wide = 2 * cross_attention_dim
        self.text_projection = nn.ModuleList(
            nn.Identity()
            if width == cross_attention_dim
            else nn.Sequential(nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, cross_attention_dim))
            for width in text_channels or [cross_attention_dim]
        )
        self.condition_projection = ConditionProjection(in_channels * patch)
        self.conv_in = nn.Conv2d(2 * in_channels * patch, widths[0], 3, padding=1)
        heads = few_heads(widths[0])
        self.transformer_in = layout.temporal_transformer(widths[0], heads) if temporal_in else None

        skips, last = [widths[0]], len(widths) - 1
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (layers_per_block - 1)
            attentions = layers_per_block * attention_levels[level]
            self.down_blocks.append(Stage(inputs, width, attentions, layout, "down" if level < last else None))
            skips += [width] * (layers_per_block + (level < last))
        self.mid_block = Stage([width, width], width, 1, layout)
        for level in reversed(range(len(widths))):
            inputs = []
            for _ in range(layers_per_block + 1):
                inputs.append(width + skips.pop())
                width = widths[level]
            attentions = len(inputs) * attention_levels[level]
            self.up_blocks.append(Stage(inputs, width, attentions, layout, "up" if level else None))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, out_channels * patch, 3, padding=1)

    def _check(self) -> None:
        config = self.config
        for key, known in (
            ("temporal_layer", ("sti", "conv")),
            ("fusion", ("scalar", "mlp")),
            ("positional", ("none", "sinusoidal")),
        ):
            if config[key] not in known:
                raise ValueError(f"{key} '{config[key]}': give {' or '.join(known)}")
        if len(config.attention_levels) != len(config.block_out_channels):
            raise ValueError("attention_levels: give one for each of block_out_channels")
        if len(config.text_channels or ()) != len(config.text_tokens or ()):
            raise ValueError("text_tokens: give one for each of text_channels")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> DFGNOutput | tuple[Tensor]:
        """Predict from noisy clips.

        Args:
            sample: [n, C, F, h, w]; any F.
            timestep: [n] or one number, whatever the scheduler counts in.
            encoder_hidden_states: Text tokens [n, T, D], zeros where there is none; None: zeros.
            condition: Given frames [n, C, F, h, w], zeros elsewhere; None: zeros.
            return_dict: False gives a tuple.

        Raises:
            ValueError: When the levels can't halve the side often enough.
        """
        count, _, num_frames, *sides = sample.shape
        steps = self.config.patch_size * 2 ** (len(self.down_blocks) - 1)
        if any(side % steps for side in sides):
            raise ValueError(f"sample: its sides must be multiples of {steps}, not {sides[0]} x {sides[1]}")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(count)
        time = self.time_embedding(self.time_proj(timestep).to(sample.dtype)).repeat_interleave(num_frames, 0)
        text = self._text(encoder_hidden_states, sample)
        given = self._frames(torch.zeros_like(sample) if condition is None else condition)
        given = self.condition_projection(given, num_frames)
        hidden = self.conv_in(torch.cat([self._frames(sample), given], 1))
        if self.transformer_in is not None:
            hidden = self.transformer_in(hidden, num_frames=num_frames, return_dict=False)[0]
        skips = [hidden]
        for stage in self.down_blocks:
            for index in range(len(stage.resnets)):
                hidden = stage.layer(index, hidden, time, text, num_frames)
                skips.append(hidden)
            for downsampler in stage.downsamplers:
                hidden = downsampler(hidden)
                skips.append(hidden)
        for index in range(len(self.mid_block.resnets)):
            hidden = self.mid_block.layer(index, hidden, time, text, num_frames)
        for stage in self.up_blocks:
            for index in range(len(stage.resnets)):
                hidden = stage.layer(index, torch.cat([hidden, skips.pop()], 1), time, text, num_frames)
            for upsampler in stage.upsamplers:
                hidden = upsampler(hidden)
        hidden = self.conv_out(functional.silu(self.conv_norm_out(hidden)))
        hidden = functional.pixel_shuffle(hidden, self.config.patch_size)
        output = hidden.unflatten(0, (count, num_frames)).transpose(1, 2)
        return DFGNOutput(sample=output) if return_dict else (output,)

    def _frames(self, clip: Tensor) -> Tensor:
        """All frames as one batch [n * F, C, h, w], in patches."""
        return functional.pixel_unshuffle(clip.transpose(1, 2).flatten(0, 1), self.config.patch_size)

    def _text(self, text: Tensor | None, like: Tensor) -> Tensor:
        """The tokens that are attended to [n, T, cross_attention_dim]."""
        config = self.config
        channels, tokens = config.text_channels or [config.cross_attention_dim], config.text_tokens
        if text is None:
            text = like.new_zeros(len(like), sum(tokens or [1]), max(channels))
        parts = text.to(like.dtype).split(list(tokens or [text.shape[1]]), dim=1)
        projected = [
            project(part[..., :width])
            for project, part, width in zip(self.text_projection, parts, channels, strict=True)
        ]
        return torch.cat(projected, 1)


# diffusers writes the module that a class says it lives in into model_index.json, and looks it up there by name.
DFGNModel.__module__ = "entrecipes"
