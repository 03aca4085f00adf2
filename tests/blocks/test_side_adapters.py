"""Adapters beside a frozen video model: nothing at first, trained alone, published alone, loaded on their base."""

from __future__ import annotations

import copy
import shutil
from fnmatch import fnmatch

import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError
from tiny import DIT, FLOW, tiny
from tiny_dfgn import clips, output, shake, tiny_dfgn

from entrecipes import StickerPipeline
from entrecipes.diffusion.adapter_folder import adapter_folder
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.diffusion.quantised import quantise
from entrecipes.errors import UserError
from entrecipes.patterns import check_parameters
from entrecipes.recipe.adapters import I2VAdapterSection, LoraSection, NoAdapterSection, QLoraSection, SimDASection
from entrecipes.recipe.base import build
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.training import Ema
from entrecipes.training.ema import EmaModel

TEMPORAL = tuple(f"*temporal_attentions*.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
SECTIONS = {
    "simda": SimDASection(),
    "simda, quantised": SimDASection(quantise="nf4"),
    "i2v": I2VAdapterSection(),
    "i2v, up, quantised": I2VAdapterSection(blocks="up", quantise="int8"),
    "lora": LoraSection(rank=2),
    "lora, temporal": LoraSection(rank=2, targets=TEMPORAL),
    "qlora, temporal": QLoraSection(rank=2, targets=TEMPORAL),
}
SIDE = ["simda", "simda, quantised", "i2v", "i2v, up, quantised"]


def adapted(name):
    model = tiny_dfgn()
    return build("adapter", SECTIONS[name], model=model, seed=0), model


def train(model, inputs, steps=2):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder with the pipeline that adapters lie beside."""
    folder = tmp_path_factory.mktemp("base")
    StickerPipeline(unet=tiny_dfgn(), scheduler=DDIMScheduler()).save_pretrained(folder / "pipeline")
    return folder


def published(name, base, folder):
    """A trained adapter's run folder, and what its model makes of the inputs."""
    adapter, model = adapted(name)
    shake(getattr(model, "side_adapter", torch.nn.Module()))
    train(model, clips(1))
    adapter.publish(model, folder / "adapter", str(base), None, folder / "adapter")
    return output(model, clips(1)), adapter.state_dict(model)


@pytest.mark.parametrize("name", SECTIONS)
def test_it_equals_its_base_at_first_and_is_all_that_moves(name):
    adapter, model = adapted(name)
    inputs, plain = clips(1), tiny_dfgn()
    quantise(plain, adapter.quantised, adapter.how)
    assert bool(adapter.quantised) == ("quantised" in name or "qlora" in name)
    first = output(model, inputs)
    assert torch.equal(first, output(plain, inputs))

    average = EmaModel(Ema(half_life=1000, warmup_ratio=1e9), model, adapter.eligible)
    before = copy.deepcopy(dict(model.named_parameters()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(filter(adapter.eligible, before)) == adapter.state_dict(model).keys()
    model.enable_gradient_checkpointing()
    train(model, inputs)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == trained
    assert not torch.equal(output(model, inputs), first)
    average.update(10_000, 500)
    assert not torch.equal(output(average.model, inputs), first)


def test_what_lora_and_motion_tuning_train():
    def layers(name):
        return {key.split(".lora_")[0] for key in adapted(name)[0].state_dict(adapted(name)[1])}

    assert all(any(fnmatch(layer, target) for target in TEMPORAL) for layer in layers("lora, temporal"))
    attentions = {"mid_block.temporal_attentions.0", "up_blocks.0.temporal_attentions.1"}
    assert attentions < {layer.split(".transformer_blocks")[0] for layer in layers("lora, temporal")}
    kinds = {layer.split(".transformer_blocks.0.")[1] for layer in layers("lora")}
    assert kinds == {f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")} | {
        "ff.net.0.proj",
        "ff.net.2",
    }
    assert layers("lora, temporal") < layers("lora")

    names = [name for name, _ in tiny_dfgn().named_parameters()]
    check_parameters(tiny_dfgn(), ["*temporal*"], "blocks.stages.0.train")
    tuned = {name.split(".")[2] for name in names if fnmatch(name, "*_blocks.*temporal*")}
    assert tuned == {"temporal_layers", "temporal_attentions"}


@pytest.mark.parametrize("name", ["simda", "i2v, up, quantised"])
def test_a_checkpoint_holds_it_alone(name):
    adapter, model = adapted(name)
    train(model, clips(1))
    state = {key: value.clone() for key, value in adapter.state_dict(model).items()}
    again, other = adapted(name)
    again.load_state_dict(other, state)
    assert torch.equal(output(other, clips(1)), output(model, clips(1)))
    with pytest.raises(RuntimeError, match="another adapter"):
        again.load_state_dict(other, dict(list(state.items())[1:]))
    again.check_continues(adapter.identity(), "here")
    with pytest.raises(UserError, match="another base"):
        build("adapter", SECTIONS[name], model=tiny_dfgn(seed=5)).check_continues(adapter.identity(), "here")


@pytest.mark.parametrize("name", SIDE)
def test_what_is_published_loads_with_its_base_bit_for_bit(name, base, tmp_path):
    wanted, state = published(name, base, tmp_path)
    weights = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    size = sum(value.nbytes for value in state.values())
    assert size <= weights.stat().st_size < size + 12_000
    pipeline = load_pipeline(str(tmp_path))
    assert torch.equal(output(pipeline.unet, clips(1)), wanted)
    with pytest.raises(UserError, match="carries an adapter that can't be merged"):
        build("adapter", NoAdapterSection(), model=pipeline.unet)
    if "quantised" not in name:
        pipeline.unet.side_adapter.detach()
        assert torch.equal(output(pipeline.unet, clips(1)), output(tiny_dfgn(), clips(1)))


def test_what_does_not_fit_or_is_damaged_is_named(base, tmp_path):
    published("i2v", base, tmp_path / "run")
    folder = adapter_folder(str(tmp_path / "run"))
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    whole, options = weights.read_bytes(), config.read_text()
    for damaged in (whole[:-100], b"cut", whole[:8] + b" " * 40 + whole[48:]):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="no adapter for this base"):
            load_pipeline(str(tmp_path / "run"))
    weights.write_bytes(whole)
    for damaged in ("{", "{}", options.replace("I2VAdapter", "Other"), options.replace("mid_block", "end_block")):
        config.write_text(damaged)
        with pytest.raises(UserError, match="no adapter for this base"):
            load_pipeline(str(tmp_path / "run"))
    config.write_text(options)

    other = tmp_path / "other"
    shutil.copytree(base, other)
    tiny_dfgn(seed=5).save_pretrained(other / "pipeline" / "unet")
    published("i2v", other, tmp_path / "run")
    with pytest.raises(UserError, match="trained on other weights"):
        load_pipeline(str(tmp_path / "run"))
    shutil.rmtree(other)
    with pytest.raises(UserError, match="base of this adapter can't be had"):
        load_pipeline(str(tmp_path / "run"))


def test_recipes_that_can_not_be():
    with pytest.raises(UserError, match="blocks.adapter: simda does not fit this base: Linear has no spatial"):
        build("adapter", SimDASection(), model=torch.nn.Linear(2, 2))
    values = tiny(
        DIT,
        FLOW,
        blocks={"type": "all", "adapter": {"type": "simda"}},
        prune={"type": "written", "remove": [1]},
    )
    with pytest.raises(ValidationError, match="prune.type: removes what simda would lie beside"):
        Recipe.model_validate(values | {"pipeline": {"pretrained": "owner/base"}})
