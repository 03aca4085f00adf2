"""Optimizers with 8-bit state: a run that was stopped goes on bit for bit, while blocks open and close."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import DIT, FLOW, tiny_recipe
from torch.utils._pytree import tree_flatten_with_path

from entrecipes.training.loop import train
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.weights import weights

WIDE = {**DIT, "config": {**DIT["config"], "attention_head_dim": 16, "num_attention_heads": 4}}
LAST, FIRST = ("transformer_blocks.1.*", "proj_out_*"), ("transformer_blocks.0.*", "proj_out_*")
STAGES = [{"from_images": 0, "train": LAST}, {"from_images": 32, "train": ["*"]}, {"from_images": 80, "train": FIRST}]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def everything(run):
    """Weights, averages and moments, as a checkpoint holds them."""
    return {str(path): value for path, value in tree_flatten_with_path(weights(run))[0] if torch.is_tensor(value)}


@pytest.mark.parametrize("name", ["adamw8bit", pytest.param("paged_adamw8bit", marks=pytest.mark.slow), "lion8bit"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, name):
    recipe = tiny_recipe(
        WIDE,
        FLOW,
        optimizer={"type": name, "learning_rate": 1e-3},
        blocks={"type": "staged", "stages": STAGES},
        training={"images": 112},
        evaluation={"every": 1000, "held_out": {"images": 2, "noise_levels": 4}},
    )
    whole = Run(recipe, None)
    train(whole)
    part = Run(recipe, tmp_path)
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 48)
    train(part)
    assert part.images == 48
    sizes = {}
    for weight, state in part.optimizer.optimizer.state.items():
        eight_bits = state["state1"].dtype == torch.uint8
        sizes.setdefault(eight_bits, []).append(weight.numel())
    assert min(sizes[True]) >= 4096 > max(sizes[False])
    rest = Run(recipe, tmp_path)
    assert resume(rest)
    train(rest)
    expected, found = everything(whole), everything(rest)
    assert found.keys() == expected.keys() and any(value.dtype == torch.uint8 for value in found.values())
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    open_now = {weight for weight in rest.model.parameters() if weight.requires_grad}
    assert set(rest.optimizer.optimizer.state) == open_now < set(rest.model.parameters())
