"""LoRA on any model, beside a base in full precision or in 4 bits: put on, saved, loaded, merged.

peft does the work. Through it, not through diffusers' `PeftAdapterMixin`, since some models (`DiTTransformer2DModel`)
are without; what is saved is what the mixin's `load_lora_adapter` reads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from entrecipes.diffusion.adapter_folder import Base
from entrecipes.errors import UserError

NAME = "default"
"""Of the adapter in the model; peft's and diffusers' own default."""


def size(parameter: nn.Parameter) -> int:
    """Weights in a parameter, two to a byte where it is quantised."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def expanded(parameter: nn.Parameter) -> Tensor:
    """The weights of a parameter as they are computed with, also where it is quantised."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return ".lora_" in name


def add_lora(model: nn.Module, config: Any) -> None:
    """Put the adapter that a `peft.LoraConfig` describes on the model, and freeze all the rest."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, NAME)
    model.train(model.training)  # the new modules too
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = True  # as its own add_adapter does


def quantise(model: nn.Module, names: Iterable[str]) -> None:
    """Hold the weights of these linear layers in 4 bits (NF4, with quantised statistics; Dettmers et al. 2023).

    The bits are computed on the CPU, so that they are the same wherever the model is.

    Raises:
        UserError: When bitsandbytes can't be used here.
    """
    try:
        import bitsandbytes

        for name in names:
            model.set_submodule(name, _quantised(bitsandbytes, model.get_submodule(name)))
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"blocks.adapter: bitsandbytes can't hold weights in 4 bits here ({str(error).strip().splitlines()[0]}); "
            "update it, or leave the base in full precision: lora in place of qlora, or quantise=false"
        ) from error


def _quantised(bitsandbytes: Any, linear: nn.Linear) -> nn.Linear:
    weight = linear.weight.detach()
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        # the first input would set it otherwise, differently after a resume; autocast still lowers the product
        compute_dtype=torch.float32,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to("cpu")
    layer.bias = linear.bias
    # in eval mode it would repack the weights for bf16 in place, and training would go on with others
    layer.support_avx512bf16_for_cpu = False
    return layer.to(weight.device).train(linear.training)


def carries_adapter(model: nn.Module) -> bool:
    """Whether a LoRA is on the model, ours or any that diffusers has loaded."""
    return hasattr(model, "peft_config")


def merge(model: nn.Module) -> None:
    """Turn a model with an adapter into an ordinary one, in place: 4-bit weights expanded, updates added.

    Its outputs are those with the adapter up to rounding. An ordinary model stays as it is.
    """
    if not carries_adapter(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            model.set_submodule(name, _full_precision(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = False


def _full_precision(layer: nn.Linear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(expanded(layer.weight), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def save_adapter(model: nn.Module, folder: Path, base: Base) -> None:
    """Write the adapter's weights and configuration as diffusers does, and beside them what it belongs to.

    The configuration says no dropout: diffusers loads an adapter in train mode, and would go on dropping in inference.
    """
    config, verbosity = model.peft_config[NAME], logging.get_verbosity()
    published = copy.copy(config)
    published.lora_dropout, published.target_modules = 0.0, sorted(config.target_modules)
    model.peft_config[NAME] = published
    logging.set_verbosity_error()  # it warns of a cast, and casts nothing
    try:
        PeftAdapterMixin.save_lora_adapter(model, folder, NAME)
    finally:
        model.peft_config[NAME] = config
        logging.set_verbosity(verbosity)
    base.write(folder)


def load_adapter(model: nn.Module, folder: Path, base: Base) -> None:
    """Put a saved adapter on a fresh base.

    Raises:
        UserError: When the base is another, or the files are missing or damaged.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    base.check(model, folder)
    path = folder / LORA_WEIGHT_NAME_SAFE
    try:
        with safe_open(path, "pt") as file:
            config = LoraConfig(**json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY]))
        quantise(model, base.quantised)
        add_lora(model, config)
        set_peft_model_state_dict(model, load_file(path), NAME)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no adapter for this base ({str(error).strip().splitlines()[0]})") from error
