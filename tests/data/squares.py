"""Shards of squares, made slowly: by tests, and as a process of its own that can be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from entrecipes.data import making
from entrecipes.data.making import Making

COUNT, BATCH, BAD = 38, 2, {4: "four (broken)", 5: "five (broken)"}


def squares(folder: Path, seen: list[int] | None = None, seconds: float = 0.0) -> Making:
    """Rows n -> (n, n squared), in shards of 8 rows, of which the second has two bad ones."""

    def make(rows: range) -> making.Made:
        time.sleep(seconds)
        if seen is not None:
            seen.extend(rows)
        good = torch.tensor([row for row in rows if row not in BAD], dtype=torch.float32)
        bad = {row: BAD[row] for row in rows if row in BAD}
        return {"plain": torch.stack([good, good**2], 1)} if len(good) else {}, bad

    return Making(folder, COUNT, BATCH, make, lambda: making.SHARD_BYTES // (4 * BATCH), {"of": "numbers"})


if __name__ == "__main__":
    squares(Path(sys.argv[1]), seconds=0.02).run()
