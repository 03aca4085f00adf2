"""Clips to look at: what was asked for, what really happened and what was generated."""

from __future__ import annotations

import torch
from torch import Tensor


def strips(batch: Tensor, samples: Tensor) -> Tensor:
    """Film strips of clips: pose maps over real frames over generated frames, the reference image on the left.

    Args:
        batch: Clips as a data set holds them, uint8 [n, 3, 2F + 1, H, W].
        samples: What was generated from their poses and references, uint8 [n, 3, F, H, W].

    Returns:
        Pictures uint8 [n, 3, 3H, (F + 1) * W].
    """
    frames = samples.shape[2]
    real, poses, reference = batch.split((frames, frames, 1), dim=2)
    blank = torch.full_like(reference, 255)
    rows = [torch.cat([left, row], dim=2) for left, row in ((blank, poses), (reference, real), (blank, samples))]
    return torch.cat([row.permute(0, 1, 3, 2, 4).flatten(3) for row in rows], dim=2)


def moving(batch: Tensor, samples: Tensor) -> Tensor:
    """The same as one picture a frame, a clip a row: reference, pose map, real and generated frame.

    Returns:
        Pictures uint8 [F, 3, n * H, 4W].
    """
    frames = samples.shape[2]
    real, poses, reference = batch.split((frames, frames, 1), dim=2)
    row = torch.cat([reference.expand_as(real), poses, real, samples], dim=4)
    return row.permute(2, 1, 0, 3, 4).flatten(2, 3)
