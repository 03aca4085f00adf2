"""Stickers as data: the embedded set, the split, what is asked of it; videos with captions."""

from __future__ import annotations

import itertools
import json
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from entrecipes.data import captioned_clips, stickers
from entrecipes.data.loader import batches
from entrecipes.data.sources.stickers import Item
from entrecipes.data.sticker_preparation import Collection, StickerOptions, prepare_stickers
from entrecipes.errors import UserError
from entrecipes.recipe.data import CaptionedClipsData, StickersData


@pytest.fixture(scope="module")
def embedded():
    return stickers.load(StickersData())


@pytest.fixture
def own(tmp_path):
    """Twelve moving bars of six bases in two groups, and three stills, of one of them and of two others."""
    items = []
    for number in range(12):
        frames = [np.full((16, 16, 3), 255, np.uint8) for _ in range(6)]
        for at, frame in enumerate(frames):
            frame[:, at : at + 2] = 20 * number
        file = tmp_path / f"{number}.gif"
        first, *rest = map(Image.fromarray, frames)
        first.save(file, save_all=True, append_images=rest, duration=100, disposal=2)
        group = "Shapes & bars" if number < 8 else "Other"
        items.append(Item(f"bar{number}", file, ".gif", f"bar number {number}", group=group, base=f"bar{number // 2}"))
    for base in ("bar0", "dot", "ring"):
        file = tmp_path / f"{base}.png"
        Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(file)
        items.append(Item(f"still {base}", file, ".png", f"still {base}", group="Other", base=base))
    folder = tmp_path / "set"
    prepare_stickers(Collection(items, "Bars.", "ours", "bars"), folder, StickerOptions(16, 4))
    return folder


@pytest.fixture
def motions(tmp_path):
    """A prepared set of videos: a dot that goes its own way in each of three motions, seen twice."""
    rows = []
    for number, motion in enumerate(("walk", "dance_a", "jump")):
        for view in range(2):
            for frame in range(30):
                pixels = np.zeros((16, 16, 3), np.uint8)
                pixels[(frame + 5 * number) % 16, frame * (view + 1) % 16] = 255
                joints = [0.0] * 39
                rows.append((Image.fromarray(pixels), f"{motion}/view{view}", frame, joints))
    columns = dict(zip(("image", "video", "frame", "keypoints"), zip(*rows, strict=True), strict=True))
    folder = tmp_path / "motions"
    datasets.Dataset.from_dict({key: list(value) for key, value in columns.items()}).save_to_disk(str(folder))
    facts = {"name": "mocap", "source": "Dots.", "license": "ours", "options": {"size": 16}, "videos": 6}
    (folder / "prepared.json").write_text(json.dumps(facts))
    return folder


def test_the_embedded_set_opens_at_once_with_all_its_stickers(embedded):
    stickers._embedded.cache_clear()
    began = time.perf_counter()
    splits = stickers.load(StickersData(held_out=0))
    assert time.perf_counter() - began < 3
    everything = splits.train
    assert splits.held_out is None
    assert everything.tensor.shape[1:] == (3, 8, 32, 32) and everything.tensor.dtype == torch.uint8
    assert (everything.lengths == 8).sum() == 477 and (everything.lengths == 1).sum() == len(everything) - 477 == 272
    assert "Microsoft" in everything.license and "LobeHub" in everything.license
    moving = everything.lengths == 8
    assert everything.motion[~moving].eq(0).all() and everything.motion[moving].min() > 0
    assert everything.motion.max() == 1
    stills = everything.tensor[~moving]
    assert (stills == stills[:, :, :1]).all()
    assert all(caption.startswith("an animated sticker of ") for caption in np.array(everything.captions)[moving])


def test_drawings_do_not_leak(embedded):
    base = {row["caption"]: row["base"] for row in stickers._embedded().rows}
    train = {base[caption] for caption in embedded.train.captions}
    held_out = {base[caption] for caption in embedded.held_out.captions}
    assert not train & held_out
    moving = {row["base"] for row in stickers._embedded().rows if not row["static"]}
    assert len(held_out) == round(len(moving) / 10)
    assert (embedded.held_out.lengths == 8).all()


def test_the_split_is_a_function_of_the_section_alone(embedded):
    again, other = stickers.load(StickersData()), stickers.load(StickersData(split_seed=1))
    assert again.train.fingerprint == embedded.train.fingerprint
    assert again.held_out.captions == embedded.held_out.captions != other.held_out.captions
    without = stickers.load(StickersData(static=False))
    assert without.held_out.captions == embedded.held_out.captions
    assert (without.train.lengths == 8).all()
    assert without.train.captions == [
        caption for caption, length in zip(embedded.train.captions, embedded.train.lengths, strict=True) if length == 8
    ]


def test_fewer_frames_are_spread_evenly_and_smaller_ones_are_averaged(embedded):
    small = stickers.load(StickersData(frames=4), image_size=16).train
    assert small.tensor.shape[2:] == (4, 16, 16)
    whole = embedded.train.tensor[:5, :, ::2].float()
    expected = torch.nn.functional.avg_pool3d(whole, (1, 2, 2))
    assert (small.tensor[:5].float() - expected).abs().max() <= 1


