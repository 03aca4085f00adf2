"""How a model is measured: feature extractors, sample-based metrics, held-out nats, and `evaluate` modules of the same.

This file imports nothing heavy, so that the command line can ask where things are.
"""

from __future__ import annotations

from pathlib import Path

from entrecipes.errors import UserError, nearest

MODULES = Path(__file__).parent / "modules"


def module_path(name: str) -> str:
    """Folder of one of our `evaluate` modules, for `evaluate.load(module_path("kid"))`: works offline.

    Raises:
        UserError: With the names there are, for any other name.
    """
    names = sorted(folder.name for folder in MODULES.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in names:
        raise UserError(f"evaluate module '{name}': there is none{nearest(name, names)} There are: {', '.join(names)}.")
    return str(MODULES / name)
