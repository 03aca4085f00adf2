"""A stream over several processes: every image once an epoch, and a resumed run goes on where the other stopped."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from entrecipes.data import stream
from entrecipes.data.hub import load
from entrecipes.data.images import Splits
from entrecipes.data.loader import batches
from entrecipes.data.shuffle import splits
from entrecipes.data.stream import IterableImageSet
from entrecipes.recipe.data import HubData

SHARDS = (5, 7, 4, 6)
COUNT = sum(SHARDS)
STARTS = np.cumsum((0, *SHARDS))


def numbers(*shards: int) -> list[int]:
    """Which images these shards hold."""
    return [image for shard in shards for image in range(STARTS[shard], STARTS[shard + 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parquet files of unequal length; image n is grey n."""
    target = tmp_path_factory.mktemp("streamed") / "set"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for shard in range(len(SHARDS)):
        rows = []
        for number in numbers(shard):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % 2})
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(target / f"train-{shard:05d}-of-{len(SHARDS):05d}.parquet")
    return target


def opened(folder: Path, **keys: Any) -> Splits:
    section = HubData(id=str(folder), streaming=True, **{"held_out": 0, "shuffle_buffer": 3} | keys)
    return load(section, image_size=8, channels=1)


def drawn(image_set: IterableImageSet, number: int, **options: int) -> list[list[int]]:
    """Which images the first `number` batches of 6 hold, this process's share of each."""
    found = batches(image_set, **{"seed": 1, "batch_size": 6} | options)
    return [batch.images[:, 0, 0, 0].tolist() for batch in itertools.islice(found, number)]


def flat(parts: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def test_one_process_sees_every_image_once_an_epoch(folder: Path) -> None:
    train = opened(folder).train
    seen = flat(drawn(train, 8))
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert seen[:COUNT] != seen[COUNT : 2 * COUNT] and seen[:COUNT] != flat(drawn(train, 8, seed=2))[:COUNT]
    plan = train.parts
    assert plan == ((0, 0), (1, 0), (2, 0), (3, 0)) and splits(train, 2) and not splits(train, 3)
    kept = flat(drawn(opened(folder, shuffle_buffer=100).train, 4))
    assert sorted(kept[:COUNT]) == list(range(COUNT)), "a buffer larger than the set"


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_have_shards_of_their_own_and_their_own_epochs(folder: Path, workers: int) -> None:
    for rank, own in enumerate((numbers(0, 2), numbers(1, 3))):
        seen = flat(drawn(opened(folder).train, 10, rank=rank, world_size=2, num_workers=workers))
        epochs = [seen[start : start + len(own)] for start in range(0, len(seen) - len(own) + 1, len(own))]
        assert len(epochs) >= 2 and all(sorted(epoch) == own for epoch in epochs) and epochs[0] != epochs[1]


def test_shards_that_can_not_be_shared_are_read_by_all_and_rows_shared(folder: Path) -> None:
    shares = [drawn(opened(folder).train, 8, rank=rank, world_size=3) for rank in range(3)]
    together = flat([flat(list(parts)) for parts in zip(*shares, strict=True)])
    assert together == flat(drawn(opened(folder).train, 8)), "the order of one process"
    assert sorted(together[:COUNT]) == sorted(together[COUNT : 2 * COUNT]) == list(range(COUNT))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(
    folder: Path, own_home: Path, rank: int, world_size: int
) -> None:
    train, process = opened(folder).train, {"rank": rank, "world_size": world_size}
    whole = drawn(train, 14, **process)  # almost four epochs
    for done in (1, 4, 13):
        assert drawn(train, 14 - done, start_images=6 * done, **process) == whole[done:]
        shutil.rmtree(own_home / "streams")  # the lengths are not known then, but found out again
        assert drawn(train, 14 - done, start_images=6 * done, **process) == whole[done:]


def test_shards_that_were_read_before_are_not_opened_again(
    folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(opened(folder).train, 8)
    (noted,) = (own_home / "streams").iterdir()
    assert {int(path.name): int(path.read_text()) for path in noted.iterdir()} == dict(enumerate(SHARDS))
    asked: list[int] = []
    read = IterableImageSet.read

    def counted(self: IterableImageSet, part: int) -> Iterator[dict[str, Any]]:
        asked.append(part)
        return read(self, part)

    monkeypatch.setattr(IterableImageSet, "read", counted)
    late = opened(folder, shuffle_buffer=1).train
    late.fingerprint = noted.name
    drawn(late, 1, start_images=100 * COUNT + 18, batch_size=1)
    assert 1 <= len(asked) <= 2, "the last shard of its epoch, and what is read ahead"


def test_no_process_trains_on_what_is_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_HELD_OUT", 6)  # ends within the second shard
    parts = opened(folder, held_out=0.5)
    assert parts.held_out.tensor[:, 0, 0, 0].tolist() == list(range(6))
    assert parts.train.parts == ((1, 1), (2, 0), (3, 0)) and splits(parts.train, 3) and not splits(parts.train, 2)
    seen = [set(flat(drawn(parts.train, 8, rank=rank, world_size=3))) for rank in range(3)]
    assert [sorted(own) for own in seen] == [list(range(6, 12)), numbers(2), numbers(3)]
    few = opened(folder, max_images=9).train
    assert not splits(few, 2) and sorted(flat(drawn(few, 3))[:9]) == list(range(9))
