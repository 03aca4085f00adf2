"""A run folder as training leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_case import METRICS, RECIPE, RUN, SOURCE, records, write_run

from entrecipes.report.plots import save_grid


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run: three sample grids, curves, two metrics, an empty pipeline folder."""
    folder = tmp_path / "outputs" / "digits"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "recipe.source.yaml").write_text(SOURCE)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    rows = records() + [{"kind": "metric", "images": 40_000, **metric.to_json()} for metric in METRICS]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(folder, RUN | {"metrics": [metric.to_json() for metric in METRICS]})
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    for name in ("images-000000020000", "images-000000040000", "final"):
        save_grid(images, folder / "samples" / f"{name}.png", columns=10)
    return folder
