"""LoRA on any model, beside a base in full precision or quantised: put on, saved, loaded, merged.

peft does the work. Through it, not through diffusers' `PeftAdapterMixin`, since some models (`DiTTransformer2DModel`)
are without; what is saved is what the mixin's `load_lora_adapter` reads.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from entrecipes.diffusion.adapter_folder import Base
from entrecipes.diffusion.quantised import full_precision, is_quantised, quantise
from entrecipes.errors import UserError

NAME = "default"
"""Of the adapter in the model; peft's and diffusers' own default."""


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


def carries_adapter(model: nn.Module) -> bool:
    """Whether a LoRA is on the model, ours or any that diffusers has loaded."""
    return hasattr(model, "peft_config")


def merge(model: nn.Module) -> None:
    """Turn a model with an adapter into an ordinary one, in place: quantised weights expanded, updates added.

    Its outputs are those with the adapter up to rounding. An ordinary model stays as it is.
    """
    if not carries_adapter(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if is_quantised(module):
            model.set_submodule(name, full_precision(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = False


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
        quantise(model, base.quantised, base.quantise)
        add_lora(model, config)
        set_peft_model_state_dict(model, load_file(path), NAME)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no adapter for this base ({str(error).strip().splitlines()[0]})") from error
