"""Samples of a data set to measure on: chosen by a seed, as they are, as x0, or as what a model is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.opening import OpenedData
from entrecipes.errors import UserError


def draw_x0(
    data: OpenedData, images: ImageSet, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """x0 [n, ...] of up to `count` samples of a part of `data`, drawn by the seed, and what they are conditioned on.

    The condition is class labels int64 [n], condition maps [n, C, F, H, W], or None. Both are on the device.
    """
    drawn, indices = draw(images, count, seed)
    drawn = drawn.to(device)
    labels = None if images.labels is None else images.labels[indices].to(device)
    maps = data.space.condition(drawn)
    return data.space.encode(drawn), labels if maps is None else maps


def draw(images: ImageSet, count: int, seed: int) -> tuple[Tensor, list[int]]:
    """Up to `count` images [n, ...], drawn by the seed, and their indices; unreadable ones are passed over.

    Raises:
        UserError: When more are unreadable than the recipe tolerates.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn, indices, bad = [], [], 0
    for index in order:
        if len(drawn) == count:
            break
        try:
            drawn.append(images.image(index))
            indices.append(index)
        except UserError:
            bad += 1
            if bad > images.max_bad_images:
                raise
    return torch.stack(drawn), indices


def conditions(data: OpenedData, split: str, indices: list[int]) -> Tensor:
    """The maps float [n, C, F, H, W] that clips of a split (`train`, `held_out`) give a model to be conditioned on."""
    return data.space.condition(getattr(data, split).tensor[indices])
