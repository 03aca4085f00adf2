"""Recomputed activations give the same gradients in every family, whatever is frozen, and are fewer."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from tiny import DIT, SEQUENCE, UNET
from tiny_dfgn import clips, shake, tiny_dfgn
from tiny_video import wan

from entrecipes import SequenceTransformer1DModel
from entrecipes.blocks.schedule import guard_group_norms, train_only
from entrecipes.diffusion.families import FAMILIES
from entrecipes.patterns import matches
from entrecipes.recipe.adapters import I2VAdapterSection, LoraSection, NoAdapterSection, QLoraSection, SimDASection
from entrecipes.recipe.base import build

IMAGES, TIMES, LABELS = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([3, 4])
ATTENTION = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}


def unet():
    return UNet2DModel(**UNET["config"] | ATTENTION), lambda m: m(IMAGES, TIMES, class_labels=LABELS).sample


def dit():
    model = DiTTransformer2DModel(**DIT["config"] | {"num_layers": 3, "dropout": 0.1})
    return model, lambda m: FAMILIES["DiTTransformer2DModel"].predict(m, IMAGES, TIMES, LABELS)


def sequence():
    model = SequenceTransformer1DModel(**SEQUENCE["config"] | {"num_layers": 3})
    shake(model)  # its head begins at zero
    x0 = torch.randn(2, 27, 16)
    return model, lambda m: FAMILIES["SequenceTransformer1DModel"].predict(m, x0, TIMES, None)


def video():
    x0, condition = torch.randn(2, 3, 2, 8, 8), torch.randn(2, 6, 2, 8, 8)
    return wan(num_layers=3), lambda m: FAMILIES["WanTransformer3DModel"].predict(m, x0, TIMES, condition)


def stickers():
    return tiny_dfgn(), lambda m: m(**clips(1)).sample


LORA, HELD = LoraSection(rank=2, dropout=0.1), QLoraSection(rank=2, quantise="int8")
UPPER = {  # what is left open above a frozen part, whose activations need no gradient
    unet: "up_blocks.*",
    dit: "transformer_blocks.2.*",
    sequence: "transformer_blocks.2.*",
    video: "blocks.2.*",
    stickers: "up_blocks.*",
}
CASES = [(make, kind, "*") for make in UPPER for kind in (NoAdapterSection(), LORA) if (make, kind) != (unet, LORA)]
CASES += [(make, NoAdapterSection(), upper) for make, upper in UPPER.items()]
CASES += [(dit, HELD, "*"), (stickers, SimDASection(), "*"), (stickers, I2VAdapterSection(), "*")]


def passed(model, call):
    """Gradients by name, and how many bytes were kept for the backward pass."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    model.zero_grad()
    torch.manual_seed(7)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = call(model).square().mean()
    before_backward = kept
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, before_backward


@pytest.mark.parametrize(
    ("make", "section", "opened"), CASES, ids=[f"{make.__name__}, {kind.type}, {what}" for make, kind, what in CASES]
)
def test_gradients_are_the_same(make, section, opened):
    torch.manual_seed(0)
    model, call = make()
    adapter = build("adapter", section, model=model, seed=0)
    shake(model.side_adapter if hasattr(model, "side_adapter") else torch.nn.Module())
    train_only(model, lambda name: adapter.eligible(name) and matches(name, [opened]))
    guard_group_norms(model)
    model.train()
    expected, plainly = passed(model, call)
    model.enable_gradient_checkpointing()
    found, kept = passed(model, call)
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(gradient.any() for gradient in expected.values())
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert kept < 0.8 * plainly
