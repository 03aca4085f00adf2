"""Small real videos with poses beside them, good ones and every kind of bad one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entrecipes.cli import main
from entrecipes.data.clip_inspection import holds_clips
from entrecipes.data.sources import people
from entrecipes.data.video_files import BadVideo, person_squares, read_video
from entrecipes.data.video_folder import load
from entrecipes.errors import UserError
from entrecipes.recipe.data import VideoFolderData

WIDTH, HEIGHT = 48, 32


def block(count: int, moving: bool = True) -> list[np.ndarray]:
    """A white block on grey that walks from left to right."""
    frames = []
    for t in range(count):
        frame = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        x = 4 + 2 * (t if moving else 0)
        frame[8:24, x : x + 8] = 255
        frames.append(frame)
    return frames


def gif(path: Path, frames: list[np.ndarray]) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    for number, image in enumerate(images):  # GIF writers drop frames that repeat the one before
        image.putpixel((0, 0), (number, 0, 0))
    images[0].save(path, save_all=True, append_images=images[1:], duration=40, loop=0)
    return path


def mp4(path: Path, frames: list[np.ndarray]) -> Path:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (WIDTH, HEIGHT))
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def poses(count: int, joints: int = 13) -> list[list[list[float]]]:
    """All joints within the block."""
    spread = np.linspace(0, 1, joints)
    return [[[(4 + 2 * t + 8 * s) / WIDTH, (8 + 16 * s) / HEIGHT, 0.9] for s in spread.tolist()] for t in range(count)]


def beside(video: Path, content: object) -> None:
    video.with_suffix(".poses.json").write_text(json.dumps(content))


def section(path: Path, **keys: object) -> VideoFolderData:
    return VideoFolderData(path=str(path), **{"image_size": 16, "frames": 4, "frame_step": 1, "held_out": 0} | keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good GIF of 12 frames."""
    (tmp_path / "mine").mkdir()
    beside(gif(tmp_path / "mine" / "good.gif", block(12)), poses(12))
    return tmp_path / "mine"


def test_frames_and_poses_are_cropped_alike(folder: Path) -> None:
    train = load(section(folder)).train
    assert train.tensor.shape == (5, 3, 9, 16, 16) and train.bad_images == []
    # the third clip's third frame is frame 6: its block begins at 16 px, 8 px into the square in the middle
    frame, keypoints = train.tensor[2, 0, 2].numpy(), train.keypoints[2, 2].numpy()
    assert frame[8, 5] == pytest.approx(255, abs=6) and frame[8, 1] == pytest.approx(90, abs=6)
    lit = np.flatnonzero(frame[8] > 200)
    assert abs(keypoints[:, 0].min() * 16 - lit.min()) < 1.01 and abs(keypoints[:, 0].max() * 16 - lit.max() - 1) < 1.01


def test_a_crop_that_follows_the_person(folder: Path) -> None:
    train = load(section(folder, crop="person")).train
    places = train.keypoints[..., :2]
    assert 0 <= places.min() and places.max() <= 1
    middle = load(section(folder)).train.keypoints[..., 0]
    assert np.ptp(places[..., 0].mean(2).numpy()) < np.ptp(middle.mean(2).numpy())


def test_a_crop_depends_on_which_poses_count(folder: Path) -> None:
    doubtful = np.array(poses(12))
    doubtful[6:] = [[[0.5, 0.5, 0.6]]]
    beside(folder / "good.gif", doubtful.tolist())
    all_of_them, sure = (load(section(folder, crop="person", min_visibility=v)).train.tensor[0] for v in (0.5, 0.8))
    assert not np.array_equal(all_of_them, sure), "not what was kept for other settings"


def test_squares_stay_inside_the_picture() -> None:
    moving = np.array(poses(40))
    moving[..., 0] = moving[..., 0] * 0.5
    squares = person_squares(moving, WIDTH, HEIGHT)
    left, top, side = squares.T
    assert left.min() >= 0 and top.min() >= 0 and (left + side).max() <= WIDTH and (top + side).max() <= HEIGHT
    assert np.abs(np.diff(squares, axis=0)).max() < 2


