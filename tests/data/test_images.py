"""The image set, what happens to a picture on its way into it, and the split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from entrecipes.data.digits import load
from entrecipes.data.images import fit_image, split_indices
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import DigitsData


def test_digits_at_their_own_size_keep_their_pixels() -> None:
    splits = load(DigitsData(held_out=0), image_size=8, channels=1)
    assert splits.held_out is None
    assert splits.train.tensor.shape == (1797, 1, 8, 8) and splits.train.tensor.dtype == torch.uint8
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert np.array_equal(splits.train.tensor[:, 0].numpy(), expected)
    assert splits.train.label_counts() == {
        str(digit): int(count) for digit, count in enumerate(np.bincount(load_digits().target))
    }


def test_digits_split_by_seed_and_resize() -> None:
    splits = load(DigitsData(held_out=0.2, max_images=500), image_size=16, channels=3)
    assert splits.train.tensor.shape == (400, 3, 16, 16) and len(splits.held_out) == 100
    again = load(DigitsData(held_out=0.2, max_images=500), image_size=16, channels=3)
    other = load(DigitsData(held_out=0.2, max_images=500, split_seed=1), image_size=16, channels=3)
    assert splits.train.fingerprint == again.train.fingerprint
    assert len({splits.train.fingerprint, splits.held_out.fingerprint, other.train.fingerprint}) == 3


def test_a_picture_is_resized_by_its_short_side_and_cropped_at_the_centre() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    cropped = fit_image(Image.fromarray(wide), 8, 3)
    assert cropped.shape == (3, 8, 8)
    assert (cropped == np.array([200, 100, 50])[:, None, None]).all()


def test_transparency_is_laid_over_white() -> None:
    clear = Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA")
    assert (fit_image(clear, 4, 3) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert (fit_image(palette, 4, 1) == 255).all()


def test_exif_orientation_is_honoured(tmp_path) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(fit_image(image, 4, 1)[0], pixels[::-1])


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 256 * 10], [256 * 100, 65535]], np.uint16))
    assert fit_image(deep, 2, 1)[0].tolist() == [[0, 10], [100, 255]]


def test_split_is_a_partition_with_the_asked_share() -> None:
    train, held_out = split_indices(103, 0.1, seed=3)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(103))
    assert split_indices(103, 0.1, seed=3) == (train, held_out)
    assert split_indices(103, 0.1, seed=4) != (train, held_out)


def test_split_never_parts_a_group() -> None:
    groups = [f"g{index % 37}" for index in range(200)]
    train, held_out = split_indices(200, 0.25, seed=0, groups=groups)
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert sorted(train + held_out) == list(range(200))
    assert 50 <= len(held_out) < 56  # its share, plus at most part of one group


def test_split_draws_max_images_first() -> None:
    train, held_out = split_indices(1000, 0.5, seed=0, max_images=100)
    assert len(train) == len(held_out) == 50
    assert max(train + held_out) > 900  # from everywhere


def test_a_single_image_can_not_be_split() -> None:
    with pytest.raises(UserError, match="held_out"):
        split_indices(1, 0.1, seed=0)


def test_subset_keeps_everything_in_step() -> None:
    whole = load(DigitsData(held_out=0), image_size=8, channels=1).train
    part = whole.subset([5, 3])
    assert len(part) == 2 and part.fingerprint != whole.fingerprint
    assert torch.equal(part.image(1), whole.image(3)) and part.labels.tolist() == whole.labels[[5, 3]].tolist()


def test_fingerprints_see_values_shapes_and_types() -> None:
    zeros = torch.zeros(4)
    different = [zeros, zeros.reshape(2, 2), zeros.int(), torch.ones(4), zeros.bfloat16(), None, "x"]
    assert len({fingerprint(part) for part in different}) == len(different)
    assert fingerprint(zeros, "a") == fingerprint(torch.zeros(4), "a")
