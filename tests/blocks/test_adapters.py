"""Adapters change nothing at first, only what they name later, and leave by merging or by their own file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from tiny_models import build as tiny
from tiny_models import output

from entrecipes.diffusion import lora
from entrecipes.diffusion.adapter_folder import BASE_FILE, adapter_folder, read_base
from entrecipes.diffusion.quantised import expanded, full_precision, quantise, quantised, size
from entrecipes.errors import UserError
from entrecipes.recipe.adapters import (
    BitFitSection,
    DiffFitSection,
    LoraSection,
    NoAdapterSection,
    QLoraSection,
    SimDASection,
)
from entrecipes.recipe.base import build
from entrecipes.recipe.training import Ema
from entrecipes.training.ema import EmaModel

SECTIONS = {
    "lora": LoraSection(rank=2, alpha=3, dropout=0.1),
    "qlora": QLoraSection(rank=2),
    "qlora, int8": QLoraSection(rank=2, quantise="int8"),
    "bitfit": BitFitSection(),
    "difffit": DiffFitSection(),
}
FAMILIES = ("dit", "wan")
WEIGHTS = "pytorch_lora_weights.safetensors"


def adapted(family, section):
    model, inputs = tiny(family)
    return build("adapter", section, model=model, seed=0), model, inputs


def train(model, inputs, steps=3):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(**inputs, return_dict=False)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


QUANTISED = ["qlora", "qlora, int8"]


def quantised_base(family, adapter, count=None):
    model, _ = tiny(family)
    quantise(model, adapter.quantised[:count], adapter.how)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SECTIONS)
def test_it_equals_its_base_at_first_and_then_moves_only_what_it_names(family, name):
    adapter, model, inputs = adapted(family, SECTIONS[name])
    base = quantised_base(family, adapter) if name in QUANTISED else tiny(family)[0]
    first = output(model, inputs)
    assert torch.equal(first, output(base, inputs))

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(filter(adapter.eligible, before))
    model.enable_gradient_checkpointing()
    train(model, inputs)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved and all(map(adapter.eligible, moved))
    assert not torch.equal(first, output(model, inputs))


def test_what_each_of_them_trains():
    trained = {
        (family, name): {n for n, p in adapted(family, section)[1].named_parameters() if p.requires_grad}
        for family in FAMILIES
        for name, section in SECTIONS.items()
    }
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert trained["dit", "lora"] == {
        f"transformer_blocks.{i}.{layer}.lora_{part}.default.weight"
        for i in range(4)
        for layer in layers
        for part in "AB"
    }
    assert trained["dit", "qlora"] == trained["dit", "qlora, int8"] == trained["dit", "lora"]
    assert {name.split(".")[2] for name in trained["wan", "lora"]} == {"attn1", "attn2", "ffn"}
    assert (
        all(name.endswith(".bias") for name in trained["wan", "bitfit"]) and "proj_out.bias" in trained["wan", "bitfit"]
    )
    more = trained["dit", "difffit"]
    assert len({name for name in more if "bias" in name}) == len(trained["dit", "bitfit"])
    assert {n.split(".", 2)[2] for n in more if n.startswith("transformer_blocks.0.") and "bias" not in n} == {
        "norm1.emb.class_embedder.embedding_table.weight",
        "attn1.to_out.0.parametrizations.weight.0.scale",
        "ff.net.2.parametrizations.weight.0.scale",
    }
    assert "blocks.0.attn1.norm_q.weight" in trained["wan", "difffit"]
    assert "condition_embedder.text_embedder.linear_1.weight" in trained["wan", "difffit"]
    assert "patch_embedding.weight" not in trained["wan", "difffit"]


def test_difffit_trains_the_input_layer_where_the_condition_enters_by_channels():
    model, _ = tiny("wan")
    model.register_to_config(out_channels=2)  # of 4 that come in, the others are the condition's
    build("adapter", DiffFitSection(), model=model, seed=0)
    assert model.patch_embedding.weight.requires_grad


@pytest.mark.parametrize("name", SECTIONS)
def test_merged_it_is_an_ordinary_model(name):
    adapter, model, inputs = adapted("wan", SECTIONS[name])
    train(model, inputs)
    wanted = output(model, inputs)
    merged = adapter.merged(model)
    assert merged.state_dict().keys() == tiny("wan")[0].state_dict().keys()
    assert {type(module) for module in merged.modules()} == {type(module) for module in tiny("wan")[0].modules()}
    if name in ("bitfit", "difffit"):
        assert torch.equal(output(merged, inputs), wanted)
    else:
        torch.testing.assert_close(output(merged, inputs), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(output(model, inputs), wanted), "the adapted model goes on as it was"


@pytest.mark.parametrize("name", ["lora", *QUANTISED])
def test_the_adapter_alone_is_what_a_checkpoint_holds(name):
    adapter, model, inputs = adapted("dit", SECTIONS[name])
    train(model, inputs)
    state = {key: value.clone() for key, value in adapter.state_dict(model).items()}
    assert state.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    again, other, _ = adapted("dit", SECTIONS[name])
    again.load_state_dict(other, state)
    assert torch.equal(output(other, inputs), output(model, inputs))
    with pytest.raises(RuntimeError, match="another adapter"):
        again.load_state_dict(other, dict(list(state.items())[1:]))
    assert again.identity() == adapter.identity()
    again.check_continues(adapter.identity(), "here")
    _, moved, _ = adapted("dit", NoAdapterSection())
    with torch.no_grad():
        moved.proj_out_1.bias[0] += 1e-3
    with pytest.raises(UserError, match="another base"):
        build("adapter", SECTIONS[name], model=moved).check_continues(adapter.identity(), "here")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", *QUANTISED])
def test_what_is_published_loads_on_a_fresh_base_bit_for_bit(tmp_path, family, name):
    adapter, model, inputs = adapted(family, SECTIONS[name])
    train(model, inputs)
    adapter.publish(model, tmp_path / "adapter", "owner/base", "main", tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118 (no mapping)
    size, base_size = (
        sum(p.nbytes for p in m.values()) for m in (adapter.state_dict(model), tiny(family)[0].state_dict())
    )
    assert size <= (tmp_path / "adapter" / WEIGHTS).stat().st_size < size + 20_000 and size < base_size

    base = read_base(adapter_folder(tmp_path))
    fresh, _ = tiny(family)
    lora.load_adapter(fresh, tmp_path / "adapter", base)
    assert torch.equal(output(fresh, inputs), output(model, inputs))
    with pytest.raises(UserError, match="trained on other weights than owner/base"):
        lora.load_adapter(quantised_base(family, adapter, 1) if name in QUANTISED else fresh, tmp_path, base)
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match="no adapter for this base"):
        lora.load_adapter(tiny(family)[0], tmp_path / "adapter", base)


def test_plain_diffusers_loads_it(tmp_path):
    adapter, model, inputs = adapted("wan", SECTIONS["lora"])
    train(model, inputs)
    adapter.publish(model, tmp_path, "owner/base", None, tmp_path)
    fresh, _ = tiny("wan")
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS)
    assert torch.equal(output(fresh, inputs), output(model, inputs))
    fresh.delete_adapters(list(fresh.peft_config))
    assert torch.equal(output(fresh, inputs), output(tiny("wan")[0], inputs))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_average_copies_only_what_is_trained(name):
    adapter, model, inputs = adapted("wan", SECTIONS[name])
    average = EmaModel(Ema(half_life=1000, warmup_ratio=1e9), model, adapter.eligible)
    pairs = list(zip(model.named_parameters(), average.model.parameters(), strict=True))
    assert all((own is theirs) != adapter.eligible(name) for (name, own), theirs in pairs)
    start = {n: p.clone() for n, p in average.model.named_parameters()}
    train(model, inputs)
    average.update(100, 500)
    for name, parameter in average.model.named_parameters():
        if adapter.eligible(name):
            trained = model.get_parameter(name)
            torch.testing.assert_close(parameter, start[name].lerp(trained.detach(), 1 - 0.5**0.5))
        else:
            assert torch.equal(parameter, start[name])


@pytest.mark.parametrize("name", QUANTISED)
def test_evaluation_between_steps_leaves_a_quantised_base_as_it_is(name):
    adapter, model, inputs = adapted("dit", SECTIONS[name])
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if not p.is_floating_point()})
    assert len(before) == len(adapter.quantised) > 0
    output(model, inputs)
    train(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output(model, inputs)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())


def test_a_model_that_carries_an_adapter_is_merged_before_it_is_trained():
    model, inputs = tiny("wan")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    wanted = output(model, inputs)
    with pytest.raises(UserError, match="carries an adapter itself"):
        build("adapter", LoraSection(), model=model)
    build("adapter", NoAdapterSection(), model=model)
    assert not lora.carries_adapter(model)
    torch.testing.assert_close(output(model, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_chosen_targets_and_mistakes():
    adapter, model, inputs = adapted("wan", LoraSection(rank=2, targets=("blocks.1.*.to_q", "patch_embedding")))
    named = {name.split(".lora_")[0] for name in adapter.state_dict(model)}
    assert named == {"blocks.1.attn1.to_q", "blocks.1.attn2.to_q", "patch_embedding"}
    train(model, inputs)
    wanted = output(model, inputs)
    torch.testing.assert_close(output(adapter.merged(model), inputs), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"blocks.adapter.targets: '\*.to_x' matches nothing"):
        adapted("wan", LoraSection(targets=("*.to_x",)))
    with pytest.raises(UserError, match=r"blocks.adapter.embeddings: 'words' matches nothing"):
        adapted("wan", DiffFitSection(embeddings=("words",)))


def test_without_bitsandbytes_qlora_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="blocks.adapter: bitsandbytes can't hold weights in 4 bits here"):
        adapted("dit", QLoraSection())


@pytest.mark.parametrize(("how", "least", "most"), [("nf4", 0.05, 0.12), ("int8", 0.002, 0.012)])
def test_quantised_layers_are_near_what_they_stand_for_and_smaller(how, least, most):
    linear = torch.nn.Linear(256, 64)
    linear.weight.data[3] = 0  # a row without a scale
    layer = quantised(linear, how, "here")
    weight, bias = expanded(layer)
    error = (weight - linear.weight).norm() / linear.weight.norm()
    assert least < error < most and not weight[3].any() and bias is linear.bias
    assert layer.weight.nbytes == linear.weight.nbytes // {"nf4": 8, "int8": 4}[how]
    assert size(layer.weight) == linear.weight.numel()

    x, y = (torch.randn(2, 3, 5, 256, requires_grad=True) for _ in range(2))  # 4-D, as temporal layers take it
    y.data.copy_(x.data)
    plain = full_precision(layer)
    for inputs, module in ((x, layer), (y, plain)):
        module(inputs).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.eval()(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = layer.train()(x)
        assert torch.equal(lowered, layer.eval()(x))
    torch.testing.assert_close(lowered.float(), plain(x), rtol=0.05, atol=0.05)


def test_int8_keeps_no_activations_for_the_backward_pass():
    layer, kept = quantised(torch.nn.Linear(32, 8), "int8", "here"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(100, 32, requires_grad=True)).sum().backward()
    assert kept == [(8, 32), (8,)]


def test_how_a_base_was_held_is_remembered_also_where_it_was_not_said(tmp_path):
    adapter, model, _ = adapted("dit", SECTIONS["qlora, int8"])
    adapter.publish(model, tmp_path, "owner/base", None, tmp_path)
    assert read_base(tmp_path).quantise == "int8"
    record = json.loads((tmp_path / BASE_FILE).read_text())
    del record["quantise"]
    (tmp_path / BASE_FILE).write_text(json.dumps(record))
    assert read_base(tmp_path).quantise == "nf4"
    assert SimDASection(quantise=True) == SimDASection(quantise="nf4")
    assert SimDASection(quantise=False) == SimDASection()
