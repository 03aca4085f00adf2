"""A pipeline with classes of ours, for people who have entrecipes installed and do not import it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers

import entrecipes
from entrecipes.errors import UserError

SHIM = "from_entrecipes"
SHIM_TEXT = '''"""This part comes from the package entrecipes, which must be installed; it need not be imported."""

from entrecipes import {name}  # noqa: F401
'''


def export_shim(pipeline_folder: str | Path, output: str | Path) -> Path:
    """Copy a saved pipeline so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads our classes.

    Wherever entrecipes is installed, imported or not, from a folder as from the Hub. A learned schedule beside the
    pipeline (`infonoise/`) becomes its scheduler. Without this export a published pipeline names stock classes only, as
    far as there are any, and loads without trust.

    Args:
        pipeline_folder: A run's `pipeline/`, or any saved pipeline.
        output: The folder to write; it must not exist yet.

    Returns:
        `output`.

    Raises:
        UserError: When there is no pipeline, nothing in it comes from here, or `output` exists.
    """
    source, output = Path(pipeline_folder), Path(output)
    if not (source / "model_index.json").is_file():
        raise UserError(f"{source}: no pipeline (it has no model_index.json); give a run's pipeline/ folder")
    if output.exists():
        raise UserError(f"{output} exists already; give a new folder")
    index = json.loads((source / "model_index.json").read_text())
    learned = (source / "infonoise").is_dir()
    if learned:
        index["scheduler"] = ["entrecipes", "InfoNoiseScheduler"]
    ours = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0] == "entrecipes"}
    pipeline_class = index["_class_name"]
    if pipeline_class in entrecipes._LAZY and not hasattr(diffusers, pipeline_class):
        ours["_class_name"] = pipeline_class
    if not ours:
        raise UserError(f"{source}: nothing in it comes from entrecipes, so that it loads as it is")

    shutil.copytree(source, output)
    if learned:
        shutil.rmtree(output / "scheduler")
        (output / "infonoise").rename(output / "scheduler")
    for name, class_name in ours.items():
        if name == "_class_name" and (output / "pipeline.py").is_file():  # its own source, which needs no entrecipes
            index[name] = ["pipeline", class_name]
            continue
        place = output if name == "_class_name" else output / name
        (place / f"{SHIM}.py").write_text(SHIM_TEXT.format(name=class_name))
        index[name] = [SHIM, class_name]
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return output
