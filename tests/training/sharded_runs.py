"""Train recipes one after the other: `sharded_runs.py FOLDER NAME...` runs FOLDER/NAME.yaml into FOLDER/NAME."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from entrecipes.recipe.load import load
from entrecipes.training.launch import run_recipe


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        run_recipe(load(folder / f"{name}.yaml", [f"training.output={folder / name.split('-')[0]}"]), last=False)
        AcceleratorState._reset_state()  # its precision is that of the last recipe


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
