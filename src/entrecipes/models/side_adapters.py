"""What adapters beside a frozen video model have in common: SimDA (`simda.py`) and I2V-Adapter (`i2v_adapter.py`).

Each is a small model of its own, whose `save_pretrained` and `from_pretrained` hold the adapter alone. `attach` puts it
on a base, `detach` takes it off. A base is a diffusers model that is called with clips [n, C, F, h, w] and passes the
frames through its spatial layers as a batch [n * F, C, h, w], the frames of a clip one after another: `DFGNModel`,
`UNet3DConditionModel`, `UNetMotionModel`. Of torch and diffusers alone, so that these files can travel beside weights
and be loaded with `AutoModel.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

from diffusers import ConfigMixin, ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

NAME = "side_adapter"
"""Of the adapter in its base, which holds it as a module."""


def spatial_blocks(model: nn.Module) -> dict[str, BasicTransformerBlock]:
    """The transformer blocks whose tokens are the pixels of one frame, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BasicTransformerBlock) and "attentions" in path.split(".")
    }


class BesideBase(ModelMixin, ConfigMixin):
    """What the adapters have in common.

    All hooks are methods of modules inside the base, so that a deep copy of the base has an adapter of its own. What
    they know of the clips in a forward pass they keep until the next one: under gradient checkpointing, each backward
    pass must come before the next forward pass of the same model.
    """

    _base: tuple[nn.Module, ...] = ()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> tuple[dict, dict, dict]:
        """Without a warning of the entry that says where the source lies."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **options)

    def attach(self, model: nn.Module) -> Self:
        """Put the adapter on a base, moved to its device and floating-point type.

        Raises:
            ValueError: When it lies on a base already, the model carries one, or lacks a layer of its width.
        """
        if self._base or hasattr(model, NAME):
            raise ValueError(f"{type(self).__name__} lies on a base already, or the base carries another: detach first")
        self._check(model)
        nn.Module.to(self, model.device, model.dtype)  # the mixin's warns of types
        self.train(model.training)
        self._inputs = list(inspect.signature(type(model).forward).parameters)[1:]
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True), *self._hooks(model)]
        self._base = (model,)  # in a tuple, since the base holds this module, not the other way round
        setattr(model, NAME, self)
        return self

    def detach(self) -> Self:
        """Take the adapter off its base, which then is what it was."""
        for handle in self._handles:
            handle.remove()
        delattr(self._base[0], NAME)
        self._base = ()
        return self

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(model, dict(zip(self._inputs, args, strict=False)) | kwargs)

    def _check(self, model: nn.Module) -> None:
        raise NotImplementedError

    def _hooks(self, model: nn.Module) -> list[Any]:
        """Hook all layers to those of the base; returns the handles."""
        raise NotImplementedError

    def _see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Note what the base is called with."""
        raise NotImplementedError


def zeroed(layer: nn.Linear | nn.Conv2d) -> Any:
    """The layer, whose output is now zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def key_of(path: str) -> str:
    """A path as the name of a module."""
    return path.replace(".", "-")


def some(places: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Raises ValueError when there are none."""
    if not places:
        raise ValueError(f"{type(model).__name__} has no spatial transformer blocks (in `attentions`) there")
    return places


def compare(own: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises ValueError unless each of the adapter's layers finds the layer of the base that it was made for."""
    for path, size in own.items():
        if base.get(path) != size:
            raise ValueError(f"made for another base: {path} has {base.get(path, 'nothing')} there, {size} here")
