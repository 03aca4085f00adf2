"""Clips to look at, beside what they were asked for."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return torch.cat([row.permute(0, 1, 3, 2, 4).flatten(3) for row in rows], dim=2)


def moving(reference: Tensor, *columns: Tensor) -> Tensor:
    """The same as one picture a frame, a clip a row: the reference, and beside it the frame of each column.

    Returns:
        Pictures uint8 [F, 3, n * H, (1 + columns) * W].
    """
    still = reference[:, :, None].expand_as(columns[0])
    return torch.cat([still, *columns], dim=4).permute(2, 1, 0, 3, 4).flatten(2, 3)
