"""Making sets of stickers: files of every format, key frames, names of emoji, a call that is cut off."""

from __future__ import annotations

import io
import json
import logging
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from entrecipes.data.key_frames import even_frames, key_frames, motion, ping_pong
from entrecipes.data.sources.stickers import base_of
from entrecipes.data.sticker_files import BadSticker, read_sticker
from entrecipes.data.sticker_inspection import inspect_stickers
from entrecipes.data.sticker_preparation import PART, StickerOptions, from_folder, from_packs, prepare_stickers
from entrecipes.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_stickers.py"


def bars(count: int, side: int = 16) -> list[Image.Image]:
    """A red bar that goes from left to right over nothing."""
    frames = np.zeros((count, side, side, 4), np.uint8)
    for at, frame in enumerate(frames):
        frame[:, at % side] = (255, 0, 0, 255)
    return [Image.fromarray(frame) for frame in frames]


def save(path: Path | io.BytesIO, count: int, side: int = 16, **how: object) -> None:
    first, *rest = bars(count, side)
    first.save(path, save_all=count > 1, append_images=rest, duration=50, loop=0, **how)


def write_video(path: Path, count: int) -> None:
    cv2 = pytest.importorskip("cv2")
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (32, 32))
    for at in range(count):
        frame = np.full((32, 32, 3), 255, np.uint8)
        frame[:, 3 * at : 3 * at + 6] = (0, 0, 255)
        video.write(frame)
    video.release()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stickers of five formats, one file that is cut short, one that is none, one that is missing, one Lottie."""
    place = tmp_path / "mine"
    place.mkdir()
    save(place / "a.gif", 5, disposal=2)
    save(place / "b.apng", 9, format="PNG")
    save(place / "c.webp", 3, lossless=True)
    write_video(place / "d.mp4", 8)
    save(place / "e.png", 1)
    (place / "cut.webp").write_bytes((place / "c.webp").read_bytes()[:150])
    (place / "none.gif").write_text("no picture")
    (place / "moving.json").write_text("{}")
    lines = [
        {"file_name": name, "caption": f"sticker {name}", "group": "test", "base": name[0]}
        for name in ("a.gif", "b.apng", "c.webp", "d.mp4", "e.png", "cut.webp", "none.gif", "gone.gif", "moving.json")
    ]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


@pytest.mark.parametrize(("name", "count", "fps"), [("a.gif", 5, 20), ("b.apng", 9, 20), ("c.webp", 3, 20)])
def test_moving_pictures_are_read_whole_on_white(folder: Path, name: str, count: int, fps: float) -> None:
    for file in (folder / name, (folder / name).read_bytes()):
        sticker = read_sticker(file, Path(name).suffix, 16)
        assert sticker.frames.shape == (count, 16, 16, 3) and sticker.fps == pytest.approx(fps)
        for at, frame in enumerate(sticker.frames):
            assert (frame[:, at] == (255, 0, 0)).all() and (np.delete(frame, at, 1) == 255).all()


def test_videos_and_stills_are_read(folder: Path) -> None:
    video = read_sticker((folder / "d.mp4").read_bytes(), ".mp4", 32)
    assert video.frames.shape == (8, 32, 32, 3) and video.fps == pytest.approx(12)
    red = video.frames[:, 16, :, 1] < 128
    assert np.abs([np.flatnonzero(row).mean() - 3 * at - 2.5 for at, row in enumerate(red)]).max() < 1
    assert read_sticker(folder / "e.png", ".png", 16).frames.shape == (1, 16, 16, 3)


def test_a_sticker_that_is_no_square_is_kept_whole(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "wide.png")
    frame = read_sticker(tmp_path / "wide.png", ".png", 10).frames[0]
    assert (frame[[0, 1, 8, 9]] == 255).all() and (frame[4:6] == (0, 0, 255)).all()


@pytest.mark.parametrize("name", ["cut.webp", "none.gif", "gone.gif"])
def test_what_is_no_sticker_is_told(folder: Path, name: str) -> None:
    with pytest.raises(BadSticker):
        read_sticker(folder / name, Path(name).suffix, 16)


def test_short_clips_run_to_and_fro() -> None:
    assert ping_pong(3, 8) == [0, 1, 2, 1, 0, 1, 2, 1]
    assert ping_pong(2, 5) == [0, 1, 0, 1, 0] and ping_pong(1, 3) == [0, 0, 0]
    assert even_frames(72, 8) == [0, 9, 18, 27, 36, 45, 54, 63] and even_frames(8, 8) == list(range(8))
    assert key_frames(np.zeros((3, 8, 8, 3), np.uint8), 4, "cluster") == [0, 1, 2, 1]


def test_clusters_follow_what_changes_and_pass_over_rests() -> None:
    """Four looks that last 10, 2, 1 and 7 frames: the key frames are where each begins."""
    looks = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    clip = looks[np.repeat([0, 1, 2, 3], [10, 2, 1, 7])].copy()
    clip[:, 0, 0, 0] = np.arange(20)  # no two frames are the same
    assert key_frames(clip, 4, "cluster") == [0, 10, 12, 13]
    assert key_frames(clip, 4, "even") == [0, 5, 10, 15]
    still = np.zeros((20, 16, 16, 3), np.uint8)
    assert key_frames(still, 4, "cluster") == [0, 5, 10, 15], "too few looks: spaced evenly"


def test_motion_is_the_mean_difference() -> None:
    clip = np.array([0, 10, 4], np.uint8).reshape(3, 1, 1, 1)
    assert motion(clip) == 8 and motion(clip[:1]) == 0


def test_bad_files_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    noted, bad = prepare_stickers(from_folder(folder, "ours"), tmp_path / "set", StickerOptions(16, 4, "even"))
    assert [name.split(" ")[0] for name in bad] == ["cut.webp", "none.gif", "gone.gif", "moving.json"]
    assert (noted["images"], noted["animated"], noted["bad"]) == (5, 4, bad)
    table = datasets.load_from_disk(str(tmp_path / "set"))
    assert table["id"][:] == ["a.gif", "b.apng", "c.webp", "d.mp4", "e.png"]
    assert table["keyframe_idx"][:] == [[0, 1, 2, 3], [0, 2, 4, 6], [0, 1, 2, 1], [0, 2, 4, 6], [0]]
    assert table["static"][:] == [False] * 4 + [True] and table["n_frames"][:] == [5, 9, 3, 8, 1]
    assert table["base"][:] == ["a", "b", "c", "d", "e"] and table["group"][0] == "test"
    strip = np.asarray(table[1]["image"].convert("RGB"))
    assert strip.shape == (16, 64, 3)
    for place, frame in enumerate((0, 2, 4, 6)):
        assert (strip[:, 16 * place + frame] == (255, 0, 0)).all()
    assert (tmp_path / "set" / "LICENSE.txt").read_text() == "ours\n"
    assert "4 moving and 1 still stickers, 16 px" in (tmp_path / "set" / "README.md").read_text()
    assert not (tmp_path / ".set-parts").exists()
    with pytest.raises(UserError, match="is there already"):
        prepare_stickers(from_folder(folder, "ours"), tmp_path / "set", StickerOptions(16, 4))
    seen = inspect_stickers(str(tmp_path / "set"))
    assert seen.groups == {"test": (4, 1)} and len(seen.page) == 4 and "sticker a.gif" in seen.captions
    seen.save_page(str(tmp_path / "page.gif"))
    assert Image.open(tmp_path / "page.gif").n_frames == 4
    assert np.asarray(seen.grid)[:, :, 1].min() < 128, "something is drawn"


def test_a_call_that_was_killed_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "many"
    place.mkdir()
    for number in range(PART + 6):
        save(place / f"{number}.webp", 3 + number % 5, side=96)
    lines = [{"file_name": f"{n}.webp", "caption": f"number {n}"} for n in range(PART + 6)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    call = [
        sys.executable,
        str(SCRIPT),
        "--folder",
        str(place),
        "--size",
        "16",
        "--frames",
        "4",
        "--key-frames",
        "even",
        "-o",
    ]
    first = tmp_path / ".set-parts" / "000000.parquet"
    process = subprocess.Popen(
        [*call, str(tmp_path / "set")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "64 stickers done" in line:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "set").exists()
    assert first.exists()
    (first.parent / "000001.writing").write_bytes(b"half a part")
    options = StickerOptions(16, 4, "even")
    caplog.set_level(logging.INFO)
    noted, _ = prepare_stickers(from_folder(place, "not stated"), tmp_path / "set", options)
    done = [record.getMessage() for record in caplog.records if "stickers done" in record.getMessage()]
    assert done == [f"{PART + 6} stickers done"], "only the second part was made"
    assert noted["images"] == PART + 6
    prepare_stickers(from_folder(place, "not stated"), tmp_path / "at_once", options)
    resumed, at_once = (datasets.load_from_disk(str(tmp_path / name)).to_list() for name in ("set", "at_once"))
    assert resumed == at_once and [row["id"] for row in resumed] == [f"{n}.webp" for n in range(PART + 6)]


def test_parts_made_otherwise_are_thrown_away(folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / ".set-parts"
    parts.mkdir()
    (parts / "key.json").write_text('{"options": "other"}')
    (parts / "000000.parquet").write_bytes(b"of another set")
    noted, _ = prepare_stickers(from_folder(folder, "ours"), tmp_path / "set", StickerOptions(16, 4))
    assert noted["images"] == 5


def test_the_script_tells_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare_stickers.py", "-o", str(tmp_path / "set")])
    assert main() == 2
    told = capsys.readouterr().err
    assert told.startswith("error: npm is not installed") and "--archive" in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.gif"}', "metadata.jsonl:1: KeyError: 'caption'"),
        ("a.gif: cat", "metadata.jsonl:1: JSONDecode"),
        ('{"file_name": 3, "caption": "a cat"}', "metadata.jsonl:1: TypeError: both must be text"),
        ('{"file_name": "a.gif", "caption": null}', "metadata.jsonl:1: TypeError: both must be text"),
    ],
)
def test_metadata_that_says_too_little(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        from_folder(tmp_path, "ours")
    with pytest.raises(UserError, match="caption"):
        from_folder(tmp_path / "none", "ours")


def package(path: Path, name: str, files: dict[str, bytes]) -> Path:
    """A .tgz as npm packs it."""
    with tarfile.open(path, "w:gz") as archive:
        for file, content in {"package.json": json.dumps({"name": name}).encode(), **files}.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    """A pack of four files (an artist who moves, a cat, a still flag, one without a name) and the two of names."""
    moving, still = io.BytesIO(), io.BytesIO()
    save(moving, 4, format="WEBP", lossless=True)
    save(still, 1, format="WEBP", lossless=True)
    assets = {
        "1f468-1f3fe-200d-1f3a8": moving,
        "1f408": still,
        "1f1e6-1f1e8": still,
        "1f9ff-1f9ff": still,
    }
    person = {"name": "man artist", "group": "People & Body"}
    names = {
        "👨‍🎨": person,
        "🐈": {"name": "cat", "group": "Animals & Nature"},
        "🇦🇨": {"name": "flag", "group": "Flags"},
    }
    words = {"👨‍🎨": ["man_artist", "painter", ":)", "man", "hand_craft", "art"], "🐈": ["cat", "meow"]}
    pack = {f"assets/{stem}.webp": content.getvalue() for stem, content in assets.items()}
    return [
        package(tmp_path / "pack.tgz", "@lobehub/fluent-emoji-anim-2", pack),
        package(tmp_path / "names.tgz", "unicode-emoji-json", {"data-by-emoji.json": json.dumps(names).encode()}),
        package(tmp_path / "words.tgz", "emojilib", {"dist/emoji-en-US.json": json.dumps(words).encode()}),
    ]


def test_archives_give_captions_bases_and_tones(archives: list[Path]) -> None:
    artist, cat = from_packs(None, archives).items
    assert artist.caption == "an animated sticker of man artist with medium-dark skin, painter, hand craft"
    assert (artist.tone, artist.base, artist.group) == ("medium-dark", "🧑‍🎨", "People & Body")
    assert cat.still_caption == "a sticker of cat, meow"
    assert [item.id for item in from_packs("2", archives, flags=True).items][2] == "1f1e6-1f1e8"


def test_archives_of_something_else(archives: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the package left-pad"):
        from_packs(None, [package(tmp_path / "other.tgz", "left-pad", {})])
    (tmp_path / "no.tgz").write_text("nothing")
    with pytest.raises(UserError, match="no package"):
        from_packs(None, [tmp_path / "no.tgz"])
    with pytest.raises(UserError, match="the packs are 1, 2, 3 and 4"):
        from_packs("5", archives)
    content = archives[0].read_bytes()
    archives[0].write_bytes(content[: len(content) - 60])
    with pytest.raises(UserError, match="ended before"):
        from_packs(None, archives)


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("👨‍🎨", "🧑‍🎨"),
        ("👩‍🎨", "🧑‍🎨"),
        ("🏃‍♀️", "🏃"),
        ("👩", "🧑"),
        ("👧", "🧒"),
        ("👨‍👩‍👦", "🧑‍🧒"),
        ("👨‍👨‍👧‍👦", "🧑‍🧒"),
        ("👨‍❤️‍💋‍👨", "🧑‍❤‍💋"),
        ("🐈‍⬛", "🐈‍⬛"),
    ],
)
def test_variants_share_a_base(variant: str, base: str) -> None:
    points = [ord(character) for character in variant if character != "\ufe0f"]
    assert "".join(map(chr, base_of(points))) == base
