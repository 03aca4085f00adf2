"""Predicted memory of a step against what a step really holds, and the switches that are suggested."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tiny import DIT, FLOW, SEQUENCE, TEXT, tiny

from entrecipes.cli import main
from entrecipes.diffusion.pipelines import load_components
from entrecipes.diffusion.quantised import quantised
from entrecipes.recipe.load import load
from entrecipes.recipe.schema import Recipe
from entrecipes.training import memory
from entrecipes.training.heap import Heap
from entrecipes.training.loop import step
from entrecipes.training.memory import GIB, cpu_workspace, measured, predict
from entrecipes.training.rehearsal import Ledger
from entrecipes.training.run import Run
from entrecipes.training.savings import Saving, savings, until_it_fits

DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
HALF = {"type": "entprog", "order": "last_first", "growth": "none", "largest": 0.5, "inputs": "never"}
LORA = {"type": "all", "adapter": {"type": "lora", "rank": 2}}
QLORA = {"type": "all", "adapter": {"type": "qlora", "rank": 2}}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    pytest.param(tiny(training={"clip_grad_norm": 1.0, "micro_batch_size": 4}), id="unet, micro batches"),
    pytest.param(tiny(optimizer={"type": "adamw8bit"}, training={"ema": None}), id="8 bits, no average"),
    pytest.param(
        tiny(DEEP, FLOW, training={"gradient_checkpointing": True, "precision": "bf16"}), id="checkpointed, bf16"
    ),
    pytest.param(tiny(DEEP, FLOW, blocks=HALF), id="half open"),
    pytest.param(tiny(DEEP, FLOW, blocks=QLORA), id="qlora"),
    slow(tiny(DEEP, FLOW, blocks=LORA), id="lora"),
    slow(tiny(), id="unet"),
    slow(tiny(DEEP, FLOW), id="dit"),
    slow(tiny(DEEP, FLOW, optimizer={"type": "torch", "name": "Adafactor"}), id="Adafactor"),
    slow(tiny(SEQUENCE, FLOW, data=TEXT, noise={"type": "logit_normal"}), id="sequences"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    load_components(Recipe.model_validate(tiny(DEEP, FLOW)).pipeline).pipeline().save_pretrained(folder)
    return folder


def really(recipe: Recipe) -> tuple[dict[str, float], float]:
    """GiB of the components of a second step, and the most that was held beside what there was before it."""
    costs: dict[str, float] = {}
    run = Run(recipe, None, lambda row: costs.update(row) if row["kind"] == "costs" else None)
    batches = run.batches()
    run.blocks.advance(0)
    run.wrap()
    run.blocks.focus()
    step(run, batches)
    with Ledger(cpu_workspace) as ledger:
        kept = [*run.model.parameters(), *(run.ema.model.parameters() if run.ema else ())]
        kept += [v for state in run.optimizer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        for tensor in kept:
            tensor.detach()  # shows it to the ledger
        before = ledger.settled()
        step(run, batches)
    return measured(run, costs), (ledger.most - before) / GIB


@pytest.mark.parametrize("values", CASES)
def test_components_are_those_of_a_real_step(values, base):
    adapted = values.get("blocks", {}).get("adapter")
    recipe = Recipe.model_validate(values | ({"pipeline": {"pretrained": str(base)}} if adapted else {}))
    predicted = predict(recipe)
    found, moving = really(recipe)
    nf4 = adapted and adapted["type"] == "qlora"  # the scales of 4-bit weights are no parameters
    for part in ("weights", "average", "gradients", "optimizer"):
        assert getattr(predicted, part) == pytest.approx(found[part], rel=0.05 if nf4 else 1e-3), part
    assert predicted.activations == pytest.approx(found["activations"], rel=0.05)
    kept = predicted.weights + predicted.average + predicted.optimizer + predicted.holes
    assert predicted.step - kept == pytest.approx(moving, rel=0.1), "all that comes and goes, at its most"


def test_a_rehearsal_leaves_nothing_behind(base):
    """bitsandbytes keeps tables, which must hold values for the real weights that come later."""
    layer = torch.nn.Linear(64, 64)
    before = quantised(layer, "nf4", "here")(torch.ones(1, 64))
    predict(Recipe.model_validate(tiny(DEEP, FLOW, blocks=QLORA) | {"pipeline": {"pretrained": str(base)}}))
    predict(Recipe.model_validate(tiny(DEEP, FLOW, optimizer={"type": "lion8bit"})))
    assert torch.equal(quantised(layer, "nf4", "here")(torch.ones(1, 64)), before)


@pytest.fixture
def written(tmp_path):
    def write(values) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_every_suggestion_can_be_pasted_and_saves_what_it_says(written, monkeypatch):
    for threshold in ("WORTH_GIB", "WORTH_SHARE", "TRIED_GIB"):
        monkeypatch.setattr(f"entrecipes.training.savings.{threshold}", 0.0)
    path = written(tiny(DEEP, FLOW, optimizer={"type": "adamw", "learning_rate": 3e-4, "betas": [0.9, 0.95]}))
    recipe = load(path).recipe
    predicted = predict(recipe)
    found = savings(lambda switch: load(path, [switch]), recipe, predicted, 16, most=9)
    assert {one.switch.partition("=")[0] for one in found} == {
        "training.gradient_checkpointing",
        "training.micro_batch_size",
        "training.precision",
        "optimizer",
        "training.ema",
    }
    assert [one.gib for one in found] == sorted((one.gib for one in found), reverse=True)
    changed = {one.switch.partition("=")[0]: load(path, [one.switch]).recipe for one in found}
    assert changed["optimizer"].optimizer.betas == (0.9, 0.95) and changed["optimizer"].optimizer.learning_rate == 3e-4
    for one in found:
        less = predict(changed[one.switch.partition("=")[0]])
        assert predicted.step - less.step == pytest.approx(one.gib, rel=0.15), one.switch


def test_a_dry_run_warns_before_it_runs_out(written, monkeypatch, capsys):
    path, small = written(tiny(DEEP, FLOW)), 1e-6
    for threshold in ("WORTH_GIB", "WORTH_SHARE", "TRIED_GIB"):
        monkeypatch.setattr(f"entrecipes.training.savings.{threshold}", 0.0)
    monkeypatch.setattr(memory, "available_gib", lambda device: small)
    assert main(["run", path, "--dry-run", "--json"]) == 0
    said = capsys.readouterr()
    assert "but there are 0.00; try training." in said.err
    row = json.loads(said.out.splitlines()[-1])
    assert not row["predicted"]["fits"] and len(row["savings"]) == 4
    for part in ("weights", "average", "gradients", "optimizer", "activations", "data"):
        assert row["predicted"][part] == pytest.approx(row["measured"][part], rel=0.05), part
    assert row["measured"]["peak"] == row["peak_memory_gib"] > row["predicted"]["step"]


def test_without_weights_the_outline_says_the_same(base, written, capsys):
    values = tiny(DEEP, FLOW) | {"pipeline": {"pretrained": str(base)}}
    (base / "transformer" / "diffusion_pytorch_model.safetensors").rename(base / "elsewhere")
    try:
        assert main(["run", written(values), "--dry-run", "--meta"]) == 0
    finally:
        (base / "elsewhere").rename(base / "transformer" / "diffusion_pytorch_model.safetensors")
    said = capsys.readouterr().out
    assert "DiTTransformer2DModel" in said and "averaged weights" in said and "in all" in said


def test_switches_are_named_until_it_fits():
    parts = dict.fromkeys(memory.Prediction.__dataclass_fields__, 0.1)
    predicted = memory.Prediction(**parts | {"device": "cpu", "trained": ""})
    found = [Saving("a=1", 0.3, ""), Saving("b=1", 0.2, ""), Saving("c=1", 0.1, "")]
    short = replace(predicted, available=predicted.peak - 0.4)
    assert not short.fits and [one.switch for one in until_it_fits(found, short)] == ["a=1", "b=1"]


def test_the_heap_joins_holes_and_returns_mappings(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**30))
    heap = Heap()
    blocks = [heap.take(100_000) for _ in range(4)]
    extent = heap.held
    assert 400_000 < extent < 402_000
    heap.give(blocks[1])
    heap.give(blocks[2])
    heap.take(150_000)
    assert heap.held == extent, "two neighbouring holes are one"
    heap.take(100_000)
    assert heap.held > extent, "what is left of it is too small"
    extent = heap.held
    large = heap.take(2**21)
    assert heap.held > extent + 2**21 and heap.most == heap.held
    heap.give(large)
    assert heap.held == extent and heap.most > extent
