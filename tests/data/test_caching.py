"""Shards: made by one process or by two, after a kill, damage or a full disk, and read whole or row by row."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from squares import BAD, COUNT, squares
from tiny_text import save_tiny_text

from entrecipes.cli import main
from entrecipes.data import latents, making, text
from entrecipes.data.digits import load
from entrecipes.data.images import ImageSet
from entrecipes.data.latents import LatentRows, cache_latents
from entrecipes.data.loader import Batch, batches
from entrecipes.data.shards import LazyTensor, Shards
from entrecipes.data.text import TextEncoders, embed
from entrecipes.errors import UserError
from entrecipes.recipe.data import DigitsData
from entrecipes.recipe.pipeline import TextEncoder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed process."""
    folder = tmp_path_factory.mktemp("expected")
    squares(folder).run()
    return hashes(folder)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, locks and left-overs too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_shards_say_what_they_hold_and_give_it_whole_or_by_rows(tmp_path: Path, expected: dict[str, str]) -> None:
    seen: list[int] = []
    found = squares(tmp_path, seen).run()
    assert seen == list(range(COUNT)) and hashes(tmp_path) == expected
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["count"] == len(found) == 36 and found.bad == BAD and index["about"] == {"of": "numbers"}
    assert index["tensors"] == {"plain": {"shape": [2], "dtype": "float32"}}
    assert [part["rows"] for part in index["shards"]] == [[0, 8], [8, 16], [16, 24], [24, 32], [32, 38]]
    assert index["shards"][1]["file"] == "part-00002-of-00005.safetensors"
    whole, lazy = found.read("plain"), found.lazy("plain")
    assert whole[:, 0].tolist() == [row for row in range(COUNT) if row not in BAD] and found.read("other") is None
    drawn = torch.randperm(36)
    assert torch.equal(lazy[drawn], whole[drawn]) and torch.equal(lazy[35], whole[35]) and lazy.shape == (36, 2)
    part = lazy.select([20, 3, 35])
    assert isinstance(part, LazyTensor) and torch.equal(part[[2, 0]], whole[[35, 20]]) and len(part) == 3


def whole_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def start(folder: Path) -> subprocess.Popen:
    """Another process that makes the same, slowly."""
    return subprocess.Popen([sys.executable, str(Path(__file__).with_name("squares.py")), str(folder)])


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, a minute at most."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_after_a_kill_whole_shards_stay_and_the_rest_is_done_again(tmp_path: Path, expected: dict[str, str]) -> None:
    other = start(tmp_path)
    until(lambda: len(whole_shards(tmp_path)) >= 2)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    kept = whole_shards(tmp_path)
    before = [path.stat().st_mtime_ns for path in kept]
    assert 2 <= len(kept) < 5 and Shards.open(tmp_path) is None
    (tmp_path / f".writing-0123-{whole_shards(tmp_path)[0].name.replace('00001', '00005', 1)}").write_bytes(b"half")
    seen: list[int] = []
    squares(tmp_path, seen).run()
    assert seen == list(range(8 * len(kept), COUNT)) and hashes(tmp_path) == expected
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_two_processes_share_the_work_and_give_the_same_bits(tmp_path: Path, expected: dict[str, str]) -> None:
    other = start(tmp_path)
    until(lambda: any(tmp_path.glob(".part-*.lock")))
    seen: list[int] = []
    squares(tmp_path, seen, seconds=0.02).run()
    assert other.wait() == 0
    assert 0 < len(seen) < COUNT and len(seen) == len(set(seen)), "the other one made the rest"
    assert hashes(tmp_path) == expected


