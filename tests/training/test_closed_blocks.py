"""Blocks that are not open yet, held in few bits: their weights come back to the bit, and nothing quantised is left."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel
from pydantic import ValidationError
from tiny import DIT, FLOW, tiny_recipe

from entrecipes.diffusion.pipelines import load_components
from entrecipes.diffusion.quantised import is_quantised
from entrecipes.recipe.idle import idle_keys
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.training.loop import step, train
from entrecipes.training.publish import save_pipeline
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.telling import begin
from entrecipes.training.weights import evaluated, weights

DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
HEAD = ["proj_out_*", "transformer_blocks.3.*"]
STAGES = [{"train": HEAD}, {"from_images": 48, "train": [*HEAD, "transformer_blocks.2.*"]}]
STAGES += [{"from_images": 80, "train": ["proj_out_*", "transformer_blocks.1.*"]}]
DRAWS = {"images": 4, "noise_levels": 4}
BLOCKS = {
    "staged": {"type": "staged", "stages": STAGES},
    "entprog": {"type": "entprog", "order": "last_first", "stages": 2, "burst": 1, "holdout": DRAWS, "largest": 0.75},
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline with no block at zero, so that all of them count."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    components = load_components(tiny_recipe(DEEP, FLOW).pipeline)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in components.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    components.pipeline().save_pretrained(folder)
    return str(folder)


def recipe(base, blocks, how, **training):
    values = tiny_recipe(
        DEEP,
        FLOW,
        blocks=BLOCKS[blocks] | {"closed": {"quantise": how}},
        training={"images": 128, "log_every": 48} | training,
        evaluation={"every": 48, "held_out": {"images": 4, "noise_levels": 4}},
    )
    return values.model_copy(update={"pipeline": Pipeline(pretrained=base)})


def held(model):
    return {name.split(".")[1] for name, layer in model.named_modules() if is_quantised(layer)}


@pytest.mark.parametrize(("blocks", "how"), [("staged", "nf4"), ("entprog", "int8")])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, base, blocks, how):
    values = recipe(base, blocks, how, checkpoint_every=96)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = Run(values, tmp_path / "whole")
    train(whole)
    expected = weights(whole)
    part = Run(values, tmp_path / "parts")
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 64)
    train(part)
    assert 64 <= part.images < 128 and held(part.model) == held(part.ema.model) != set()
    rest = Run(values, tmp_path / "parts")
    assert resume(rest)
    assert rest.blocks.closed.names() == part.blocks.closed.names()
    train(rest)
    for key in ("model", "ema"):
        found = weights(rest)[key]
        assert all(torch.equal(found[name], value) for name, value in expected[key].items()), key
    nats = [[row["nats"] for row in run.log.rows("held_out")] for run in (whole, rest)]
    assert nats[1] == nats[0]


@pytest.mark.parametrize("ema", [None, {"half_life": 100}])
def test_what_opens_was_never_changed_and_what_is_published_is_whole(tmp_path, base, ema):
    run = Run(recipe(base, "staged", "nf4", ema=ema), None)
    first = {name: value.clone() for name, value in run.model.state_dict().items()}
    batches = run.batches()
    begin(run)
    while run.images < 128:
        before = held(run.model)
        step(run, batches)
        opened = before - held(run.model)
        for block in opened:
            for name, value in run.model.state_dict().items():
                if name.startswith(f"transformer_blocks.{block}."):
                    assert torch.equal(value, first[name]), "as it was before it closed"
        wanted = {0: {"0", "1", "2"}, 48: {"0", "1"}, 80: {"0"}}
        assert held(run.model) == wanted[max(start for start in wanted if start <= run.images)]
    weights = {weight for weight in run.model.parameters() if weight.requires_grad}
    assert set(run.optimizer.optimizer.state) == weights

    with evaluated(run) as model:
        assert not held(model) and all(weight.dtype == torch.float32 for weight in model.parameters())
        save_pipeline(run, model, tmp_path)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert held(run.model) == {"0"}
    published = DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer").state_dict()
    assert all(torch.equal(published[name], value) for name, value in kept.items())
    closed = [name for name in first if name.startswith("transformer_blocks.0.")]
    assert all(torch.equal(published[name], first[name]) for name in closed)
    moved = [name for name in first if not torch.equal(published[name], first[name])]
    assert {name.split(".")[1] for name in moved if name.startswith("transformer")} == {"1", "2", "3"}


def test_averages_are_those_of_a_run_in_full_precision(base):
    """With int8 (near the weights) averages of opened blocks agree; of closed ones they are equal."""
    runs = [Run(recipe(base, "staged", how), None) for how in (None, "int8")]
    for run in runs:
        train(run)
    plain, quantised = (weights(run)["ema"] for run in runs)
    for name, value in plain.items():
        if name.startswith("transformer_blocks.0."):
            assert torch.equal(value, quantised[name])
        torch.testing.assert_close(value, quantised[name], rtol=0.05, atol=2e-3)
    sizes = [sum(weight.nbytes for weight in run.model.parameters()) for run in runs]
    assert sizes[1] < sizes[0]


def test_what_it_does_not_go_with_is_refused_and_where_it_does_nothing_is_known(base):
    assert "blocks.closed.quantise" not in idle_keys(recipe(base, "staged", "nf4"))
    for blocks in ({"type": "entprog", "growth": "none"}, {"type": "staged", "stages": [{"train": ["*"]}]}):
        idle = tiny_recipe(DEEP, FLOW, blocks=blocks | {"closed": {"quantise": "nf4"}})
        assert "blocks.closed.quantise" in idle_keys(idle)
    with pytest.raises(ValidationError, match="closed.quantise: not with prune"):
        stages = {"type": "staged", "stages": [{"train": ["proj_out_*"]}], "closed": {"quantise": "nf4"}}
        tiny_recipe(DEEP, FLOW, blocks=stages, prune={"type": "written", "remove": [1]})
    with pytest.raises(ValidationError, match="closed.quantise: goes with adapter: none alone"):
        recipe(base, "staged", "nf4").model_validate(
            tiny_recipe(DEEP, FLOW).model_dump(by_alias=True)
            | {"pipeline": {"pretrained": base}}
            | {"blocks": BLOCKS["staged"] | {"closed": {"quantise": "nf4"}, "adapter": {"type": "lora"}}}
        )
