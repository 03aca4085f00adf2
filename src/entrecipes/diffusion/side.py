"""SimDA and I2V-Adapter on a base: saved with what loads them, and loaded."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

from diffusers.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import nn

from entrecipes.diffusion.adapter_folder import Base
from entrecipes.diffusion.quantised import quantise
from entrecipes.errors import UserError
from entrecipes.models import side_adapters
from entrecipes.models.i2v_adapter import I2VAdapter
from entrecipes.models.side_adapters import NAME, BesideBase
from entrecipes.models.simda import SimDA

CLASSES: dict[str, type[BesideBase]] = {"simda": SimDA, "i2v_adapter": I2VAdapter}
"""By their names in recipes."""


def carries_side_adapter(model: nn.Module) -> bool:
    """Whether one is on the model."""
    return hasattr(model, NAME)


def save_side_adapter(adapter: BesideBase, folder: Path, base: Base) -> None:
    """Write the adapter's weights and configuration, the source of its class, and what it belongs to."""
    adapter.save_pretrained(folder)
    source = Path(inspect.getfile(type(adapter)))
    for path in (source, Path(inspect.getfile(side_adapters))):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["auto_map"] = {"AutoModel": f"{source.stem}.{type(adapter).__name__}"}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    base.write(folder)


def holds_side_adapter(folder: Path) -> bool:
    """Whether the adapter in a folder is one (else it is a LoRA)."""
    return (folder / CONFIG_NAME).is_file()


def load_side_adapter(model: nn.Module, folder: Path, base: Base) -> None:
    """Put a saved adapter on a fresh base.

    Raises:
        UserError: When the base is another, or the files are missing or damaged.
    """
    base.check(model, folder)
    try:
        name = json.loads((folder / CONFIG_NAME).read_text())["_class_name"]
        kind = {kind.__name__: kind for kind in CLASSES.values()}[name]
        adapter, info = kind.from_pretrained(folder, output_loading_info=True)
        if lacking := info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise ValueError(f"{sorted(lacking)[0]} is not in both its configuration and its weights")
        quantise(model, base.quantised, base.quantise)
        adapter.attach(model)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: no adapter for this base ({reason})") from error
