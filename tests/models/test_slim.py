"""Slim models: any widths, saved and loaded bit for bit, and the same outputs from stock models with zeros."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file
from tiny_slim import ALL, DITS, PLAIN, UNETS, network, predict

import entrecipes
from entrecipes import SlimDiTTransformer2DModel, SlimUNet2DModel
from entrecipes.models.slim import slim, to_stock, width_of

RESNET, ATTENTION = "down_blocks.1.resnets.0", "mid_block.attentions.0"
BLOCK = "transformer_blocks.1"
WIDTHS = {
    "plain": {RESNET: 8, "up_blocks.1.resnets.0": 2, ATTENTION: 1, "up_blocks.0.attentions.0": 3},
    "scale_shift": {RESNET: 4, "down_blocks.0.downsamplers.0": 6, "up_blocks.0.upsamplers.0": 4, ATTENTION: 3},
    "skip": {RESNET: 8, "down_blocks.0.resnet_down": 12, "up_blocks.0.resnet_up": 4, ATTENTION: 2},
    "gelu-approximate": {f"{BLOCK}.attn1": 3, f"{BLOCK}.ff": 20, "transformer_blocks.0.ff": 1},
    "geglu": {f"{BLOCK}.attn1": 1, f"{BLOCK}.ff": 20},
}
DROPPED = {
    "plain": {RESNET: 0, "up_blocks.0.resnets.1": 0, ATTENTION: 0, "up_blocks.1.resnets.0": 2},
    "scale_shift": {"down_blocks.0.downsamplers.0": 0, "up_blocks.0.upsamplers.0": 0, "mid_block.resnets.0": 0},
    "skip": {RESNET: 0, "down_blocks.0.resnet_down": 0, "up_blocks.0.resnet_up": 0, ATTENTION: 0},
    "gelu-approximate": {f"{BLOCK}.attn1": 0, f"{BLOCK}.ff": 0},
    "geglu": {f"{BLOCK}.ff": 0, "transformer_blocks.0.attn1": 0},
}
PLANS = [(name, plan) for name in ALL for plan in (WIDTHS[name], DROPPED[name])]
FEW = [("scale_shift", WIDTHS["scale_shift"] | DROPPED["scale_shift"]), ("geglu", DROPPED["geglu"])]


def slimmed(name: str, widths: dict[str, int]) -> SlimUNet2DModel | SlimDiTTransformer2DModel:
    model = network(name)
    slim(model, widths)
    return model


@pytest.mark.parametrize(("name", "widths"), PLANS)
def test_saved_and_loaded_it_predicts_the_same_bit_for_bit(name, widths, tmp_path, caplog):
    model = slimmed(name, widths)
    model.save_pretrained(tmp_path)
    diffusers = logging.getLogger("diffusers")
    diffusers.addHandler(caplog.handler)
    try:
        loaded = type(model).from_pretrained(tmp_path)
    finally:
        diffusers.removeHandler(caplog.handler)
    assert not caplog.messages
    assert loaded.config.widths == widths and loaded.config["_class_name"] == type(model).__name__
    assert type(model).__name__.startswith("Slim") and not loaded.training
    with torch.no_grad():
        assert torch.equal(predict(loaded), predict(model))
    assert not torch.equal(predict(model), predict(network(name)))
    kept = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert sum(weight.numel() for weight in kept.values()) < sum(p.numel() for p in network(name).parameters())


@pytest.mark.parametrize(("name", "widths"), PLANS)
def test_a_stock_model_of_full_size_predicts_the_same(name, widths):
    model = slimmed(name, widths)
    state, stock = torch.get_rng_state(), to_stock(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(stock) in (UNet2DModel, DiTTransformer2DModel) and "widths" not in stock.config
    shapes = {key: value.shape for key, value in network(name).state_dict().items()}
    assert {key: value.shape for key, value in stock.state_dict().items()} == shapes
    with torch.no_grad():
        torch.testing.assert_close(predict(stock), predict(model), rtol=0, atol=1e-5)


def test_the_stock_model_loads_without_this_package_and_keeps_the_dtype(tmp_path):
    stock = to_stock(slimmed("plain", WIDTHS["plain"]).to(torch.float16))
    assert stock.dtype == torch.float16
    stock.float().save_pretrained(tmp_path)
    assert torch.equal(predict(UNet2DModel.from_pretrained(tmp_path)), predict(stock))


def test_the_stock_model_of_a_stock_model_is_a_copy():
    model = network("plain")
    stock = to_stock(model)
    assert torch.equal(predict(stock), predict(model))
    assert not {p.data_ptr() for p in stock.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("stock", [UNet2DModel, DiTTransformer2DModel])
def test_without_widths_it_is_the_stock_model(stock):
    config = UNETS["scale_shift"] if stock is UNet2DModel else DITS["geglu"]
    models = []
    for made in (stock, getattr(entrecipes, f"Slim{stock.__name__}")):
        torch.manual_seed(0)
        models.append(made(**config).eval())
    assert torch.equal(predict(models[0]), predict(models[1]))
    plain, slender = (dict(model.config) for model in models)
    differs = {key for key in plain | slender if plain.get(key) != slender.get(key)}
    assert differs <= {"widths", "_use_default_values"} and slender["widths"] is None


@pytest.mark.parametrize(("name", "widths"), FEW)
def test_it_trains_with_checkpointing_to_the_same_gradients(name, widths):
    model = slimmed(name, widths)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        predict(model).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(("name", "widths"), FEW)
def test_it_can_be_copied_and_built_from_its_config(name, widths):
    model = slimmed(name, widths)
    assert torch.equal(predict(copy.deepcopy(model)), predict(model))
    again = type(model).from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(predict(again), predict(model))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"down_blocks.7.resnets.0": 4}, r"'down_blocks.7.resnets.0' of SlimUNet2DModel does not exist"),
        ({"conv_in": 4}, r"'conv_in' of SlimUNet2DModel is no resnet block, attention or feed-forward layer"),
        ({RESNET: 20}, rf"'{RESNET}' can't be 20 wide; give a multiple of 4, 16 at most"),
        ({RESNET: 6}, rf"'{RESNET}' can't be 6 wide; give a multiple of 4"),
        ({ATTENTION: 5}, rf"'{ATTENTION}' can't be 5 wide; give 4 at most"),
        ({ATTENTION: -1}, rf"'{ATTENTION}' can't be -1 wide"),
        ({ATTENTION: 1.5}, rf"'{ATTENTION}' can't be 1.5 wide"),
    ],
)
def test_widths_that_do_not_fit_are_named(widths, message):
    with pytest.raises(ValueError, match=message):
        SlimUNet2DModel(**PLAIN, widths=widths)


def test_what_stays_is_chosen_by_place():
    whole, model = network("scale_shift"), network("scale_shift")
    keep = {RESNET: torch.tensor([4, 5, 6, 7]), ATTENTION: torch.tensor([1, 3])}
    slim(model, {path: len(places) for path, places in keep.items()}, keep)
    resnet, full = model.get_submodule(RESNET), whole.get_submodule(RESNET)
    assert width_of(resnet) == 4 and resnet.norm2.num_groups == 1
    assert torch.equal(resnet.conv1.weight, full.conv1.weight[4:8])
    assert torch.equal(resnet.conv2.weight, full.conv2.weight[:, 4:8]) and torch.equal(
        resnet.conv2.bias, full.conv2.bias
    )
    assert torch.equal(resnet.norm2.bias, full.norm2.bias[4:8])
    scale, shift = full.time_emb_proj.weight.chunk(2)
    assert torch.equal(resnet.time_emb_proj.weight, torch.cat([scale[4:8], shift[4:8]]))
    attention, full = model.get_submodule(ATTENTION), whole.get_submodule(ATTENTION)
    assert attention.heads == 2 and attention.inner_dim == 8
    rows = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(attention.to_k.weight, full.to_k.weight[rows])
    assert torch.equal(attention.to_out[0].weight, full.to_out[0].weight[:, rows])
