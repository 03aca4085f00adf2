"""Runs that train an adapter on a published pipeline: resume, what they keep and publish, and what takes it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel
from pydantic import ValidationError
from tiny import DIT as TINY
from tiny import FLOW, tiny, tiny_recipe

from entrecipes.cli import main
from entrecipes.diffusion.families import FAMILIES
from entrecipes.diffusion.pipelines import load_components, load_pipeline
from entrecipes.errors import UserError
from entrecipes.recipe.load import load
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.schema import Recipe
from entrecipes.training import checkpoint
from entrecipes.training.launch import run_recipe
from entrecipes.training.loop import step, train
from entrecipes.training.publish import save_pipeline
from entrecipes.training.resume import check_continues, resume
from entrecipes.training.run import Run
from entrecipes.training.telling import begin

DIT = {**TINY, "config": {**TINY["config"], "num_layers": 3}}
LORA = {"type": "lora", "rank": 2, "dropout": 0.1}
ADAPTERS = {
    "lora": LORA,
    "qlora": {"type": "qlora", "rank": 2},
    "qlora, int8": {"type": "qlora", "rank": 2, "quantise": "int8"},
    "bitfit": {"type": "bitfit"},
    "difffit": {"type": "difffit"},
    "lora, merged": LORA | {"merge": True},
}

SHORT = {"images": 32}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline that any recipe of DIT would begin with, no block at zero."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    components = load_components(tiny_recipe(DIT, FLOW).pipeline)
    with torch.no_grad():
        for parameter in components.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    components.pipeline().save_pretrained(folder)
    return folder


def recipe(base, adapter, **sections):
    values = tiny(DIT, FLOW, blocks={"type": "all", "adapter": adapter}, **sections)
    return values | {"pipeline": {"pretrained": str(base)}}


def leave(folder, values):
    """Train by the recipe, and save what a run publishes of the model into the folder."""
    run = Run(Recipe.model_validate(values), None)
    train(run)
    folder.mkdir(parents=True, exist_ok=True)
    save_pipeline(run, (run.ema or run).model, folder)
    return run


def predict(model):
    inputs = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    with torch.no_grad():
        return FAMILIES["DiTTransformer2DModel"].predict(model, inputs, torch.tensor([10, 500]), torch.tensor([3, 4]))


@pytest.mark.parametrize("name", ["lora", "qlora", "qlora, int8", "difffit"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, base, name):
    values = Recipe.model_validate(
        recipe(base, ADAPTERS[name], training={"gradient_checkpointing": True, "images": 96})
    )
    whole = Run(values, None)
    before = {key: value.clone() for key, value in whole.model.named_parameters()}
    train(whole)
    for key, value in whole.model.named_parameters():
        assert whole.adapter.eligible(key) or torch.equal(before[key], value), "frozen means frozen"

    part = Run(values, tmp_path)
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 48)
    train(part)
    assert part.images < 96
    rest = Run(values, tmp_path)
    resume(rest)
    train(rest)
    for ours, theirs in ((whole.model, rest.model), (whole.ema.model, rest.ema.model)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(predict(whole.ema.model), predict(whole.model))


def test_checkpoints_hold_the_adapter_alone_and_know_its_base(tmp_path, base):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    values = Recipe.model_validate(recipe(own, LORA))
    (tmp_path / "run").mkdir()
    run = Run(values, tmp_path / "run")
    train(run)
    path = checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]
    state = checkpoint.load(path)
    for part in ("model", "ema"):
        assert state[part] and all(".lora_" in key for key in state[part])
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size < (own / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size

    pipeline = load_pipeline(str(own))
    with torch.no_grad():
        pipeline.transformer.proj_out_1.bias[0] += 1e-3
    pipeline.save_pretrained(own)
    with pytest.raises(UserError, match="trained on another base than pipeline.pretrained holds now"):
        resume(Run(values, tmp_path / "run"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_run_leaves_gives_what_it_evaluated(tmp_path, base, name):
    run = leave(tmp_path, recipe(base, ADAPTERS[name], training=SHORT))
    wanted, alone = predict((run.ema or run).model), name in ("lora", "qlora", "qlora, int8")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter" if alone else "pipeline"]
    loaded = predict(load_pipeline(str(tmp_path)).transformer)
    if name == "lora, merged":
        torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(loaded, wanted)
    if alone:
        assert not list(tmp_path.rglob("diffusion_pytorch_model*"))
        assert torch.equal(predict(load_pipeline(str(tmp_path / "adapter")).transformer), wanted)
    else:
        plain = DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
        assert torch.equal(predict(plain), loaded)


@pytest.fixture(scope="module")
def published(tmp_path_factory, base):
    """The folder of a whole run beside a 4-bit base."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(base, ADAPTERS["qlora"], training=SHORT)))
    return run_recipe(load(str(folder / "recipe.yaml"), [f"training.output={folder / 'run'}"]))


