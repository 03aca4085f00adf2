"""Clips to look at, beside what they were asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from entrecipes.diffusion.space import film_strips


def strips(reference: Tensor, *rows: Tensor) -> Tensor:
    """Film strips of clips, one over the other: pose maps first, then clips, the reference left of the first of those.

    Args:
        reference: uint8 [n, 3, H, W].
        rows: uint8 [n, 3, F, H, W] each, two at least.

    Returns:
        Pictures uint8 [n, 3, rows * H, (F + 1) * W].
    """
    blank = torch.full_like(reference, 255)
    lefts = [reference if i == 1 else blank for i in range(len(rows))]
    rows = [torch.cat([left[:, :, None], row], dim=2) for left, row in zip(lefts, rows, strict=True)]
    return under(*rows)


def hide(clips: Tensor, given: Tensor) -> Tensor:
    """Clips uint8 [n, 3, F, H, W] with a grey picture in place of every frame that is not given (bool [n, F])."""
    return torch.where(given[:, None, :, None, None], clips, torch.full_like(clips, 224))


def under(*rows: Tensor) -> Tensor:
    """Film strips of clips uint8 [n, 3, F, H, W], one over the other: [n, 3, rows * H, F * W]."""
    return torch.cat([film_strips(row) for row in rows], dim=2)


def beside(*columns: Tensor) -> Tensor:
    """The same as one picture a frame, a clip a row: uint8 [F, 3, n * H, columns * W]."""
    return torch.cat(columns, dim=4).permute(2, 1, 0, 3, 4).flatten(2, 3)


def moving(reference: Tensor, *columns: Tensor) -> Tensor:
    """The same as one picture a frame, a clip a row: the reference, and beside it the frame of each column.

    Returns:
        Pictures uint8 [F, 3, n * H, (1 + columns) * W].
    """
    still = reference[:, :, None].expand_as(columns[0])
    return beside(still, *columns)
