"""The averaged model: its closed form, frozen weights, buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrecipes.recipe.training import Ema
from entrecipes.training.ema import EmaModel


def test_constant_weights_are_approached_by_the_half_life():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EmaModel(Ema(half_life=1000, warmup_ratio=1e9), model)
    nn.init.ones_(model.weight)
    for images in range(100, 1001, 100):
        ema.update(images, 100)
    assert ema.model.weight.item() == pytest.approx(0.5, abs=1e-6)


def test_the_half_life_is_short_at_first():
    ema = EmaModel(Ema(half_life=1000, warmup_ratio=0.05), nn.Linear(1, 1))
    assert ema.decay(100, 100) == pytest.approx(0.5 ** (100 / 5))
    assert ema.decay(10**6, 100) == pytest.approx(0.5 ** (100 / 1000))


def test_freezing_keeps_the_average_going():
    model = nn.Linear(4, 4)
    ema = EmaModel(Ema(half_life=1000, warmup_ratio=1e9), model)
    start = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    model.requires_grad_(False)
    ema.update(100, 100)
    moved = (ema.model.weight - start).mean().item()
    assert moved == pytest.approx(1 - 0.5**0.1, abs=1e-6), "the average must neither jump to the weight nor stand still"


def test_buffers_are_copied_and_the_trained_model_is_left_alone():
    model = nn.BatchNorm1d(3)
    ema = EmaModel(Ema(), model)
    model(torch.randn(8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema.update(100, 10)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
