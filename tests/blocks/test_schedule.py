"""The plain schedules on a model alone: what is eligible, what is held, what a checkpoint restores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from diffusers import DiTTransformer2DModel
from tiny import DIT

from entrecipes.blocks.schedule import AllBlocks, StagedBlocks
from entrecipes.errors import UserError
from entrecipes.recipe.blocks import AllBlocksSection, StagedBlocksSection


@pytest.fixture
def model() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**DIT["config"])


def subject(model, eligible=lambda name: True) -> SimpleNamespace:
    return SimpleNamespace(components=SimpleNamespace(model=model), eligible=eligible)


def trained(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_all_blocks_train_all_and_say_nothing(model):
    blocks = AllBlocks(AllBlocksSection(), subject(model))
    assert blocks.advance(0) == [] and len(trained(model)) == len(list(model.parameters()))


def test_all_blocks_train_what_is_eligible(model):
    blocks = AllBlocks(AllBlocksSection(), subject(model, lambda name: name.endswith("bias")))
    (row,) = blocks.advance(0)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    count = sum(model.get_parameter(name).numel() for name in biases)
    assert trained(model) == biases and row["trained_parameters"] == count and f"{count:,}" in row["what"]
    assert blocks.advance(16) == []


def test_stages_train_what_they_name_of_what_is_eligible(model):
    stages = [{"train": ["*"]}, {"from_images": 32, "train": ["transformer_blocks.1.*", "proj_out_2.*"]}]
    section = StagedBlocksSection.model_validate({"stages": stages})
    blocks = StagedBlocks(section, subject(model, lambda name: not name.startswith("proj_out_2")))
    assert blocks.advance(0)[0]["stage"] == 0 and "proj_out_2.weight" not in trained(model)
    model.pos_embed.proj.weight.grad = model.pos_embed.proj.weight.detach().clone()
    assert blocks.advance(16) == []
    (row,) = blocks.advance(48)
    assert row["train"] == ["transformer_blocks.1.*", "proj_out_2.*"] and row["what"].startswith("stage 2 of 2")
    late = trained(model)
    assert late and all(name.startswith("transformer_blocks.1.") for name in late)
    assert model.pos_embed.proj.weight.grad is None
    state = blocks.state_dict()
    model.requires_grad_(True)
    again = StagedBlocks(section, subject(model))
    again.load_state_dict(state)
    assert trained(model) == late | {"proj_out_2.weight", "proj_out_2.bias"} and again.advance(48) == []


def test_a_pattern_that_matches_nothing_is_named(model):
    section = StagedBlocksSection.model_validate({"stages": [{"train": ["up_blocks.*"]}]})
    with pytest.raises(UserError, match=r"stages\.0\.train: 'up_blocks\.\*' matches no parameter; the model has"):
        StagedBlocks(section, subject(model))
