"""A run that opens blocks, in real processes: two of them decide and train alike, also while candidates take turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_end_to_end import entrecipes, launch, rows, write
from tiny import DIT, FLOW, tiny

DRAWS = {"images": 8, "noise_levels": 4}
BLOCKS = {
    "type": "entprog",
    "order": "cost_aware",
    "inputs": "never",
    "step": 0.17,
    "burst": 2,
    "supernet": 0.4,
    "final": "search",
    "draws": DRAWS,
    "holdout": {"images": 8, "noise_levels": 4},
}
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 6}}


def decided(folder: Path) -> list[tuple[int, list[int]]]:
    return [(row["images"], row["open"]) for row in rows(folder, "event")]


@pytest.mark.slow
def test_two_processes_open_the_same_blocks(tmp_path):
    recipe = write(tmp_path, tiny(DEEP, FLOW, blocks=BLOCKS, training={"images": 512}))
    alone = entrecipes("run", recipe, f"training.output={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    done = launch(recipe, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "two", "start")[0]["world_size"] == 2
    one, two = (decided(tmp_path / name) for name in ("one", "two"))
    assert one == two and len(one) > 5
    losses = [[row["loss"] for row in rows(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
