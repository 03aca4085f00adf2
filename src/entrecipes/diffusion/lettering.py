"""Sequences of symbols as pictures: a strip of letters, each on its own colour where the alphabet is small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT_SIZE, CELL, LINE = 16, 11, 24
"""Pixels: of the font, of a letter's cell, of a line."""
SYMBOLS_IN_LINE = 32
PAPER = "#eef1f4"
COLOURS = ("#bfe3c0", "#bcd4f0", "#f7dfa5", "#f3bdb8")
"""The ground of each symbol of an alphabet of up to four: green, blue, amber, red, as A, C, G, T are usually drawn."""


def letters(texts: Sequence[str], alphabet: str) -> Tensor:
    """Texts of one length as uint8 pictures [n, 3, H, W], broken into lines of 32 symbols."""
    font = ImageFont.load_default(FONT_SIZE)
    grounds = dict(zip(alphabet, COLOURS, strict=False)) if len(alphabet) <= len(COLOURS) else {}
    pictures = []
    for text in texts:
        lines = [text[i : i + SYMBOLS_IN_LINE] for i in range(0, len(text), SYMBOLS_IN_LINE)]
        picture = Image.new("RGB", (min(len(text), SYMBOLS_IN_LINE) * CELL, len(lines) * LINE), PAPER)
        draw = ImageDraw.Draw(picture)
        for row, line in enumerate(lines):
            for column, symbol in enumerate(line):
                left, top = column * CELL, row * LINE
                if symbol in grounds:
                    draw.rectangle((left, top, left + CELL - 1, top + LINE - 3), fill=grounds[symbol])
                draw.text((left + CELL / 2, top + LINE / 2), symbol, "black", font, anchor="mm")
        pictures.append(np.asarray(picture).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))
