"""Optimizers by name, the learning rate over images, and freezing."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from entrecipes.errors import UserError
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.training import OptimizerSection
from entrecipes.training.optimizer import build_optimizer, learning_rate

EXAMPLES = {name: {"type": name} for name in REGISTRY["optimizer"]} | {"torch": {"type": "torch", "name": "NAdam"}}


def section(**values):
    return TypeAdapter(OptimizerSection).validate_python(values)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_registered_optimizer_lowers_a_loss(name):
    model = nn.Linear(128, 64)  # 8,192 weights: large enough for 8-bit state
    optimizer = build_optimizer(section(**EXAMPLES[name], learning_rate=1e-2), model)
    x, y = torch.randn(32, 128), torch.randn(32, 64)
    losses = []
    for _ in range(15):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if "8bit" in name:
        assert any(
            value.dtype == torch.uint8
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        )


def test_an_unknown_torch_optimizer_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'NAdam'"):
        build_optimizer(section(type="torch", name="NAdma"), nn.Linear(2, 2))
    with pytest.raises(UserError, match="optimizer.options"):
        build_optimizer(section(type="torch", name="SGD", options={"momentun": 0.9}), nn.Linear(2, 2))


def test_the_state_of_frozen_weights_is_dropped_and_the_rest_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = build_optimizer(section(type="adamw"), model)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    model[0].requires_grad_(False)
    changed = build_optimizer(section(type="adamw"), model, previous=optimizer)
    assert set(changed.state) == set(model[1].parameters())
    assert changed.state[model[1].weight] is optimizer.state[model[1].weight]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="blocks"):
        build_optimizer(section(type="adamw"), model, previous=changed)


@pytest.mark.parametrize(
    ("schedule", "images", "share"),
    [
        ({}, 500, 1.0),
        ({"warmup": 100}, 49, 0.5),
        ({"warmup": 100}, 100, 1.0),
        ({"decay": "cosine"}, 500, 0.5),
        ({"decay": "cosine", "final": 0.2}, 1000, 0.2),
        ({"decay": "linear", "decay_start": 500}, 750, 0.5),
        ({"decay": "linear", "span": [0, 0.5]}, 1000, 0.5),
        ({"decay": "linear", "span": [0.5, 1], "warmup": 200}, 600, 0.25),
        ({"decay": "inverse_sqrt", "decay_start": 100}, 400, 0.5),
        ({"decay": "inverse_sqrt", "decay_start": 100}, 50, 1.0),
    ],
)
def test_learning_rate_is_a_function_of_images(schedule, images, share):
    assert learning_rate(section(type="adamw", learning_rate=2.0, schedule=schedule), images, 1000) == pytest.approx(
        2 * share
    )
