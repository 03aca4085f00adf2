"""Runs on a few drawn stickers that take seconds, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny import FLOW, tiny
from tiny_dfgn import CONFIG
from tiny_text import save_tiny_text

from entrecipes.cli import main
from entrecipes.data.sources.stickers import LICENSE, Item
from entrecipes.data.sticker_preparation import Collection, StickerOptions, prepare_stickers

FRAMES, SIDE = 4, 8
CAPTIONS = ("a red cat", "a blue cat waves", "a cat sleeps")


def save_stickers(folder: Path) -> Path:
    """A prepared set: eight bars that move over white, and two stills; the licence is that of the emoji."""
    items = []
    (folder / "files").mkdir(parents=True)
    for number in range(10):
        frames = [np.full((SIDE, SIDE, 3), 255, np.uint8) for _ in range(FRAMES if number < 8 else 1)]
        for at, frame in enumerate(frames):
            frame[1:-1, at : at + 2] = (25 * number, 200 - 20 * number, 90)
        file = folder / "files" / f"{number}.webp"
        first, *rest = map(Image.fromarray, frames)
        first.save(file, save_all=True, append_images=rest, duration=100, lossless=True)
        items.append(Item(f"bar{number}", file, ".webp", CAPTIONS[number % 3], group="bars", base=f"bar{number}"))
    collection = Collection(items, "Bars drawn for a test.", LICENSE, "bars")
    prepare_stickers(collection, folder / "set", StickerOptions(SIDE, FRAMES))
    return folder / "set"


def train_stickers(folder: Path, stickers: Path, name: str = "run", **sections: Any) -> Path:
    """A run folder; `sections` replace those of a tiny recipe from scratch."""
    text = [{"id": str(save_tiny_text(folder / "bert")), "tokens": 5}]
    evaluation = {"task": "it2v", "grid": 2, "batch_size": 4}
    recipe = tiny(
        {"class": "DFGNModel", "config": {key: as_list(value) for key, value in CONFIG.items()}},
        FLOW,
        data={"type": "stickers", "name": str(stickers), "frames": FRAMES, "held_out": 0.25},
        masks={"type": "dual", "lengths": [2, FRAMES]},
        curriculum={"type": "adaptive"},
        evaluation=evaluation,
    )
    recipe["pipeline"]["build"]["text"] = text
    recipe["training"] |= {"images": 64, "batch_size": 8}
    recipe |= sections
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / f"{name}.yaml"), f"training.output={folder / name}"]) == 0
    return folder / name


def as_list(value: Any) -> Any:
    """A tuple as YAML writes it."""
    return list(value) if isinstance(value, tuple) else value