def test_an_mp4_and_33_landmarks_in_metadata(tmp_path: Path) -> None:
    mp4(tmp_path / "a.mp4", block(10))
    rows = [{"file_name": "a.mp4", "poses": [*poses(9, joints=33), None]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = load(section(tmp_path, clip_step=1)).train
    assert train.tensor.shape[0] == 6 and "a.mp4 frames 6 to 9 (no pose in 1 of 4 frames)" in train.bad_images


def test_each_bad_video_is_named_and_counted(folder: Path) -> None:
    pytest.importorskip("cv2")
    beside(gif(folder / "short.gif", block(3)), poses(3))
    gif(folder / "no_poses.gif", block(12))
    beside(gif(folder / "lost.gif", block(12)), [None] * 12)
    beside(gif(folder / "mismatch.gif", block(12)), poses(10))
    beside(gif(folder / "still.gif", block(12, moving=False)), poses(12))
    beside(gif(folder / "wrong.gif", block(12)), [[1, 2]] * 12)
    beside(gif(folder / "pixels.gif", block(12)), (np.array(poses(12)) * [WIDTH, HEIGHT, 1]).tolist())
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    beside(folder / "broken.mp4", poses(12))
    (folder / "broken.gif").write_bytes(b"no picture")
    beside(folder / "broken.gif", poses(12))
    mp4(folder / "cut.mp4", block(12))
    beside(folder / "cut.mp4", poses(12))
    (folder / "cut.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:-600])
    train = load(section(folder, clip_step=8, min_motion=2)).train
    assert train.tensor.shape[0] == 2
    reasons = {entry.split(" ")[0]: entry for entry in train.bad_images}
    wanted = {
        "short.gif": "too short: 3 frames, a clip spans 4",
        "no_poses.gif": "no poses: there is no no_poses.poses.json",
        "lost.gif": "no pose in any of its 12 frames",
        "mismatch.gif": "12 frames but 10 poses",
        "still.gif": "still: it changes by",
        "wrong.gif": "not frames x 13",
        "pixels.gif": "look like pixels",
        "broken.mp4": "no frame can be decoded",
        "broken.gif": "can't be decoded: not a GIF",
        "cut.mp4": "no frame can be decoded",
    }
    assert set(reasons) == set(wanted)
    assert [name for name, reason in wanted.items() if reason not in reasons[name]] == []
    with pytest.raises(UserError, match=r"more bad clips than data.max_bad_clips \(8\)(.|\n)*broken.gif \(can't"):
        load(section(folder, clip_step=8, min_motion=2, max_bad_clips=8))


def test_a_gif_cut_anywhere_is_a_bad_video_or_a_shorter_one(tmp_path: Path) -> None:
    whole = gif(tmp_path / "whole.gif", block(12)).read_bytes()
    bad = 0
    for length in range(1, len(whole), 7):
        (tmp_path / "cut.gif").write_bytes(whole[:length])
        try:
            assert len(list(read_video(tmp_path / "cut.gif"))) <= 12
        except BadVideo:
            bad += 1
    assert bad > 2


def test_what_cannot_be_opened_at_all(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(section(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        load(section(tmp_path / "empty"))
    (folder / "metadata.jsonl").write_text('{"file_name": "good.gif"}\n')
    with pytest.raises(UserError, match="metadata.jsonl:1 is no row"):
        load(section(folder))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.mp4", "poses": []}))
    assert load(section(folder)).train.bad_images[0].startswith("gone.mp4 (")


def test_a_changed_file_is_read_anew(folder: Path) -> None:
    before = load(section(folder)).train.fingerprint
    assert load(section(folder)).train.fingerprint == before
    gif(folder / "good.gif", block(12)[::-1])
    assert load(section(folder)).train.fingerprint != before


def test_without_opencv_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "a.mp4").write_bytes(b"whatever")
    with pytest.raises(UserError, match=r"pip install 'entrecipes\[video\]'"):
        next(read_video(tmp_path / "a.mp4"))
    with pytest.raises(BadVideo):
        (tmp_path / "a.gif").write_bytes(b"whatever")
        next(read_video(tmp_path / "a.gif"))


def test_inspecting_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    beside(gif(folder / "short.gif", block(3)), poses(3))
    beside(gif(folder / "long.gif", block(20)), poses(20))
    assert main(["data", "inspect", str(folder), "-o", str(tmp_path / "strips.png")]) == 0
    told = capsys.readouterr().out
    assert "videos     3, 35 frames" in told and "long.gif: 20 frames, 1 clips" in told and "short.gif frames" in told
    assert Image.open(tmp_path / "strips.png").size == (9 * 64, 2 * 64)
    assert not holds_clips(str(pictures)) and not holds_clips("mnist")


def test_real_people_are_cut_where_the_pose_is_lost() -> None:
    measured = json.loads(people.POSES.read_text())
    assert {name: len(measured[file]) for name, (_, file, _) in people.VIDEOS.items()} == {
        **{f"balance/cam0{i}": 100 for i in (1, 2, 3, 4)},
        "street/jumping": 230,
        "street/walking": 230,
    }
    _, file, part = people.VIDEOS["street/jumping"]
    poses = np.array([pose or [np.nan] * 39 for pose in measured[file]]).reshape(-1, 13, 3)
    plan = people._plan(poses, part, 1768, 994)
    assert len(plan) > 100 and max(plan) < 169 and 0 not in plan
    for square, pose in plan.values():
        assert 0 <= pose[:, :2].min() and pose[:, :2].max() <= 1 and pose[:, 2].mean() >= 0.8
        assert square[0] >= 0 and square[1] >= 0 and square[0] + square[2] <= 1768 and square[1] + square[2] <= 994