def test_more_than_there_is_is_told(tmp_path):
    with pytest.raises(UserError, match=r"data.frames: 9, .*--size 32 --frames 9"):
        stickers.load(StickersData(frames=9))
    with pytest.raises(UserError, match=r"data.image_size: 64, .*--size 64 --frames 8"):
        stickers.load(StickersData(image_size=64))
    with pytest.raises(UserError, match="no group 'Animals & Natur'; did you mean 'Animals & Nature'"):
        stickers.load(StickersData(groups=("Animals & Natur",)))
    with pytest.raises(UserError, match="prepare_stickers.py"):
        stickers.load(StickersData(name=str(tmp_path)))


def test_a_prepared_folder(own):
    splits = stickers.load(StickersData(name=str(own), frames=4, held_out=0.2, split_seed=3))
    held_out = {caption.split()[-1] for caption in splits.held_out.captions}
    assert len(splits.held_out) == 2 and {int(number) // 2 for number in held_out} == {int(min(held_out)) // 2}
    assert splits.train.tensor.shape == (len(splits.train), 3, 4, 16, 16)
    assert len(splits.train) == 13 - ("bar number 0" in splits.held_out.captions)
    assert splits.train.captions[-1] == "still ring" and splits.train.tensor[-1].eq(255).all()
    chosen = stickers.load(StickersData(name=str(own), frames=4, groups=("Shapes*",), held_out=0))
    assert chosen.train.captions == [f"bar number {number}" for number in range(8)]
    few = stickers.load(StickersData(name=str(own), frames=4, max_images=5, held_out=0))
    assert len(few.train) == 5


def test_the_stills_of_a_held_out_drawing_are_on_neither_side(own):
    for seed in range(40):
        splits = stickers.load(StickersData(name=str(own), frames=4, held_out=0.2, split_seed=seed))
        if "bar number 0" in splits.held_out.captions:
            assert "still bar0" not in splits.train.captions + splits.held_out.captions
            return
    raise AssertionError("bar0 was never held out")


def test_a_folder_with_unreadable_stickers(own):
    table = datasets.load_from_disk(str(own)).cast_column("image", datasets.Image(decode=False))
    facts = json.loads((own / "prepared.json").read_text())
    rows = table.to_list()
    rows[3]["image"]["bytes"] = b"not an image"
    other = own.parent / "other"
    datasets.Dataset.from_list(rows, features=table.features).save_to_disk(str(other))
    (other / "prepared.json").write_text(json.dumps(facts))
    splits = stickers.load(StickersData(name=str(other), frames=4, held_out=0))
    assert len(splits.train) == 14 and splits.train.bad_images == ["bar3 (not an image)"]
    with pytest.raises(UserError, match="bar3"):
        stickers.load(StickersData(name=str(other), frames=4, max_bad_clips=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_stickers_on_disk_give_the_batches_of_those_in_memory(own, workers):
    kept, on_disk = (
        stickers.load(StickersData(name=str(own), frames=4, held_out=0.2, on_device=where))
        for where in ("always", "never")
    )
    assert on_disk.train.tensor is None and on_disk.held_out.captions == kept.held_out.captions
    assert on_disk.train.shape == kept.train.shape == (3, 4, 16, 16)
    found = [
        list(itertools.islice(batches(image_set.train, seed=1, batch_size=4, num_workers=workers), 9))
        for image_set in (kept, on_disk)
    ]
    for one, other in zip(*found, strict=True):
        for name in ("images", "lengths", "motion", "indices"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    again = stickers.load(StickersData(name=str(own), frames=4, held_out=0.2, on_device="never")).train
    assert again.fingerprint == on_disk.train.fingerprint
    assert torch.equal(on_disk.train.subset([5, 2]).in_memory().tensor, kept.train.tensor[[5, 2]])


def test_an_unreadable_sticker_met_while_training_is_replaced_with_all_that_is_known_of_it(own):
    table = datasets.load_from_disk(str(own)).cast_column("image", datasets.Image(decode=False))
    rows = table.to_list()
    rows[2]["image"]["bytes"] = b"not an image"
    rows[3]["static"] = True  # the next one, to be told apart by its length
    other = own.parent / "other"
    datasets.Dataset.from_list(rows, features=table.features).save_to_disk(str(other))
    (other / "prepared.json").write_text((own / "prepared.json").read_text())
    section = StickersData(name=str(other), frames=4, held_out=0, on_device="never")
    train = stickers.load(section).train
    found = next(batches(train, seed=0, batch_size=len(train)))
    met = found.indices == 2
    assert found.lengths[met].tolist() == [1] and torch.equal(found.images[met][0], train.image(3))
    assert train.bad_images == ["bar2 (not an image)"]
    strict = stickers.load(section.model_copy(update={"max_bad_clips": 0})).train
    with pytest.raises(UserError, match=r"data\.max_bad_clips"):
        next(batches(strict, seed=0, batch_size=len(strict)))


def test_captioned_clips(motions):
    section = CaptionedClipsData(name=str(motions), image_size=16, frames=4, held_out=0.3)
    splits = captioned_clips.load(section)
    train, held_out = set(splits.train.captions), set(splits.held_out.captions)
    assert not train & held_out
    assert train | held_out == {f"a video of a person doing a {motion}" for motion in ("walk", "dance a", "jump")}
    assert splits.train.tensor.shape[1:] == (3, 4, 16, 16)
    assert (splits.train.lengths == 4).all() and splits.train.motion.min() > 0
    with pytest.raises(UserError, match="data.videos"):
        captioned_clips.load(section.model_copy(update={"videos": ("wlak/*",)}))
