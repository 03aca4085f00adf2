"""Data tests keep their caches to themselves."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh $ENTRECIPES_HOME and `datasets` cache for each test."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("ENTRECIPES_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """12 PNGs, 6 in each of the class folders `cat` and `dog`, every one different."""
    folder = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder
