"""Removing blocks is whole, or refused and nothing changed."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tiny_models import build, output, unet
from torch import nn

from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError


def state(model: nn.Module) -> dict[str, Any]:
    return {"config": dict(model.config)} | {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def test_what_does_not_exist_is_named() -> None:
    stack = BlockStack(build("dit")[0])
    for index in (-1, 4):
        with pytest.raises(UserError, match=f"no block {index}: the model has blocks 0 to 3"), stack.skipped(index):
            pass
        with pytest.raises(UserError, match=f"no block {index}"):
            stack.check_removable([1, index])


@pytest.mark.parametrize(
    ("family", "gone", "reason"),
    [
        ("dit", [2, 0], "block 0 can't be removed: the head reads its embedder"),
        ("sd3", [1, 3], "block 3 can't be removed: the class builds its last block"),
        ("mochi", [2], "block 2 can't be removed: the class builds its last block"),
        ("latte", [0], "positions of frames"),
        ("unet_attention_last", [0, 8], "one depth for down_blocks.2.attentions.0 and the middle block"),
        ("pixart", [0, 1, 2], "all 3 blocks can't be removed"),
    ],
)
def test_a_refused_removal_changes_nothing(family: str, gone: list[int], reason: str) -> None:
    model, _ = build(family)
    before = state(model)
    with pytest.raises(UserError, match=reason):
        BlockStack(model).remove(iter(gone))
    assert same(state(model), before)


def test_a_removal_that_could_not_be_loaded_is_refused() -> None:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, mmdit_layers=1,
        patch_size=2, time_embed_dim=16, text_embed_dim=16, text_embed_dim_t5=None, sample_width=4, sample_height=4,
    )  # fmt: skip
    before = state(model)
    with pytest.raises(UserError, match="could not be loaded again"):
        BlockStack(model).remove([0])
    assert same(state(model), before)
    BlockStack(model).remove([1])
    assert model.config.num_layers == len(model.transformer_blocks) == 2


def test_the_first_block_of_a_dit_may_go_when_all_embedders_are_the_same() -> None:
    model, inputs = build("dit")
    embedder = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    stack = BlockStack(model)
    with stack.skipped(0, 1):
        skipped = output(model, inputs)
    assert not any(block.pinned for block in stack.blocks)
    stack.remove([0, 1])
    assert torch.equal(output(model, inputs), skipped)
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[3, 3] += 1e-6
    assert "embedder" in BlockStack(model).blocks[0].pinned


def test_numbers_in_the_config_follow_the_blocks() -> None:
    model, _ = build("sd35")
    stack = BlockStack(model)
    weights = [stack.modules(index)[0].attn.to_q.weight for index in (1, 2, 3)]
    stack.remove({0})
    assert (model.config.num_layers, model.config.dual_attention_layers) == (3, [1])
    assert all(stack.modules(i)[0].attn.to_q.weight is weight for i, weight in enumerate(weights))
    assert [block.paths for block in stack.blocks] == [(f"transformer_blocks.{i}",) for i in range(3)]
    stack.remove([1])
    assert model.config.dual_attention_layers == []


@pytest.mark.parametrize(("family", "lists"), [("flux", (2, 3)), ("flux2", (2, 3)), ("hunyuan_video", (2, 3))])
def test_a_list_may_lose_all_its_blocks_while_the_other_has_some(family: str, lists: tuple[int, int]) -> None:
    for gone in (range(lists[0]), range(lists[0], sum(lists))):
        model, inputs = build(family)
        stack = BlockStack(model)
        with stack.skipped(*gone):
            skipped = output(model, inputs)
        stack.remove(gone)
        assert len(stack) == sum(lists) - len(gone)
        assert torch.equal(output(model, inputs), skipped)


def test_a_unet_states_the_depth_of_each_attention() -> None:
    model, inputs = unet(transformer_layers_per_block=2)
    stack = BlockStack(model.eval())
    assert [path.split(".")[0] for block in stack.blocks for path in block.paths] == (
        ["down_blocks"] * 8 + ["mid_block"] * 2 + ["up_blocks"] * 12
    )
    gone = [1, 4, 5, 8, 10, 11, 21]
    with stack.skipped(*gone):
        skipped = output(model, inputs)
    stack.remove(gone)
    assert model.config.transformer_layers_per_block == [[1, 2], [0, 2], [1]]
    assert model.config.reverse_transformer_layers_per_block == [1, [0, 2, 2], [2, 2, 1]]
    assert torch.equal(output(model, inputs), skipped)
    twin = type(model).from_config(model.config)  # as diffusers' EMAModel builds its copy
    twin.load_state_dict(model.state_dict())
    assert torch.equal(output(twin.eval(), inputs), skipped)


def test_removal_draws_no_random_numbers_of_the_run() -> None:
    model, _ = build("pixart")
    before = torch.random.get_rng_state()
    BlockStack(model).remove([0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_removal_keeps_dtype_flags_and_places() -> None:
    model, inputs = build("flux")
    model.to(torch.bfloat16).enable_gradient_checkpointing()
    model.transformer_blocks[0].requires_grad_(False)
    model.hf_device_map = {"x_embedder": 0} | {f"transformer_blocks.{i}": f"d{i}" for i in range(2)}
    BlockStack(model).remove([0, 3])
    assert model.hf_device_map == {"x_embedder": 0, "transformer_blocks.0": "d1"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing and not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    inputs = {k: v.bfloat16() if v.is_floating_point() and "ids" not in k else v for k, v in inputs.items()}
    assert output(model, inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: diffusers.HunyuanDiT2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2,
            activation_fn="gelu-approximate", sample_size=4, hidden_size=16, num_layers=4, cross_attention_dim=8,
            cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=4, text_len_t5=4), "second half reads"),
        (lambda: diffusers.WanVACETransformer3DModel(num_attention_heads=2, attention_head_dim=12, text_dim=16,
            freq_dim=16, ffn_dim=16, num_layers=2, vace_layers=[0], vace_in_channels=16), "control blocks"),
        (lambda: diffusers.ChromaTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, axes_dims_rope=(2, 2, 4), joint_attention_dim=16, approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1), "modulation of all its blocks"),
        (lambda: diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2), "no transformer blocks"),
        (lambda: unet(down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
            mid_block_type="UNetMidBlock2D")[0], "this one has no transformer blocks"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "no config as diffusers models have"),
    ],
)  # fmt: skip
def test_what_can_not_be_pruned_says_so_at_once(model, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        BlockStack(model())
