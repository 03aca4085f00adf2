"""Prepared data sets go to the Hub with a card, and are trained on from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from server import TOKEN, Hub
from tiny import tiny

from entrecipes.cli import main
from entrecipes.data import prepared, stickers
from entrecipes.data.fetch import Package
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.sources.base import Options, Source
from entrecipes.errors import UserError
from entrecipes.hub.data import push_data

PACKAGE = Package("pip", "squares", "1.2.3", "0" * 64)


def squares(files: list[Path], options: Options) -> Any:
    """40 noisy squares of two classes."""
    random = np.random.default_rng(0)
    for number in range(40):
        image = random.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(100 * (number % 2))
        yield {"image": image, "label": ("dark", "bright")[number % 2], "caption": f"square {number}"}


def words(files: list[Path], options: Options) -> Any:
    for number in range(20):
        yield {"sequence": "ACGT" * 4 if number % 2 else "TTAA" * 4, "title": str(number)}


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small sets in the catalogue, whose package is downloaded already."""
    monkeypatch.setenv("ENTRECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    monkeypatch.setattr(prepared, "fetch", lambda package, downloads: downloads)
    source = Source("squares", "40 noisy squares", "MIT", (PACKAGE,), 0.1, squares, any_size=True)
    monkeypatch.setitem(CATALOGUE, "squares", source)
    own = replace(source, name="words", license="GPL-2 (the package's)", rows=words, any_size=False)
    monkeypatch.setitem(CATALOGUE, "words", replace(own, alphabet="ACGT", independent=True))


def head(hub: Hub, id: str, revision: str = "main") -> dict[str, Any]:
    """The YAML at the head of a data card."""
    return yaml.safe_load(hub.repository(id, "dataset").files(revision)["README.md"].decode().split("---\n")[1])


def test_images_come_back_and_are_trained_on(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared.prepare("squares", Options(size=8))
    assert main(["data", "push", "squares", "--repo-id", "me/squares", "--revision", "small", "--private"]) == 0
    assert f"{hub.url}/datasets/me/squares/tree/small" in capsys.readouterr().out
    repository = hub.repository("me/squares", "dataset")
    assert repository.private and len(repository.history("small")) == 2

    own, rows = (
        prepared.read_prepared(folder).dataset,
        datasets.load_dataset("me/squares", split="train", revision="small"),
    )
    assert rows.features == own.features and rows["label"][:] == own["label"][:] and rows["caption"][3] == "square 3"
    assert all(a.tobytes() == b.tobytes() for a, b in zip(rows["image"][:], own["image"][:], strict=True))
    streamed = datasets.load_dataset("me/squares", split="train", revision="small", streaming=True)
    assert next(iter(streamed))["image"].size == (8, 8) and streamed.features["label"].names == ["bright", "dark"]

    about, card = head(hub, "me/squares", "small"), repository.files("small")["README.md"].decode()
    assert about["license"] == "mit" and about["size_categories"] == ["n<1K"]
    assert (
        "pip: `squares` 1.2.3" in card and "40 rows: images" in card and "| `label` | class, 2: bright, dark |" in card
    )
    assert "data: {type: hub, id: me/squares@small}" in card and TOKEN not in card

    sent = len(hub.asked("PUT", "/storage/"))
    assert push_data("squares", "me/squares", revision="small").changed is False
    assert len(hub.asked("PUT", "/storage/")) == sent, "nothing is sent twice"

    recipe = tiny(data={"type": "hub", "id": "me/squares@small"}, training={"images": 32, "output": "run"})
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", "recipe.yaml"]) == 0
    facts = json.loads(Path("run/run.json").read_text())
    assert facts["data"]["name"] == "me/squares" and facts["data"]["label_names"] == ["bright", "dark"]
    assert facts["data"]["train_images"] == 36


def test_sequences(hub: Hub) -> None:
    prepared.prepare("words", Options())
    push_data("words", "me/words")
    assert head(hub, "me/words")["license"] == "gpl-2.0"
    card = hub.repository("me/words", "dataset").files()["README.md"].decode()
    assert "Alphabet: `ACGT`" in card and "data: {type: hub_sequences, id: me/words}" in card
    assert datasets.load_dataset("me/words", split="train")["sequence"][1] == "ACGT" * 4


def test_stickers_come_back_as_the_card_says(hub: Hub, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_parquet(str(stickers.FOLDER / "stickers.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = rows.select(range(6)).cast_column("image", datasets.Image())
    rows.save_to_disk("mine")
    noted = json.loads((stickers.FOLDER / "prepared.json").read_text()) | {"images": 6, "animated": 6}
    (tmp_path / "mine" / "prepared.json").write_text(json.dumps(noted))
    push_data("mine", "me/faces")
    shutil.rmtree("mine")
    card = hub.repository("me/faces", "dataset").files()["README.md"].decode()
    assert "data: {type: stickers, name: faces}" in card
    exec(card.split("```python\n")[2].split("```")[0], {})
    found = datasets.load_from_disk("faces")
    assert stickers.holds_stickers("faces") and stickers.open_stickers("faces").name == "stickers"
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found["image"][:], rows["image"][:], strict=True))


def test_what_is_not_sent(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="run `entrecipes data prepare squares`"):
        push_data("squares", "me/squares")
    folder = prepared.prepare("squares", Options(size=8), output=tmp_path / "mine")
    noted = json.loads((folder / "prepared.json").read_text())
    for change, message in (
        ({"name": "people"}, "must not be passed on, so that nothing was sent: real people"),
        ({"license": "not stated"}, "says no licence"),
    ):
        (folder / "prepared.json").write_text(json.dumps(noted | change))
        with pytest.raises(UserError, match=message):
            push_data("mine", "me/mine")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no prepared set"):
        push_data("other", "me/other")
    with pytest.raises(UserError, match="write owner/name"):
        push_data("squares", "mine")
    assert not hub.repositories

    (folder / "prepared.json").write_text(json.dumps(noted))
    hub.fail("POST", "/commit/", status=403)
    assert main(["data", "push", "mine", "--repo-id", "me/mine"]) == 2
    said = capsys.readouterr().err
    assert "may not write there (403)" in said and "`entrecipes data push mine --repo-id me/mine`" in said
    assert TOKEN not in said