def test_damage_is_found_by_length_or_content_and_only_that_shard_made_anew(
    tmp_path: Path, expected: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    squares(tmp_path).run()
    short, changed = whole_shards(tmp_path)[1], whole_shards(tmp_path)[3]
    short.write_bytes(short.read_bytes()[:-1])
    assert Shards.open(tmp_path) is None
    seen: list[int] = []
    squares(tmp_path, seen).run()
    assert seen == list(range(8, 16)) and hashes(tmp_path) == expected and "damaged" in caplog.text
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert Shards.open(tmp_path) is not None and Shards.open(tmp_path, thorough=True) is None
    seen.clear()
    replace(squares(tmp_path, seen), thorough=True).run()
    assert seen == list(range(24, 32)) and hashes(tmp_path) == expected


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_full_disk_is_told_and_whole_shards_stay(
    tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = itertools.count()
    save = making.save_file

    def save_two(tensors: dict, path: Path, metadata: dict) -> None:
        if next(calls) == 2:
            path.write_bytes(b"half")
            raise error
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(making, "save_file", save_two)
    with pytest.raises(UserError, match="the disk is full.* 2 whole shards with 16 of 38 images are kept.*free some"):
        squares(tmp_path).run()
    assert len(whole_shards(tmp_path)) == 2 and not list(tmp_path.glob(".writing-*"))
    seen: list[int] = []
    squares(tmp_path, seen).run()
    assert seen == list(range(16, COUNT)) and hashes(tmp_path) == expected


def test_it_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(making, "TELL_EVERY", 0.0)
    caplog.set_level("INFO", logger="entrecipes")
    squares(tmp_path).run()
    assert [line.split(",")[0] for line in caplog.messages[:2]] == ["2 of 38 images", "4 of 38 images"]
    assert " a second, " in caplog.messages[0] and caplog.messages[0].endswith(" left")


@pytest.fixture
def vae(tmp_path: Path):
    """A random VAE in a folder: one latent channel of 4 from 8 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    model = AutoencoderKL(3, 3, down, up, [4, 4], layers_per_block=1, latent_channels=1, norm_num_groups=2)
    model.save_pretrained(tmp_path / "vae")
    return model.eval()


def drawn(image_set: ImageSet, **options: int) -> list[Batch]:
    return list(itertools.islice(batches(image_set, **{"seed": 3, "batch_size": 6, "flip": True} | options), 12))


def assert_same(left: list[Batch], right: list[Batch], *names: str) -> None:
    for one, other in zip(left, right, strict=True):
        for name in ("images", "labels", "indices", *names):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_on_disk_give_the_batches_of_those_in_memory(
    vae, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(making, "SHARD_BATCHES", 2)
    images = load(DigitsData(held_out=0, max_images=21), image_size=8, channels=3).train
    kept, on_disk = (
        cache_latents(images, vae, vae_id="tiny", batch_size=4, flip=True, on_device=where)
        for where in ("always", "never")
    )
    assert isinstance(on_disk.rows, LatentRows) and on_disk.tensor is None and kept.rows is None
    assert on_disk.fingerprint == kept.fingerprint and on_disk.shape == kept.shape == (2, 4, 4)
    assert_same(drawn(on_disk, num_workers=workers), drawn(kept))
    tail = drawn(on_disk, num_workers=workers, start_images=24, rank=1, world_size=2)
    assert_same(tail, drawn(kept, start_images=24, rank=1, world_size=2))
    part = on_disk.subset([20, 2])
    assert torch.equal(part.image(0), kept.tensor[20]) and torch.equal(part.rows.image(1, True), kept.mirrored[2])
    monkeypatch.setattr(latents, "IN_MEMORY_BYTES", 0)
    assert cache_latents(images, vae, vae_id="tiny", batch_size=4, flip=True).rows is not None


def test_texts_on_disk_give_the_batches_of_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "SHARD_BATCHES", 1)
    encoders = TextEncoders.load([TextEncoder(id=str(save_tiny_text(tmp_path / "bert")), tokens=4)])
    captions = [f"{'red ' * (number % 5)}cat {number}" for number in range(150)]
    whole = embed(captions, encoders, lazy=True)
    monkeypatch.setattr(text, "IN_MEMORY_BYTES", 0)
    on_disk = embed(captions, encoders, lazy=True)
    assert isinstance(on_disk, LazyTensor) and on_disk.shape == whole.shape == (150, 4, 12)
    images = load(DigitsData(held_out=0, max_images=150), image_size=8, channels=3).train
    in_memory, other = (replace(images, text=features).subset(range(5, 105)) for features in (whole, on_disk))
    assert isinstance(other.text, LazyTensor)
    assert_same(drawn(other), drawn(in_memory), "text")


def recipe(tmp_path: Path, pictures: Path) -> list[str]:
    config = "{sample_size: 4, in_channels: 1, out_channels: 1, patch_size: 2, num_attention_heads: 2, num_layers: 1, "
    model = f"{{class: DiTTransformer2DModel, config: {config} attention_head_dim: 4, num_embeds_ada_norm: 1000}}}}"
    build = f"{{model: {model}, scheduler: {{class: DDIMScheduler}}, vae: {tmp_path / 'vae'}}}"
    data = f"{{type: folder, path: {pictures}, on_device: never}}"
    file = tmp_path / "cached.yaml"
    file.write_text(f"description: d\npipeline: {{build: {build}}}\ndata: {data}\ntraining: {{images: 64}}\n")
    return ["data", "cache", str(file)]


def test_the_command_makes_what_a_run_finds(
    tmp_path: Path, pictures: Path, vae, own_home: Path, caplog: pytest.LogCaptureFixture, capsys
) -> None:
    threads = torch.get_num_threads()
    command = recipe(tmp_path, pictures)
    assert main(command) == 0 and main([*command, "data.horizontal_flip=true"]) == 0
    told = caplog.text
    assert told.count("latent cache miss") == 3 and str(own_home / "latents") in told and "(1 shard, " in told
    about = [json.loads(path.read_text())["about"] for path in own_home.glob("latents/*/index.json")]
    assert {facts["data"]["license"] for facts in about} == {"not stated"} and about[0]["vae"]["id"].startswith("/")
    caplog.clear()
    (shard, *_) = own_home.glob("latents/*/part-*")
    shard.write_bytes(shard.read_bytes()[:-4] + b"oops")
    assert main(command) == 0 and main([*command, "data.horizontal_flip=true"]) == 0
    assert "is damaged and made anew" in caplog.text and caplog.text.count("latent cache hit") == 3
    assert main(["data", "cache", "digits/demo"]) == 2 and "neither a VAE nor" in capsys.readouterr().err
    assert main([*command, "--jobs", "0"]) == 2
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_jobs_make_the_bits_of_one(tmp_path: Path, pictures: Path, vae, own_home: Path) -> None:
    def made(home: Path, *more: str) -> dict[str, str]:
        environment = os.environ | {"ENTRECIPES_HOME": str(home), "HF_HOME": str(own_home / "hf")}
        subprocess.run([sys.executable, "-m", "entrecipes", *command, *more], check=True, env=environment)
        return {str(path.relative_to(home)): hash for path in home.glob("latents/*") for hash in [hashes(path)]}

    command = recipe(tmp_path, pictures)
    assert made(tmp_path / "one") == made(tmp_path / "two", "--jobs", "2")
