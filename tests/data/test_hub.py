"""Data sets opened by id: here local ones, and the Hub when it is out of reach."""

from __future__ import annotations

import itertools
from pathlib import Path

import datasets
import pytest
import torch

from entrecipes.data.hub import load
from entrecipes.data.loader import Batch, batches
from entrecipes.data.stream import IterableImageSet
from entrecipes.errors import UserError
from entrecipes.recipe.data import HubData


@pytest.fixture
def saved(pictures: Path, tmp_path: Path) -> Path:
    """The pictures as a folder of parquet files with two splits, such as the Hub serves."""
    whole = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    for split, rows in (("train", whole), ("test", whole.select(range(4)))):
        embedded = rows.map(lambda row: row, features=rows.features, writer_batch_size=4)
        embedded.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "set"


def opened(folder: Path | str, **keys: object):
    """The set at 8 pixels in colour."""
    return load(HubData(id=str(folder), **keys), image_size=8, channels=3)


def test_a_local_folder_of_parquet_files(saved: Path) -> None:
    splits = opened(saved, held_out_split="test")
    assert len(splits.train) == 12 and len(splits.held_out) == 4
    assert splits.train.label_names == ("cat", "dog") and splits.train.name == "set"


def test_a_folder_saved_to_disk(saved: Path, tmp_path: Path) -> None:
    datasets.load_dataset(str(saved)).save_to_disk(tmp_path / "arrow")
    assert torch.equal(opened(tmp_path / "arrow", held_out=0).train.tensor, opened(saved, held_out=0).train.tensor)
    with pytest.raises(UserError, match="did you mean 'test'"):
        opened(tmp_path / "arrow", split="tests")


def test_wrong_columns_and_splits(saved: Path) -> None:
    with pytest.raises(UserError, match="data.image_column.*did you mean 'image'"):
        opened(saved, image_column="imag")
    with pytest.raises(UserError, match="data.image_column: column 'label'.*not images"):
        opened(saved, image_column="label")
    with pytest.raises(UserError, match="data.split.*did you mean 'train'.*Its splits: "):
        opened(saved, split="trian")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="(?s)someone/some-set.*entrecipes data ls"):
        opened("someone/some-set")


def test_a_stream_holds_out_its_first_images(saved: Path) -> None:
    splits = opened(saved, streaming=True, held_out=0.25, shuffle_buffer=4)
    assert isinstance(splits.train, IterableImageSet) and splits.train.label_names == ("cat", "dog")
    whole = opened(saved, held_out=0).train
    first = len(splits.held_out)
    assert torch.equal(splits.held_out.tensor, whole.tensor[:first]) and 0 < first <= 12
    with pytest.raises(UserError, match="evaluation.reference"):
        splits.train.image(0)


def stream(saved: Path, number: int, **options: int) -> list[Batch]:
    train = opened(saved, streaming=True, held_out_split="test", shuffle_buffer=4).train
    return list(itertools.islice(batches(train, seed=1, flip=True, **options), number))


def test_a_stream_shows_every_image_once_an_epoch(saved: Path) -> None:
    whole = opened(saved, held_out=0).train.tensor
    train = opened(saved, streaming=True, held_out_split="test", shuffle_buffer=4).train
    images = torch.cat([part.images for part in itertools.islice(batches(train, seed=1, batch_size=6), 4)])
    key = [image.flatten().tolist() for image in whole]
    found = [key.index(image.flatten().tolist()) for image in images]
    assert sorted(found[:12]) == sorted(found[12:]) == list(range(12)) and found[:12] != found[12:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_and_is_shared_by_position(saved: Path, workers: int) -> None:
    whole = stream(saved, 8, batch_size=4)
    images = torch.cat([part.images for part in whole])
    tail = stream(saved, 3, batch_size=4, start_images=16, num_workers=workers)
    assert torch.equal(torch.cat([part.images for part in tail]), images[16:28])
    second = stream(saved, 3, batch_size=4, rank=1, world_size=2)
    assert torch.equal(torch.cat([part.images for part in second]), torch.cat([part.images[2:] for part in whole[:3]]))
    assert whole[0].labels.shape == (4,) and tail[0].indices.tolist() == [16, 17, 18, 19]


def test_unreadable_images_of_a_stream_are_replaced_and_counted(saved: Path, tmp_path: Path) -> None:
    rows = list(datasets.load_dataset(str(saved), split="train").cast_column("image", datasets.Image(decode=False)))
    rows[3]["image"] = {"bytes": b"broken", "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "spoilt" / "train.parquet")
    options = {"streaming": True, "held_out": 0, "shuffle_buffer": 4}
    train = opened(tmp_path / "spoilt", max_bad_images=1, **options).train
    images = torch.cat([part.images for part in itertools.islice(batches(train, seed=0, batch_size=6), 6)])
    assert images.shape == (36, 3, 8, 8) and len(train.bad_images) == 1  # the same image in each of three epochs
    strict = opened(tmp_path / "spoilt", max_bad_images=0, **options).train
    with pytest.raises(UserError, match="max_bad_images"):
        list(itertools.islice(batches(strict, seed=0, batch_size=6, num_workers=2), 2))


def test_streams_need_numbered_classes(saved: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset(str(saved), split="train").cast_column("label", datasets.Value("string"))
    rows.to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(UserError, match="must be a ClassLabel"):
        opened(tmp_path / "text", streaming=True)
    assert opened(tmp_path / "text", held_out=0).train.label_names == ("0", "1")
