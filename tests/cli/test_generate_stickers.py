"""`entrecipes generate` for stickers: the tasks, given frames, files that are written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from tiny import UNET
from tiny_stickers import CAPTIONS, FRAMES, SIDE, save_stickers, train_stickers

from entrecipes import StickerPipeline
from entrecipes.cli import main
from entrecipes.cli.stickers import fits
from entrecipes.recipe.masks import TASKS, given_at


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stickers")
    return train_stickers(folder, save_stickers(folder))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A drawing on a see-through ground, an animation, and a file that is none."""
    drawing = Image.new("RGBA", (SIDE, SIDE))
    drawing.paste((200, 30, 40, 255), (2, 2, 5, 6))
    drawing.save(tmp_path / "first.png")
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "notes.txt").write_text("a red cat\n\na cat sleeps\n")
    return tmp_path


def generate(source: Path, *options: Any) -> int:
    return main(["generate", str(source), "--steps", "1", *map(str, options)])


def frames_of(path: Path, mode: str = "RGB") -> list[np.ndarray]:
    with Image.open(path) as image:
        return [image.seek(i) or np.asarray(image.convert(mode)).astype(int) for i in range(image.n_frames)]


def strip(path: Path) -> np.ndarray:
    """The frames [F, S, S, 3] of a film strip."""
    with Image.open(path) as image:
        return np.stack(np.split(np.asarray(image.convert("RGB")).astype(int), FRAMES, axis=1))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_shows_the_runs_own_held_out_clips(task: str, finished: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "clips.png"
    assert generate(finished, "--task", task, "-n", 2, "-o", output) == 0
    said, given = capsys.readouterr().out, any(given_at(task, FRAMES))
    shown = ["given", "real", "generated"] if given else ["real", "generated"]
    if task == "uncond":
        shown = ["generated"]
    assert f"2 stickers of 4 frames in {output}: {', '.join(shown)}\n" in said
    with Image.open(output) as image:
        assert image.size == (4 * 96 + 8, 2 * len(shown) * 96 + 12)
    texts = output.with_suffix(".txt")
    assert texts.exists() == (task not in ("i2v", "uncond"))
    assert not texts.exists() or set(texts.read_text().splitlines()) <= set(CAPTIONS)


def test_the_task_follows_from_what_is_given(finished: Path, pictures: Path, capsys: Any) -> None:
    output, each = pictures / "out.png", pictures / "each"
    asked = ["--frame", f"0={pictures / 'first.png'}", "--frame", f"-1={pictures / 'moves.gif'}#2"]
    for pin in (["--pin"], []):
        assert generate(finished, *asked, *pin, "--prompt", "a red cat", "-o", output, "--separate", each) == 0
        assert "1 stickers of 4 frames" in capsys.readouterr().out
        made = strip(each / "00000.png")
        if pin:
            with Image.open(pictures / "first.png") as image:
                white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            assert np.array_equal(made[0], np.asarray(white)), "pixel for pixel"
            assert (made[3][3:5] == (0, 0, 255)).all() and (made[3][0] == 255).all(), "fitted, white above and below"
            pinned = made
    assert np.abs(made[0] - pinned[0]).mean() > 1, "left to itself the model draws its own version"


def test_texts_are_taken_in_turn_and_seeds_count_up(finished: Path, pictures: Path) -> None:
    each, alone = pictures / "each", pictures / "alone"
    asked = ["--prompt", f"@{pictures / 'notes.txt'}", "-n", 3, "--batch-size", 2, "--frames", 3]
    assert generate(finished, *asked, "-o", pictures / "x.gif", "--separate", each, "--fps", 4) == 0
    assert (pictures / "x.txt").read_text() == "a red cat\na cat sleeps\na red cat\n"
    assert [file.name for file in sorted(each.iterdir())] == ["00000.gif", "00001.gif", "00002.gif"]
    with Image.open(pictures / "x.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (3, (96, 3 * 96), 250), "nothing given, nor real"
    again = ["--prompt", "a cat sleeps", "--seed", 1, "--frames", 3, "-o", pictures / "y.gif", "--separate", alone]
    assert generate(finished / "pipeline", *again) == 0
    same = zip(frames_of(each / "00001.gif"), frames_of(alone / "00000.gif"), strict=True)
    assert all(np.abs(a - b).max() <= 2 for a, b in same), "whatever stands beside it"


@pytest.mark.parametrize("suffix", [".webp", ".apng", ".gif"])
def test_the_background_is_see_through_if_asked(suffix: str, finished: Path, pictures: Path) -> None:
    output = pictures / f"clear{suffix}"
    asked = ["--frame", f"0={pictures / 'first.png'}", "--pin", "-o", output, "--separate", pictures / "each"]
    assert generate(finished, *asked, "--transparent") == 0
    first, *others = frames_of(pictures / "each" / f"00000{suffix}", "RGBA")
    with Image.open(pictures / "first.png") as image:
        assert np.array_equal(first[..., 3] > 0, np.asarray(image)[..., 3] > 0)
    assert len(others) == 3 and any((frame[..., 3] > 0).any() for frame in others)
    given, made = np.split(frames_of(output, "RGBA")[1], 2, axis=1)
    assert (given == (224, 224, 224, 255)).all(), "what is not given stays grey"
    assert generate(finished, *asked) == 0
    assert (frames_of(output, "RGBA")[0][..., 3] == 255).all()


def test_a_task_is_known_by_its_frames() -> None:
    for frames in (4, 5, 8):
        for task in TASKS:
            text = task not in ("i2v", "uncond")
            assert fits(task, given_at(task, frames), text)
            assert fits(task, given_at(task, frames), not text) == (task.endswith(("interpolation", "prediction")))
    first, ends = (True, False, False, False), (True, False, False, True)
    assert [task for task in TASKS if fits(task, first, True)] == ["it2v", "post_frame_prediction"]
    assert [task for task in TASKS if fits(task, ends, True)] == ["interpolation"]
    assert not any(fits(task, (True,) * 4, True) for task in TASKS), "nothing is left to be made"


def test_what_cannot_be_used_is_said_in_one_line(finished: Path, pictures: Path, capsys: Any) -> None:
    first, moves = pictures / "first.png", pictures / "moves.gif"
    textless = StickerPipeline.from_pretrained(finished / "pipeline")
    StickerPipeline(textless.unet, textless.scheduler).save_pretrained(pictures / "textless")
    unet = UNet2DModel(**UNET["config"])
    ConsistencyModelPipeline(unet, DDIMScheduler()).save_pretrained(pictures / "images")
    refused = {
        "a clip has frames 0 to 3, or -4 to -1": (finished, "--frame", f"4={first}"),
        "write INDEX=PICTURE": (finished, "--frame", first),
        "nothing.png is no file": (finished, "--frame", "0=nothing.png"),
        "notes.txt can't be read (not an image)": (finished, "--frame", f"0={pictures / 'notes.txt'}"),
        "has 3 frame(s), 0 to 2": (finished, "--frame", f"0={moves}#3"),
        "frame 0 is given twice": (finished, "--frame", f"0={first}", "--frame", f"-4={first}"),
        "--task i2v: asks for one frame of 4 and no --prompt": (finished, "--frame", f"0={first}", "--prompt", "a cat")
        + ("--task", "i2v"),
        "--task it2v: asks for one frame of 4 and a --prompt": (finished, "--task", "it2v", "--prompt", "a cat"),
        "no such file": (finished, "--prompt", "@nowhere.txt"),
        "there is no text in it": (finished, "--prompt", " "),
        "has no text encoder": (pictures / "textless", "--prompt", "a cat"),
        "no run folder with stickers of its own": (pictures / "textless",),
        "the run's own clips have 4": (finished, "--frames", 5),
        "takes no poses": (finished, "--poses", moves),
        "--transparent": (finished, "--transparent", "-o", "x.png"),
        "--frames and --fps must be above 0": (finished, "--frames", 0),
        "must be above 0": (finished, "--fps", 0.0),
        "unconditional": (finished, "--labels", "1"),
        "name it .png": (finished, "-o", "x.txt"),
        "makes no stickers": (pictures / "images", "--prompt", "a cat", "--pin"),
    }
    for message, options in refused.items():
        assert generate(*options) == 2, message
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and message in said, (message, said)
