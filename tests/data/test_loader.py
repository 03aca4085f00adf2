"""The loader's promise: the same positions give the same images, whoever asks and wherever the run started."""

from __future__ import annotations

import itertools
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from entrecipes.data.folder import load as load_folder
from entrecipes.data.images import ImageSet
from entrecipes.data.loader import Batch, batches
from entrecipes.errors import UserError
from entrecipes.recipe.data import FolderData

COUNT = 23


@pytest.fixture
def numbered() -> ImageSet:
    """23 random images with labels."""
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        name="numbered",
        source="random numbers",
        license="none",
        fingerprint="numbered",
        label_names=("even", "odd"),
        labels=torch.arange(COUNT) % 2,
        tensor=torch.randint(0, 256, (COUNT, 3, 4, 4), generator=generator, dtype=torch.uint8),
    )


def joined(parts: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and indices of batches, one after the other."""
    return tuple(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "indices"))


def drawn(image_set: ImageSet, number: int, **options: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `number` batches, joined."""
    return joined(list(itertools.islice(batches(image_set, **{"seed": 7, "flip": True} | options), number)))


def assert_equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """Bit-equal, tensor by tensor."""
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


def test_an_epoch_shows_every_image_once_and_epochs_differ(numbered: ImageSet) -> None:
    indices = drawn(numbered, 3, batch_size=COUNT)[2].reshape(3, COUNT)
    assert torch.equal(indices.sort(dim=1).values, torch.arange(COUNT).expand(3, COUNT))
    assert not torch.equal(indices[0], indices[1]) and not torch.equal(indices[1], indices[2])


def test_batches_carry_what_their_indices_say(numbered: ImageSet) -> None:
    images, labels, indices = drawn(numbered, 5, batch_size=6, flip=False)
    assert torch.equal(images, numbered.tensor[indices]) and torch.equal(labels, numbered.labels[indices])


@pytest.mark.parametrize("start", [1, 6, 22, 23, 50, 115])
def test_starting_anywhere_gives_the_tail(numbered: ImageSet, start: int) -> None:
    whole = drawn(numbered, 30, batch_size=6)
    tail = drawn(numbered, 8, batch_size=6, start_images=start)
    assert_equal(tail, tuple(part[start : start + 48] for part in whole))


def test_the_batch_size_does_not_change_the_order(numbered: ImageSet) -> None:
    assert_equal(drawn(numbered, 35, batch_size=2), drawn(numbered, 1, batch_size=70))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_all_processes_make_the_batch(numbered: ImageSet, world_size: int) -> None:
    alone = list(itertools.islice(batches(numbered, seed=7, batch_size=6, start_images=5, flip=True), 9))
    shares = [
        itertools.islice(
            batches(numbered, seed=7, batch_size=6, start_images=5, flip=True, rank=rank, world_size=world_size), 9
        )
        for rank in range(world_size)
    ]
    for one, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert_equal((one.images, one.labels, one.indices), joined(list(parts)))


def test_a_batch_that_can_not_be_shared_is_refused(numbered: ImageSet) -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        batches(numbered, seed=0, batch_size=6, world_size=4)


def test_flips_turn_about_half_the_images_and_depend_on_the_seed(numbered: ImageSet) -> None:
    images, _, indices = drawn(numbered, 40, batch_size=COUNT)
    plain = numbered.tensor[indices]
    turned = (images != plain).flatten(1).any(1)
    assert torch.equal(images[turned], plain[turned].flip(-1))
    assert 0.42 < turned.float().mean() < 0.58
    assert not torch.equal(images, drawn(numbered, 40, batch_size=COUNT, seed=8)[0])


def test_latents_take_their_own_mirror_images(numbered: ImageSet) -> None:
    numbered.tensor, numbered.mirrored = torch.zeros(COUNT, 2, 1, 1), torch.ones(COUNT, 2, 1, 1)
    images = drawn(numbered, 4, batch_size=COUNT)[0]
    assert images.dtype == torch.float32 and 0.2 < images.mean() < 0.8
    numbered.mirrored = None
    with pytest.raises(ValueError, match="flip=True"):
        drawn(numbered, 1, batch_size=4)


def test_the_global_random_state_is_left_alone(numbered: ImageSet, pictures: Path) -> None:
    lazy = load_folder(FolderData(path=str(pictures), on_device="never"), image_size=8, channels=3).train
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn(numbered, 3, batch_size=8)
    drawn(lazy, 3, batch_size=4)
    assert torch.equal(torch_before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_files_decoded_by_workers_equal_the_set_in_memory(pictures: Path, workers: int) -> None:
    kept, lazy = (
        load_folder(FolderData(path=str(pictures), on_device=where), image_size=8, channels=3).train
        for where in ("always", "never")
    )
    assert kept.tensor is not None and lazy.tensor is None
    options = {"batch_size": 4, "start_images": 3}
    assert_equal(drawn(lazy, 7, num_workers=workers, **options), drawn(kept, 7, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_met_while_training_are_replaced_and_counted(pictures: Path, workers: int) -> None:
    (pictures / "cat" / "2.png").write_bytes(b"")
    (pictures / "dog" / "3.png").write_bytes((pictures / "dog" / "3.png").read_bytes()[:150])
    section = FolderData(path=str(pictures), on_device="never", held_out=0, max_bad_images=2)
    lazy = load_folder(section, image_size=8, channels=3).train
    images, labels, indices = drawn(lazy, 12, batch_size=6, flip=False, num_workers=workers)
    assert sorted(Path(name.split(" (")[0]).name for name in lazy.bad_images) == ["2.png", "3.png"]
    assert torch.equal(images[indices == 2][0], lazy.image(3))  # the next readable one
    assert (labels[indices == 2] == 0).all()
    strict = load_folder(section.model_copy(update={"max_bad_images": 1}), image_size=8, channels=3).train
    with pytest.raises(UserError, match="max_bad_images") as caught:
        drawn(strict, 12, batch_size=6, num_workers=workers)
    assert "2.png" in str(caught.value) and "Traceback" not in str(caught.value)


def test_one_unreadable_file_asked_for_by_name(pictures: Path) -> None:
    (pictures / "cat" / "0.png").write_bytes(b"not an image")
    lazy = load_folder(FolderData(path=str(pictures), on_device="never", held_out=0), image_size=8, channels=3).train
    with pytest.raises(UserError, match="0.png"):
        lazy.image(0)


def test_the_set_is_a_plain_table_for_workers(pictures: Path) -> None:
    lazy = load_folder(FolderData(path=str(pictures), on_device="never"), image_size=8, channels=1).train
    assert isinstance(lazy.rows.dataset, datasets.Dataset) and lazy.image(0).shape == (1, 8, 8)
