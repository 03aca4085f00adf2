"""UNets and DiTs that are narrower inside: resnet blocks, attention heads and feed-forward layers of any width.

The stock classes have one width for all; these have one more config key, `widths`, which names the modules that differ.
Nothing outside such a module notices, since its inputs and outputs stay as they are. Of torch and diffusers alone, so
that this file can travel beside the weights and be loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class Part(NamedTuple):
    """A parameter of a module that grows with the module's width."""

    name: str
    """Its path in the module."""
    dim: int
    """Along which it grows."""
    halves: int = 1
    """Runs of equal length along that dimension, each as wide as the module: 2 for a scale and a shift, or a gate."""


def width_of(module: nn.Module) -> int:
    """The width that `widths` speaks of: channels of a resnet block, heads of an attention, inner features.

    Raises:
        ValueError: For a module of another kind.
    """
    if isinstance(module, ResnetBlock2D):
        return module.conv1.out_channels
    if isinstance(module, Attention):
        return module.heads
    if isinstance(module, FeedForward):
        return module.net[2].in_features
    raise ValueError("is no resnet block, attention or feed-forward layer")


def parts(module: nn.Module) -> list[Part]:
    """The parameters of a resnet block, attention or feed-forward layer that grow with its width."""
    if isinstance(module, ResnetBlock2D):
        time = Part("time_emb_proj", 0, 2 if module.time_embedding_norm == "scale_shift" else 1)
        layers, last = [Part("conv1", 0), time, Part("norm2", 0)], "conv2"
    elif isinstance(module, Attention):
        layers, last = [Part("to_q", 0), Part("to_k", 0), Part("to_v", 0)], "to_out.0"
    else:
        gated = isinstance(module.net[0], GEGLU | SwiGLU)
        layers, last = [Part("net.0.proj", 0, 2 if gated else 1)], "net.2"
    grown = [layer._replace(name=f"{layer.name}.{key}") for layer in layers for key in ("weight", "bias")]
    present = dict(module.named_parameters())
    return [part for part in grown if part.name in present] + [Part(f"{last}.weight", 1)]


class DroppedResnet(nn.Module):
    """What is left of a resnet block without its branch: the shortcut, resampled and scaled as before."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.resample = block.upsample or block.downsample
        self.conv_shortcut, self.output_scale_factor = block.conv_shortcut, block.output_scale_factor

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The shortcut of [n, channels, height, width]."""
        hidden = input_tensor if self.resample is None else self.resample(input_tensor)
        hidden = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden.contiguous())
        return hidden / self.output_scale_factor


class DroppedBranch(nn.Module):
    """In place of an attention or a feed-forward layer: the scaled input where it has a shortcut, else zeros."""

    def __init__(self, module: Attention | FeedForward) -> None:
        super().__init__()
        self.residual_connection = getattr(module, "residual_connection", False)
        self.rescale_output_factor = getattr(module, "rescale_output_factor", 1.0)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As long and wide as the input."""
        if self.residual_connection:
            return hidden_states / self.rescale_output_factor
        return torch.zeros_like(hidden_states)


def narrow(model: nn.Module, widths: Mapping[str, int], keep: Mapping[str, Tensor] | None = None) -> None:
    """Make modules of a stock model narrower, in place.

    Args:
        model: The model.
        widths: Path of each narrower module and what is left of it: channels of a resnet block (whole groups of its
            second norm), heads of an attention, inner features of a feed-forward layer. 0 drops the branch.
        keep: Which channels, heads or features stay, int64, by path; by default the first ones.

    Raises:
        ValueError: Naming the entry whose module does not exist, is of another kind or can't have this width.
    """
    for path, width in widths.items():
        try:
            module = model.get_submodule(path)
            full = width_of(module)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"widths: '{path}' of {type(model).__name__} {_reason(error)}") from error
        step = full // module.norm2.num_groups if isinstance(module, ResnetBlock2D) else 1
        if not isinstance(width, int) or not 0 <= width <= full or width % step:
            whole = f"a multiple of {step}, " if step > 1 else ""
            raise ValueError(f"widths: '{path}' can't be {width!r} wide; give {whole}{full} at most, or 0 for none")
        if width == 0:
            dropped = DroppedResnet if isinstance(module, ResnetBlock2D) else DroppedBranch
            model.set_submodule(path, dropped(module).train(module.training))
        elif width < full:
            _narrow(module, full, torch.arange(width) if keep is None else keep[path])


def _reason(error: Exception) -> str:
    return "does not exist" if isinstance(error, AttributeError) else str(error)


def _narrow(module: nn.Module, full: int, keep: Tensor) -> None:
    """Leave only these of the module's channels, heads or features."""
    for name, dim, halves in parts(module):
        owner, _, key = name.rpartition(".")
        layer = module.get_submodule(owner)
        old = getattr(layer, key)
        rows = old.detach().unflatten(dim, (halves, full, -1)).index_select(dim + 1, keep.to(old.device))
        setattr(layer, key, nn.Parameter(rows.flatten(dim, dim + 2), requires_grad=old.requires_grad))
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    if isinstance(module, ResnetBlock2D):
        norm = module.norm2
        norm.num_groups, norm.num_channels = norm.num_groups * len(keep) // full, len(keep)
    elif isinstance(module, Attention):
        module.inner_dim, module.inner_kv_dim = module.to_q.out_features, module.to_k.out_features
        module.heads = module.sliceable_head_dim = len(keep)


