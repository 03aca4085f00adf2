"""SimDA: bottlenecks beside the layers of a frozen video model. It travels beside weights with `side_adapters.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from .side_adapters import BesideBase, compare, key_of, some, spatial_blocks, zeroed

PATTERN = 4
"""Side of the square of tokens over which latent-shift attention repeats."""


class Bottleneck(nn.Module):
    """Linear layers down and up with a GELU between; zero at first.

    Args:
        width: Channels of input and output.
        share: Of them inside.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        inner = max(1, round(share * width))
        self.down, self.up = nn.Linear(width, inner), zeroed(nn.Linear(inner, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return self.up(functional.gelu(self.down(hidden)))

    def behind(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a hook: a residual layer behind another."""
        return output + self(output)

    def beside(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a hook: added to what another layer makes of the same input."""
        return output + self(args[0])


class TemporalBottleneck(nn.Module):
    """A convolution over three frames, for each channel apart, between projections down and up; zero at first.

    Args:
        width: Channels of input and output.
        share: Of them inside.
    """

    frames = 1
    """Of a clip in the present forward pass."""

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        inner = max(1, round(share * width))
        self.down, self.up = nn.Conv2d(width, inner, 1), zeroed(nn.Conv2d(inner, width, 1))
        self.mix = nn.Conv2d(inner, inner, (3, 1), padding=(1, 0), groups=inner)  # of frames by pixels

    def forward(self, hidden: Tensor) -> Tensor:
        """[n * F, width, h, w] to the same shape."""
        inner = self.down(hidden)
        clips = inner.flatten(2).unflatten(0, (-1, self.frames)).transpose(1, 2)  # [n, C, F, h * w]
        return self.up(self.mix(clips).transpose(1, 2).reshape(inner.shape))

    behind = Bottleneck.behind


class Shift(nn.Module):
    """Latent-shift attention: keys and values are made of tokens from up to `shift` frames before, round the clip.

    How far, repeats over squares of 4 x 4 tokens: row by row 0, 1, ..., shift, 0, ...
    """

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.frames, self.sides = shift, 1, (1, 1)

    def measure(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """As a hook before the layer that holds the attention: note the sides of its frames [n * F, C, h, w]."""
        self.sides = tuple(args[0].shape[-2:])

    def forward(self, tokens: Tensor) -> Tensor:
        """[n * F, h * w, d] to the same shape."""
        (height, width), device = self.sides, tokens.device
        rows, columns = torch.arange(height, device=device) % PATTERN, torch.arange(width, device=device) % PATTERN
        back = ((PATTERN * rows[:, None] + columns) % (self.shift + 1)).flatten()
        source = (torch.arange(self.frames, device=device)[:, None] - back) % self.frames  # [F, h * w]
        clips = tokens.unflatten(0, (-1, self.frames))
        return clips[:, source, torch.arange(len(back), device=device)].flatten(0, 1)

    def before(
        self, attention: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """As a hook before the attention."""
        return args[:1], kwargs | {"encoder_hidden_states": self(args[0])}


class SimDA(BesideBase):
    """SimDA (Xing et al. 2023, arXiv 2308.09710): bottlenecks beside the layers of a frozen video model.

    `adapter_s` stands behind the spatial self-attention and `adapter_ffn` beside the feed-forward layer of each spatial
    transformer block, `temp_adapter` behind each resnet block. The output is the base's at first, bit for bit, unless
    `shift` moves the keys and values of its attention, which changes it at once.

    Args:
        blocks: Width of each spatial transformer block, by its path in the base.
        resnets: Width of each resnet block, by path.
        spatial: Share of the width inside `adapter_s` and `adapter_ffn`.
        temporal: Share of the width inside `temp_adapter`.
        shift: How many frames latent-shift attention reaches back; 0: none. The published table of shifts is not in
            the paper's text: see `Shift` for this one.
    """

    @register_to_config
    def __init__(
        self,
        blocks: dict[str, int],
        resnets: dict[str, int],
        spatial: float = 0.25,
        temporal: float = 0.5,
        shift: int = 0,
    ) -> None:
        super().__init__()
        self.adapter_s = nn.ModuleDict({key_of(path): Bottleneck(width, spatial) for path, width in blocks.items()})
        self.adapter_ffn = nn.ModuleDict({key_of(path): Bottleneck(width, spatial) for path, width in blocks.items()})
        self.temp_adapter = nn.ModuleDict(
            {key_of(path): TemporalBottleneck(width, temporal) for path, width in resnets.items()}
        )
        self.shifts = nn.ModuleDict({key_of(path): Shift(shift) for path in blocks} if shift else {})

    @classmethod
    def of(cls, model: nn.Module, spatial: float = 0.25, temporal: float = 0.5, shift: int = 0) -> Self:
        """A fresh one for a base, not on it yet. Raises ValueError for a model without spatial blocks."""
        blocks, resnets = some(_widths(model), model), _resnets(model)
        return cls(blocks, resnets, spatial=spatial, temporal=temporal, shift=shift)

    def _check(self, model: nn.Module) -> None:
        compare(self.config.blocks, _widths(model))
        compare(self.config.resnets, _resnets(model))

    def _hooks(self, model: nn.Module) -> list[Any]:
        handles = []
        for path in self.config.blocks:
            block, key = model.get_submodule(path), key_of(path)
            if self.config.shift:
                shift, attention = self.shifts[key], model.get_submodule(path.rpartition(".transformer_blocks")[0])
                handles.append(attention.register_forward_pre_hook(shift.measure))
                handles.append(block.attn1.register_forward_pre_hook(shift.before, with_kwargs=True))
            handles.append(block.attn1.register_forward_hook(self.adapter_s[key].behind))
            handles.append(block.ff.register_forward_hook(self.adapter_ffn[key].beside))
        for path in self.config.resnets:
            handles.append(model.get_submodule(path).register_forward_hook(self.temp_adapter[key_of(path)].behind))
        return handles

    def _see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        for module in (*self.temp_adapter.values(), *self.shifts.values()):
            module.frames = inputs["sample"].shape[2]


def _widths(model: nn.Module) -> dict[str, int]:
    return {path: block.attn1.to_q.in_features for path, block in spatial_blocks(model).items()}


def _resnets(model: nn.Module) -> dict[str, int]:
    return {
        path: module.out_channels
        for path, module in model.named_modules()
        if isinstance(module, ResnetBlock2D) and "resnets" in path.split(".")
    }
