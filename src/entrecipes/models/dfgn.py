"""The Discrete Frame Generation Network of RDTF (arXiv 2503.17735): a UNet for short clips of widely spaced frames.

It follows I2VGen-XL (Zhang et al. 2023) without its image and fps embeddings, and has a layer of its own between a
resnet block and the attention, STI: between discrete frames the same thing moves far, so that a convolution over time
alone, at one pixel, misses it. Of torch and diffusers alone, and saved beside the weights (as `entrecipes.py`, `sti.py`
in it): where entrecipes is not installed, diffusers loads the model from there, with `trust_remote_code=True`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional

from .sti import ConditionProjection, Layout, Stage, few_heads  # `_source` finds it by this form


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
        condition_fill: `none` as published: the network sees a given frame at its own place alone; or `nearest`, ours:
            beside that, every frame sees the nearest given one as it is, and whether it is given itself, so that a
            network need not learn first to carry pictures from frame to frame.
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
        condition_fill: str = "none",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._check()
        widths, patch = list(block_out_channels), patch_size**2
        layout = Layout(
            time_channels=4 * widths[0],
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            temporal_layer=temporal_layer,
            fusion=fusion,
            detail_channels=detail_channels,
            positional=positional,
        )
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0, scale=timestep_scale)
        self.time_embedding = TimestepEmbedding(widths[0], layout.time_channels)
        wide = 2 * cross_attention_dim
        self.text_projection = nn.ModuleList(
            nn.Identity()
            if width == cross_attention_dim
            else nn.Sequential(nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, cross_attention_dim))
            for width in text_channels or ()
        )
        self.condition_projection = ConditionProjection(in_channels * patch)
        seen = 2 * in_channels * patch + (condition_fill == "nearest") * (in_channels * patch + 1)
        self.conv_in = nn.Conv2d(seen, widths[0], 3, padding=1)
        heads = few_heads(widths[0])
        self.transformer_in = layout.temporal_transformer(widths[0], heads) if temporal_in else None
        self._add_stages(layout)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch, 3, padding=1)

    def _add_stages(self, layout: Layout) -> None:
        """From fine to coarse, the middle, and back; each layer on the way back also takes one's output from before."""
        widths, layers = self.config.block_out_channels, self.config.layers_per_block
        levels = self.config.attention_levels
        skips, last = [widths[0]], len(widths) - 1
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (layers - 1)
            attentions = layers * levels[level]
            self.down_blocks.append(Stage(inputs, width, attentions, layout, "down" if level < last else None))
            skips += [width] * (layers + (level < last))
        self.mid_block = Stage([width, width], width, 1, layout)
        for level in reversed(range(len(widths))):
            inputs = []
            for _ in range(layers + 1):
                inputs.append(width + skips.pop())
                width = widths[level]
            attentions = len(inputs) * levels[level]
            self.up_blocks.append(Stage(inputs, width, attentions, layout, "up" if level else None))

    def _check(self) -> None:
        config = self.config
        for key, known in (
            ("temporal_layer", ("sti", "conv")),
            ("fusion", ("scalar", "mlp")),
            ("positional", ("none", "sinusoidal")),
            ("condition_fill", ("none", "nearest")),
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
        condition = torch.zeros_like(sample) if condition is None else condition
        inputs = [self._frames(sample), self.condition_projection(self._frames(condition), num_frames)]
        if self.config.condition_fill == "nearest":
            nearest, given = nearest_given(condition)
            inputs += [self._frames(nearest), given.flatten()[:, None, None, None].expand_as(inputs[0][:, :1])]
        hidden = self.conv_in(torch.cat(inputs, 1))
        if self.transformer_in is not None:
            hidden = self.transformer_in(hidden, num_frames=num_frames, return_dict=False)[0]
        hidden = self._through_stages(hidden, time, text, num_frames)
        hidden = self.conv_out(functional.silu(self.conv_norm_out(hidden)))
        hidden = functional.pixel_shuffle(hidden, self.config.patch_size)
        output = hidden.unflatten(0, (count, num_frames)).transpose(1, 2)
        return DFGNOutput(sample=output) if return_dict else (output,)

    def _through_stages(self, hidden: Tensor, time: Tensor, text: Tensor, num_frames: int) -> Tensor:
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
        return hidden

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Save weights, configuration and source; options are diffusers' own."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            (Path(save_directory) / "entrecipes.py").write_text(_source(Path(__file__)))

    def _frames(self, clip: Tensor) -> Tensor:
        """All frames as one batch [n * F, C, h, w], in patches."""
        return functional.pixel_unshuffle(clip.transpose(1, 2).flatten(0, 1), self.config.patch_size)

    def _text(self, text: Tensor | None, like: Tensor) -> Tensor:
        """The tokens that are attended to [n, T, cross_attention_dim]."""
        config = self.config
        tokens, channels = config.text_tokens or [1], config.text_channels or [config.cross_attention_dim]
        if text is None:
            text = like.new_zeros(len(like), sum(tokens), max(channels))
        text = text.to(like.dtype)
        if config.text_channels is None:
            return text
        projected = [
            project(part[..., :width])
            for project, part, width in zip(self.text_projection, text.split(list(tokens), 1), channels, strict=True)
        ]
        return torch.cat(projected, 1)


def nearest_given(condition: Tensor) -> tuple[Tensor, Tensor]:
    """What `condition_fill: nearest` shows of given frames [n, C, F, h, w], zeros elsewhere.

    Returns:
        For every frame the nearest given one (of two the earlier; zeros where none is given), of the same shape, and 1
        where it is given itself, [n, F].
    """
    given = condition.abs().amax(dim=(1, 3, 4)) > 0
    place = torch.arange(condition.shape[2], device=condition.device)
    distance = (place[:, None] - place).abs() + len(place) * ~given[:, None]
    nearest = distance.argmin(-1)[:, None, :, None, None].expand_as(condition)
    return condition.gather(2, nearest), given.to(condition.dtype)


def _source(path: Path) -> str:
    """A file with what it imports from beside it in place of the import: diffusers fetches one file of a part alone."""

    def beside(found: re.Match[str]) -> str:
        return path.with_name(f"{found[1]}.py").read_text().replace("from __future__ import annotations\n", "")

    return re.sub(r"^from \.(\w+) import .*\n", beside, path.read_text(), flags=re.MULTILINE)


# diffusers writes the module that a class says it lives in into model_index.json, and looks it up there by name.
DFGNModel.__module__ = "entrecipes"