def test_every_verb_takes_an_adapter(tmp_path, published, capsys):
    nats = [json.loads(line) for line in (published / "metrics.jsonl").read_text().splitlines()]
    last = [row["nats"] for row in nats if row["kind"] == "held_out"][-1]
    assert main(["generate", str(published), "-n", "2", "--steps", "2", "-o", str(tmp_path / "grid.png")]) == 0
    assert main(["evaluate", str(published), "-o", str(tmp_path / "numbers.json")]) == 0
    found = {row["name"]: row["value"] for row in json.loads((tmp_path / "numbers.json").read_text())}
    assert last in found.values(), "to the last bit what the run itself measured"
    assert main(["score", str(published), "--remove", "0.3", "-o", str(tmp_path / "scores")]) == 0
    assert "taylor" in capsys.readouterr().out


def test_the_card_shows_how_to_load_it_without_entrecipes(tmp_path, published, base, monkeypatch):
    card = (published / "adapter" / "README.md").read_text()
    assert f"A LoRA adapter for `{base}`" in card and "lora" in card.split("---")[1] and "in 4 bits" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "entrecipes" not in snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet, names := {})
    assert (tmp_path / "samples.png").exists()
    found, ours = (pipeline.transformer for pipeline in (names["pipeline"], load_pipeline(str(published))))
    loras = [name for name, _ in found.named_parameters() if ".lora_" in name]
    assert loras and all(torch.equal(found.get_parameter(name), ours.get_parameter(name)) for name in loras)


def test_a_base_moves_along_and_a_lost_one_is_named(tmp_path, base):
    shutil.copytree(base, tmp_path / "old" / "base")
    leave(tmp_path / "old" / "run", recipe(tmp_path / "old" / "base", LORA, training=SHORT))
    wanted = predict(load_pipeline(str(tmp_path / "old" / "run")).transformer)
    (tmp_path / "old").rename(tmp_path / "new")
    assert torch.equal(predict(load_pipeline(str(tmp_path / "new" / "run")).transformer), wanted)
    shutil.rmtree(tmp_path / "new" / "base")
    with pytest.raises(UserError, match="the base of this adapter can't be had"):
        load_components(Pipeline(pretrained=str(tmp_path / "new" / "run")))


def test_more_training_on_an_adapted_base(tmp_path, base):
    """The next run merges the first one's adapter into what it trains."""
    wanted = predict(leave(tmp_path, recipe(base, LORA, training=SHORT)).ema.model)
    run = Run(Recipe.model_validate(recipe(tmp_path, {"type": "none"})), None)
    torch.testing.assert_close(predict(run.model.eval()), wanted, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    with pytest.raises(UserError, match="the base carries an adapter itself"):
        Run(Recipe.model_validate(recipe(tmp_path, LORA)), None)


def test_what_is_removed_later_is_merged_in_the_end(tmp_path, base):
    """Pruning an adapted model needs merge, since the base would be loaded whole."""
    prune = {"type": "written", "remove": [1]}
    with pytest.raises(ValidationError, match=r"blocks.adapter.merge: must be true with prune"):
        Recipe.model_validate(recipe(base, LORA, prune=prune))
    run = leave(tmp_path, recipe(base, LORA | {"merge": True}, prune=prune, training=SHORT))
    loaded = load_pipeline(str(tmp_path)).transformer
    assert len(loaded.transformer_blocks) == 2
    torch.testing.assert_close(predict(loaded), predict((run.ema or run).model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_new_weights_is_a_mistake():
    with pytest.raises(ValidationError, match=r"blocks.adapter.type: 'lora' adapts a trained model"):
        tiny_recipe(DIT, FLOW, blocks={"type": "all", "adapter": LORA})


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_ent_prog_on_top_trains_only_the_adapters_of_open_blocks(base, name):
    draws = {"images": 4, "noise_levels": 4}
    blocks = {"type": "entprog", "order": "taylor", "draws": draws, "growth": "none", "largest": 0.34}
    blocks["adapter"] = ADAPTERS[name]
    run = Run(Recipe.model_validate(recipe(base, {}) | {"blocks": blocks}), None)
    before = {key: value.clone() for key, value in run.model.named_parameters()}
    batches = run.batches()
    begin(run)
    for _ in range(2):
        step(run, batches)
    moved = {key for key, value in run.model.named_parameters() if not torch.equal(before[key], value)}
    assert len({key.split(".")[1] for key in moved}) == 1, "of 3 blocks, 0.34 is one"
    assert moved and all(".lora_" in key for key in moved)
    assert len(run.optimizer.optimizer.state) == len(moved)


def test_a_checkpoint_of_before_int8_goes_on(tmp_path, base):
    """Its recipe knew no `quantise`, or only whether."""
    values = Recipe.model_validate(recipe(base, ADAPTERS["qlora"]))
    written = values.model_dump(mode="json", by_alias=True)
    del written["blocks"]["adapter"]["quantise"]
    state = {"recipe": written, "run": {"images": 16, "world_size": 1}}
    assert check_continues(tmp_path, state, values, 1) == []
    held = Recipe.model_validate(recipe(base, ADAPTERS["qlora, int8"]))
    with pytest.raises(UserError, match="blocks.adapter.quantise: 'nf4' there, 'int8' here"):
        check_continues(tmp_path, state, held, 1)
