"""What users get wrong, through the command line: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny

from entrecipes.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`entrecipes run` on a tiny recipe with changed sections; gives the exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENTRECIPES_HOME", str(tmp_path / "home"))

    def run(*overrides: str, **sections: dict) -> tuple[int, str]:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(**sections)))
        code = main(["run", "tiny.yaml", "training.output=out", *overrides])
        return code, capsys.readouterr().err

    return run


def pictures(folder, count=20):
    """Real PNGs in two class folders."""
    for i in range(count):
        place = folder / ("cats", "dogs")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 10), dtype=np.uint8)).save(place / f"{i}.png")


def no_pictures(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture here")


def typo_in_metadata(folder):
    pictures(folder)
    (folder / "metadata.json1").write_text(json.dumps({"file_name": "cats/0.png", "label": "cat"}))


def bad_pictures(folder):
    pictures(folder)
    for path in sorted(folder.rglob("*.png"))[:6]:
        path.write_bytes(path.read_bytes()[:40])


def no_labels(folder):
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    Image.new("L", (8, 8)).save(folder / "b.png")


def missing_file(folder):
    no_labels(folder)
    lines = [json.dumps({"file_name": name, "label": 0}) for name in ("a.png", "gone.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


FOLDERS = {
    "missing": (lambda folder: None, "pictures"),
    "empty": (no_pictures, "pictures"),
    "typo in metadata": (typo_in_metadata, "metadata.json1"),
    "bad pictures": (bad_pictures, "max_bad_images"),
    "no labels": (no_labels, "label"),
    "missing file": (missing_file, "gone.png"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_broken_data_folders(run, tmp_path, name):
    make, said = FOLDERS[name]
    make(tmp_path / "pictures")
    code, error = run(data={"type": "folder", "path": "pictures", "max_bad_images": 3})
    assert code == 2 and error.count("error: ") == 1 and said in error, error
    assert not (tmp_path / "out").exists(), "nothing may be left behind"


def test_clips_are_not_measured_on_trained_poses_unasked(run):
    clips, said = {"type": "video_folder", "path": "videos", "image_size": 16}, "evaluation.reference: by default"
    code, error = run(data=clips, evaluation={"metrics": ["ssim"]})
    assert code == 2 and said in error and "set held_out" in error
    for choice in ({"metrics": ["ssim"], "reference": "train"}, {"metrics": ["ssim"], "reference": "held_out"}, {}):
        assert said not in run(data=clips, evaluation=choice)[1]


CHECKPOINTS = {
    "cut short": (lambda path: (path / "model.safetensors").write_bytes(b"short"), "damaged"),
    "file gone": (lambda path: (path / "ema.safetensors").unlink(), "missing"),
    "broken state": (lambda path: (path / "state.json").write_text("{"), "damaged"),
    "no checkpoint": (lambda path: shutil.rmtree(path), "no such checkpoint"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_broken_checkpoints(run, tmp_path, name):
    damage, said = CHECKPOINTS[name]
    assert run(training={"images": 16})[0] == 0
    path = next((tmp_path / "out/checkpoints").iterdir())
    damage(path)
    code, error = run(f"training.resume={path.relative_to(tmp_path)}")
    assert code == 2 and error.count("error: ") == 1 and said in error and path.name in error, error


def test_a_checkpoint_of_another_model(run, tmp_path):
    assert run(training={"images": 16})[0] == 0
    code, error = run(training={"seed": 3})
    assert code == 2 and "training.seed: 0 there, 3 here" in error and "training.resume=never" in error
    assert run("training.resume=never", training={"seed": 3, "images": 16})[0] == 0
    assert (tmp_path / "out.previous-1/pipeline").exists(), "the earlier run is moved aside, not lost"


def test_where_nothing_can_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = run("training.output=file/out")
    assert code == 2 and "file/out" in error and "training.output" in error
