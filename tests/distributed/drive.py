"""Carry out recipes one after the other, in one process or as one of several that a launcher starts.

python drive.py LIST.json [--bare]: the list holds a recipe's path, its run folder and changes; --bare trains and
measures, and publishes nothing
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from entrecipes.recipe.load import load
from entrecipes.training.experts import run_experts
from entrecipes.training.launch import run_recipe
from entrecipes.training.loop import train
from entrecipes.training.resume import resume
from entrecipes.training.run import Run


def main(listed: Path, bare: bool = False) -> None:
    """Run each, until one fails."""
    for recipe, folder, *changes in json.loads(listed.read_text()):
        loaded = load(recipe, [f"training.output={json.dumps(folder)}", *changes])
        if loaded.recipe.experts.type == "tdc":
            run_experts(loaded)
        elif bare:
            Path(folder).mkdir(parents=True, exist_ok=True)
            run = Run(loaded.recipe, Path(folder))
            resume(run)
            train(run)
        else:
            run_recipe(loaded, last=False)
        AcceleratorState._reset_state()  # its precision is that of the last recipe


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--bare" in sys.argv)