def _init_of(stock: type[ModelMixin]) -> Callable[..., None]:
    """An `__init__` with the stock class's arguments, whichever this version of diffusers has, and `widths`."""

    def __init__(self: Any, *args: Any, widths: dict[str, int] | None = None, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        narrow(self, widths or {})

    arguments = inspect.signature(stock.__init__)
    more = inspect.Parameter("widths", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = arguments.replace(parameters=[*arguments.parameters.values(), more])
    return register_to_config(__init__)


class SlimUNet2DModel(UNet2DModel):
    """`UNet2DModel` with resnet blocks and attentions of any width.

    Args:
        widths: As `narrow` takes them; the other arguments are those of `UNet2DModel`.

    Raises:
        ValueError: As `narrow`.
    """

    stock_class = UNet2DModel
    __init__ = _init_of(UNet2DModel)


class SlimDiTTransformer2DModel(DiTTransformer2DModel):
    """`DiTTransformer2DModel` with attentions and feed-forward layers of any width.

    Args:
        widths: As `narrow` takes them; the other arguments are those of `DiTTransformer2DModel`.

    Raises:
        ValueError: As `narrow`.
    """

    stock_class = DiTTransformer2DModel
    __init__ = _init_of(DiTTransformer2DModel)


SLIM = {UNet2DModel: SlimUNet2DModel, DiTTransformer2DModel: SlimDiTTransformer2DModel}
"""The slim class of each stock class."""


def slim(model: ModelMixin, widths: Mapping[str, int], keep: Mapping[str, Tensor] | None = None) -> None:
    """Turn a stock model into a slim one, in place; arguments and errors as `narrow`."""
    narrow(model, widths, keep)
    model.__class__ = SLIM[type(model)]  # which differs in its constructor alone
    model.register_to_config(widths=dict(widths))


def to_stock(model: ModelMixin) -> ModelMixin:
    """A stock model of full size with the same outputs up to rounding: what a slim model lacks is zero.

    Whole groups are missing, so that the norms of those that stay see the same numbers. A stock model is copied.
    """
    stock_class = getattr(model, "stock_class", None)
    if stock_class is None:
        return copy.deepcopy(model)
    config = {key: value for key, value in model.config.items() if key != "widths"}
    with torch.random.fork_rng(devices=[]):  # whoever exports a model in between draws on as before
        stock = stock_class.from_config({**config, "_class_name": stock_class.__name__})
    nn.Module.to(stock, model.device, model.dtype).train(model.training)
    grown = {f"{path}.{part.name}": (path, part) for path in model.config.widths or {} for part in _parts(stock, path)}
    weights = model.state_dict()
    with torch.no_grad():
        for name, full in stock.state_dict().items():
            if name not in weights:
                full.zero_()
            elif weights[name].shape == full.shape:
                full.copy_(weights[name])
            else:
                path, part = grown[name]
                width, left = width_of(stock.get_submodule(path)), width_of(model.get_submodule(path))
                small = weights[name].unflatten(part.dim, (part.halves, left, -1))
                full.zero_().unflatten(part.dim, (part.halves, width, -1)).narrow(part.dim + 1, 0, left).copy_(small)
    return stock


def _parts(model: nn.Module, path: str) -> list[Part]:
    return parts(model.get_submodule(path))


# diffusers writes the module that a class says it lives in into model_index.json, and looks it up there by name.
for _class in (SlimUNet2DModel, SlimDiTTransformer2DModel):
    _class.__module__ = "entrecipes"
