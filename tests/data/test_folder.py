"""Folders of images: labels, captions, caches, and the mistakes that people make."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from entrecipes.data.folder import load
from entrecipes.data.images import Splits
from entrecipes.errors import UserError
from entrecipes.recipe.data import FolderData


def opened(folder: Path, **keys: object) -> Splits:
    """The folder at 8 pixels in colour."""
    return load(FolderData(path=str(folder), **keys), image_size=8, channels=3)


def write_metadata(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def captioned(folder: Path) -> list[dict]:
    """Rows that name every image of a folder."""
    return [
        {"file_name": str(path.relative_to(folder)), "text": f"a {path.parent.name}", "kind": path.parent.name}
        for path in sorted(folder.rglob("*.png"))
    ]


def test_class_folders_give_labels(pictures: Path) -> None:
    splits = opened(pictures, held_out=0.25)
    assert len(splits.train) == 9 and len(splits.held_out) == 3
    assert splits.train.label_names == splits.held_out.label_names == ("cat", "dog")
    assert splits.train.tensor.shape == (9, 3, 8, 8) and splits.train.tensor.dtype == torch.uint8
    assert sum(splits.train.label_counts().values()) == 9
    assert splits.train.name == "pictures" and splits.train.bad_images == []


def test_a_folder_called_train_is_no_split(pictures: Path) -> None:
    (pictures / "cat").rename(pictures / "train")
    assert opened(pictures, held_out=0).train.label_names == ("dog", "train")


def test_metadata_gives_captions_and_text_labels(pictures: Path) -> None:
    write_metadata(pictures, captioned(pictures))
    train = opened(pictures, held_out=0, label_column="kind", caption_column="text").train
    assert train.label_names == ("cat", "dog") and train.labels.tolist() == [0] * 6 + [1] * 6
    assert train.captions == ["a cat"] * 6 + ["a dog"] * 6


def test_metadata_as_csv(pictures: Path) -> None:
    lines = ["file_name,label"] + [f"{row['file_name']},{row['kind'] == 'dog':d}" for row in captioned(pictures)]
    (pictures / "metadata.csv").write_text("\n".join(lines))
    train = opened(pictures, held_out=0).train
    assert train.label_names == ("0", "1") and train.labels.tolist() == [0] * 6 + [1] * 6


def test_the_second_start_reads_the_cache(pictures: Path, own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(pictures, held_out=0).train
    with caplog.at_level("INFO", logger="entrecipes"):
        second = opened(pictures, held_out=0).train
    assert any("took 12 decoded images" in message for message in caplog.messages)
    assert torch.equal(first.tensor, second.tensor) and first.fingerprint == second.fingerprint
    (cache,) = (own_home / "images").iterdir()
    (cache / "images.npy").write_bytes(b"half")
    assert torch.equal(opened(pictures, held_out=0).train.tensor, first.tensor)


def test_a_changed_image_is_decoded_anew(pictures: Path) -> None:
    before = opened(pictures, held_out=0).train
    path = pictures / "cat" / "0.png"
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(path)
    os.utime(path, (1, 1))
    after = opened(pictures, held_out=0).train
    assert (after.tensor[0] == 77).all() and before.fingerprint != after.fingerprint


def test_bad_images_are_named_and_skipped(pictures: Path) -> None:
    (pictures / "cat" / "1.png").write_bytes(b"")
    (pictures / "cat" / "4.png").write_bytes(b"<html>not found</html>")
    dog = pictures / "dog" / "0.png"
    dog.write_bytes(dog.read_bytes()[:200])
    for _ in range(2):  # decoded, then from the cache
        train = opened(pictures, held_out=0, max_bad_images=3).train
        assert len(train) == 9 and train.label_counts() == {"cat": 4, "dog": 5}
        assert [Path(name.split(" (")[0]).name for name in train.bad_images] == ["1.png", "4.png", "0.png"]
        with pytest.raises(UserError) as caught:
            opened(pictures, held_out=0, max_bad_images=2)
        assert all(name in str(caught.value) for name in ("1.png", "4.png", "0.png", "max_bad_images"))


def test_broken_a_missing_folder(pictures: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        opened(pictures.parent / "picturs")


def test_broken_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("soon")
    with pytest.raises(UserError, match="holds no images"):
        opened(tmp_path)


def test_broken_a_metadata_typo(pictures: Path) -> None:
    write_metadata(pictures, captioned(pictures), name="metadata.json1")
    with pytest.raises(UserError, match="did you mean 'metadata.jsonl'"):
        opened(pictures)


def test_broken_a_missing_column(pictures: Path) -> None:
    write_metadata(pictures, captioned(pictures))
    with pytest.raises(UserError, match="data.label_column.* no column 'label'.*Its columns: .*kind.*null"):
        opened(pictures)
    with pytest.raises(UserError, match="data.caption_column.*did you mean 'text'"):
        opened(pictures, label_column="kind", caption_column="txt")


def test_broken_labels_asked_of_a_flat_folder(pictures: Path) -> None:
    with pytest.raises(UserError, match="no column 'label'.*null trains without classes"):
        opened(pictures / "cat")
    assert opened(pictures / "cat", label_column=None).train.labels is None


def test_broken_metadata_that_names_a_missing_file(pictures: Path) -> None:
    rows = captioned(pictures)
    (pictures / "dog" / "5.png").unlink()
    write_metadata(pictures, rows)
    with pytest.raises(UserError, match="(?s)names 1 files that are not there.*dog/5.png"):
        opened(pictures, label_column="kind")


def test_broken_too_many_bad_images(pictures: Path) -> None:
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(UserError, match="data.max_bad_images"):
        opened(pictures, held_out=0)
    with pytest.raises(UserError, match="none of the 12 images"):
        opened(pictures, held_out=0, max_bad_images=12)


def test_broken_metadata_without_file_names(pictures: Path) -> None:
    write_metadata(pictures, [{"filename": "cat/0.png", "text": "a cat"}])
    with pytest.raises(UserError, match="no column 'file_name'; did you mean 'filename'"):
        opened(pictures)


def test_broken_metadata_that_is_no_json(pictures: Path) -> None:
    (pictures / "metadata.jsonl").write_text('{"file_name": "cat/0.png"\n')
    with pytest.raises(UserError, match="metadata.jsonl can't be read"):
        opened(pictures)


def test_broken_rows_without_a_label(pictures: Path) -> None:
    rows = captioned(pictures)
    rows[3]["kind"] = None
    write_metadata(pictures, rows)
    with pytest.raises(UserError, match="1 of 12 images"):
        opened(pictures, label_column="kind")
