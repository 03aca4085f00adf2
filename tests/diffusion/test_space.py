"""Symbols become one-hot codes, and pictures that can be told apart; clips are parted from their condition."""

from __future__ import annotations

import torch

from entrecipes.diffusion.lettering import CELL, LINE, SYMBOLS_IN_LINE
from entrecipes.diffusion.space import ClipSpace, PixelSpace, SymbolSpace


def test_symbols_are_one_hot_in_their_channel():
    ids = torch.tensor([[0, 3, 1], [2, 2, 2]], dtype=torch.uint8)
    x0 = SymbolSpace("ACGT").encode(ids)
    assert x0.shape == (2, 4, 3) and x0.dtype == torch.float32
    assert torch.equal(x0.argmax(1), ids.long()) and x0.sum(1).eq(-2).all() and x0.square().eq(1).all()
    assert SymbolSpace("ACGT").texts(ids) == ["ATC", "GGG"]


def test_every_symbol_has_its_own_picture():
    for alphabet in ("ACGT", " abcdefghijklmnopqrstuvwxyz"):
        pictures = SymbolSpace(alphabet).pictures(torch.arange(len(alphabet), dtype=torch.uint8)[:, None])
        assert pictures.shape == (len(alphabet), 3, LINE, CELL) and pictures.dtype == torch.uint8
        assert len({picture.numpy().tobytes() for picture in pictures}) == len(alphabet)


def test_long_sequences_are_broken_into_lines():
    ids = torch.zeros(2, 70, dtype=torch.uint8)
    assert SymbolSpace("ACGT").pictures(ids).shape == (2, 3, 3 * LINE, SYMBOLS_IN_LINE * CELL)


def test_images_are_their_own_pictures():
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    assert PixelSpace().pictures(images) is images and PixelSpace().texts(images) is None


def test_a_clip_and_its_condition():
    batch = torch.randint(0, 256, (2, 3, 9, 4, 4), dtype=torch.uint8)
    space = ClipSpace()
    x0, condition = space.encode(batch), space.condition(batch)
    assert x0.shape == (2, 3, 4, 4, 4) and condition.shape == (2, 6, 4, 4, 4)
    signed = batch.float() / 127.5 - 1
    torch.testing.assert_close(x0, signed[:, :, :4])
    torch.testing.assert_close(condition[:, :3], signed[:, :, 4:8])
    for frame in range(4):
        torch.testing.assert_close(condition[:, 3:, frame], signed[:, :, 8])
    strips = space.pictures(batch[:, :, :4])
    assert strips.shape == (2, 3, 4, 16) and torch.equal(strips[:, :, :, 4:8], batch[:, :, 1])
    assert PixelSpace().condition(batch) is None
