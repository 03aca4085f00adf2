"""Samples of a data set to measure on: chosen by a seed, as they are, as x0, or as what a model is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from entrecipes.data.images import ImageSet
from entrecipes.data.opening import OpenedData
from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.family import Condition
from entrecipes.errors import UserError
from entrecipes.recipe.masks import Task, follows_text, given_at


def draw_x0(
    data: OpenedData, images: ImageSet, count: int, seed: int, device: torch.device, task: Task = "it2v"
) -> tuple[Tensor, Condition]:
    """x0 [n, ...] of up to `count` samples of a part of `data`, drawn by the seed, and what they are conditioned on.

    The condition is class labels int64 [n], condition maps [n, C, F, H, W], what is `Asked` of stickers in a task, or
    None. Both are on the device.
    """
    drawn, indices = draw(images, count, seed)
    drawn = drawn.to(device)
    x0, condition = data.space.encode(drawn), data.space.condition(drawn)
    if images.lengths is not None:
        condition = asked(x0, images, indices, task)
    elif condition is None and images.labels is not None:
        condition = images.labels[indices].to(device)
    return x0, condition


def draw(images: ImageSet, count: int, seed: int) -> tuple[Tensor, list[int]]:
    """Up to `count` images [n, ...], drawn by the seed, and their indices; unreadable ones are passed over.

    Of stickers, only those with all frames.

    Raises:
        UserError: When more are unreadable than the recipe tolerates.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    if images.lengths is not None:
        whole = images.lengths == images.lengths.max()
        order = [index for index in order if whole[index]]
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


def asked(x0: Tensor, images: ImageSet, indices: list[int], task: Task) -> Asked:
    """What whole stickers x0 [n, C, F, ...] of a set are asked for in a task."""
    given = torch.tensor(given_at(task, x0.shape[2]), device=x0.device).expand(len(x0), -1)
    text = None if images.text is None else images.text[indices].to(x0.device)
    told = torch.full((len(x0),), follows_text(task), device=x0.device)
    return Asked.of(x0, given, text, told)


def conditions(data: OpenedData, split: str, indices: list[int], task: Task) -> Tensor | Asked:
    """What clips of a split (`train`, `held_out`) give a model to be conditioned on.

    Maps float [n, C, F, H, W], or of stickers what is asked in the task.
    """
    images = getattr(data, split)
    samples = torch.stack([images.image(index) for index in indices])
    if images.lengths is not None:
        return asked(data.space.encode(samples), images, indices, task)
    return data.space.condition(samples)
