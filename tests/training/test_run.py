"""Real tiny runs: resume, accumulation, freezing, label dropout, divergence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from tiny import DIT, EDM, FLOW, SEQUENCE, TEXT, UNET, tiny_recipe

from entrecipes.data.loader import Batch
from entrecipes.errors import UserError
from entrecipes.samples.masks import EVERYTHING
from entrecipes.training import checkpoint
from entrecipes.training.launch import check_free, hold
from entrecipes.training.loop import step, train
from entrecipes.training.resume import resume
from entrecipes.training.run import Run


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def rows(folder, kind):
    timing = {"seconds", "images_per_second", "peak_memory_gib"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines if line["kind"] == kind]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CHANGES = {
    "plain": {},
    "loss-aware": {"noise": {"type": "loss_aware", "bins": 4, "history": 2, "refresh_every": 32}},
    "infonoise": {"noise": {"type": "infonoise", "warmup": 48, "ramp": 64, "refresh_every": 32, "buffer": 100}},
    "channels last": {"training": {"channels_last": True}},
    "8-bit": {"optimizer": {"type": "adamw8bit"}},
    "no average": {"training": {"ema": None}},
    "bf16, accumulated": {"training": {"precision": "bf16", "micro_batch_size": 8}},
    "sequences": {"model": SEQUENCE, "data": TEXT, "training": {"gradient_checkpointing": True}},
    "sequences, bf16": {"model": SEQUENCE, "scheduler": FLOW, "data": TEXT, "training": {"precision": "bf16"}},
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of the process; each test starts anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, change):
    """Weights (with dropout in the model), EMA, logged losses and held-out nats equal those of an uninterrupted run."""
    recipe = tiny_recipe(**CHANGES[change])
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = Run(recipe, tmp_path / "whole")
    train(whole)

    part = Run(recipe, tmp_path / "parts")
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 80)
    train(part)
    assert 80 <= part.images < 160
    rest = Run(recipe, tmp_path / "parts")
    assert resume(rest).name == f"images-{part.images:012d}"
    train(rest)

    assert_equal(weights(whole), weights(rest))
    if whole.ema:
        assert_equal(whole.ema.state_dict(), rest.ema.state_dict())
    assert rows(tmp_path / "whole", "train") == rows(tmp_path / "parts", "train")
    assert rows(tmp_path / "whole", "held_out") == rows(tmp_path / "parts", "held_out")


def test_accumulated_gradients_equal_the_large_batch():
    model = {**UNET, "config": {**UNET["config"], "dropout": 0.0}}  # dropout would draw per forward pass
    plain = {"type": "torch", "name": "SGD", "learning_rate": 0.1}  # AdamW would blow up rounding of tiny gradients
    runs = [
        Run(tiny_recipe(model, optimizer=plain, training={"images": 48, "micro_batch_size": size}), None)
        for size in (None, 4)
    ]
    for run in runs:
        train(run)
    whole, parts = map(weights, runs)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)


def test_stages_freeze_weights_and_the_average_goes_on():
    blocks = {
        "type": "staged",
        "stages": [{"train": ["*"]}, {"from_images": 32, "train": ["up_blocks.*", "conv_out.*"]}],
    }
    run = Run(tiny_recipe(blocks=blocks, optimizer={"type": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
                          training={"ema": {"half_life": 100, "warmup_ratio": 1e6}}), None)  # fmt: skip
    batches = run.batches()
    for _ in range(2):
        step(run, batches)
    before, average = weights(run), run.ema.state_dict()["conv_in.weight"].clone()
    for _ in range(3):
        step(run, batches)
    after = weights(run)
    assert torch.equal(before["conv_in.weight"], after["conv_in.weight"]), "freeze means freeze"
    assert not torch.equal(before["conv_out.weight"], after["conv_out.weight"])
    assert run.model.conv_in.weight not in run.optimizer.optimizer.state
    distance = (average - before["conv_in.weight"]).norm()
    assert 0 < (run.ema.state_dict()["conv_in.weight"] - before["conv_in.weight"]).norm() < distance


def test_staged_training_resumes_bit_for_bit(tmp_path):
    blocks = {
        "type": "staged",
        "stages": [
            {"train": ["*"]},
            {"from_images": 48, "train": ["up_blocks.*"]},
            {"from_images": 112, "train": ["*"]},
        ],
    }
    recipe = tiny_recipe(blocks=blocks)
    whole = Run(recipe, None)
    train(whole)
    part = Run(recipe, tmp_path)
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 64)
    train(part)
    rest = Run(recipe, tmp_path)
    resume(rest)
    assert not rest.model.conv_in.weight.requires_grad
    train(rest)
    assert_equal(weights(whole), weights(rest))
    assert len(rows(tmp_path, "event")) == 3


def test_labels_are_dropped_once_per_sample_and_only_where_guidance_exists():
    run = Run(tiny_recipe(DIT, FLOW, training={"label_dropout": 0.5, "batch_size": 64}), None)
    run.random.begin(0)
    labels = torch.arange(64) % 10
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    dropped = run.condition(images, Batch(images, labels, labels), images.float(), EVERYTHING)
    assert set(dropped[dropped != labels].tolist()) == {1000}
    assert 15 < (dropped == 1000).sum() < 49
    assert all(m.dropout_prob == 0 for m in run.model.modules() if type(m).__name__ == "LabelEmbedding")
    with pytest.raises(UserError, match="label_dropout has no effect"):
        Run(tiny_recipe(UNET, EDM, training={"label_dropout": 0.1}), None)


def test_a_warm_up_without_an_end_is_refused():
    with pytest.raises(ValidationError, match="noise.warmup: lasts the whole run"):
        tiny_recipe(noise={"type": "infonoise", "warmup": 160})


def test_a_diverged_loss_is_named_and_no_checkpoint_holds_it(tmp_path):
    recipe = tiny_recipe(
        optimizer={"type": "torch", "name": "SGD", "learning_rate": 1e30}, training={"clip_grad_norm": None}
    )
    with pytest.raises(UserError, match="lower optimizer.learning_rate"):
        train(Run(recipe, tmp_path))
    assert not list(tmp_path.glob("checkpoints/images-*"))


def test_another_recipes_checkpoint_is_refused_and_harmless_changes_are_not(tmp_path, caplog):
    train(Run(tiny_recipe(training={"images": 48}), tmp_path))
    with pytest.raises(UserError, match="belongs to another run .*learning.*|belongs to another run"):
        resume(Run(tiny_recipe(noise={"type": "uniform"}), tmp_path))
    longer = Run(tiny_recipe(optimizer={"type": "adamw", "learning_rate": 2e-3}), tmp_path)
    resume(longer)
    assert longer.images == 48 and "optimizer.learning_rate was 0.001 and is now 0.002" in caplog.text


def test_what_does_not_fit_is_said_before_training():
    wide = {**UNET, "config": {**UNET["config"], "num_class_embeds": 5}}
    with pytest.raises(UserError, match="10 classes, but the model is built for 5"):
        Run(tiny_recipe(wide), None)
    typo = {**UNET, "config": {**UNET["config"], "layer_per_block": 1}}
    with pytest.raises(
        UserError, match="layer_per_block: UNet2DModel takes no such argument; did you mean 'layers_per_block'"
    ):
        Run(tiny_recipe(typo), None)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler can't sample in ConsistencyModelPipeline"):
        Run(tiny_recipe(UNET, {"class": "FlowMatchEulerDiscreteScheduler"}), None)
    with pytest.raises(UserError, match="DiTPipeline always starts from 1"):
        Run(tiny_recipe(DIT, EDM), None)
    with pytest.raises(UserError, match="did you mean 'EDMEulerScheduler'"):
        Run(tiny_recipe(UNET, {"class": "EDMEulerSheduler"}), None)


def test_autocast_outlives_a_change_of_the_trained_set():
    blocks = {"type": "staged", "stages": [{"train": ["*"]}, {"from_images": 32, "train": ["up_blocks.*"]}]}
    run = Run(tiny_recipe(blocks=blocks, training={"precision": "bf16"}), None)
    seen = []
    run.model.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batches = run.batches()
    for _ in range(4):
        step(run, batches)
    assert set(seen) == {torch.bfloat16}


def test_a_frozen_prefix_with_attention_does_not_crash_the_process():
    """torch's CPU backward of GroupNorm dies on a channels-last input without gradient, which attention hands on."""
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    model = {**UNET, "config": {**UNET["config"], **blocks, "attention_head_dim": 4}}
    stages = [{"train": ["up_blocks.*"]}, {"from_images": 32, "train": ["mid_block.*"]}]
    train(Run(tiny_recipe(model, blocks={"type": "staged", "stages": stages}, training={"images": 64}), None))


def test_a_finished_run_is_not_relabelled(tmp_path):
    train(Run(tiny_recipe(training={"images": 48}), tmp_path))
    with pytest.raises(UserError, match="already trained to image 48, with other settings .optimizer.learning_rate"):
        resume(Run(tiny_recipe(training={"images": 48}, optimizer={"type": "adamw", "learning_rate": 1e-4}), tmp_path))
    with pytest.raises(UserError, match="training.images: 48 there, 16 here"):
        resume(Run(tiny_recipe(training={"images": 16}), tmp_path))
    again = Run(tiny_recipe(training={"images": 48}, evaluation={"every": 16}), tmp_path)
    assert resume(again) and again.images == 48, "measuring otherwise is fine"


def test_half_precision_is_not_pretended():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Run(tiny_recipe(training={"precision": "fp16"}), None)


def test_samples_are_drawn_without_dropout_also_without_an_average():
    run = Run(tiny_recipe(training={"ema": None}), None)
    first, second = (run.evaluator.grid((run.ema or run).model).pictures for _ in range(2))
    assert torch.equal(first, second) and run.model.training


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    recipe = tiny_recipe(training={"images": 96, "checkpoint_every": 32, "keep_checkpoints": 5})
    train(Run(recipe, tmp_path))
    older = tmp_path / "checkpoints/images-000000000032"
    again = Run(tiny_recipe(training={"images": 96, "checkpoint_every": 32, "resume": str(older)}), tmp_path)
    resume(again)
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == [older.name]
    train(again)
    assert checkpoint.newest(tmp_path / "checkpoints")[0].name == "images-000000000096"


@pytest.mark.parametrize(
    ("model", "scheduler", "sections", "message"),
    [
        ({"out_channels": 3}, EDM, {}, "in_channels, out_channels"),
        ({"sample_size": None}, EDM, {}, "sample_size"),
        ({"sample_size": 9}, EDM, {}, "does not work in ConsistencyModelPipeline"),
        ({}, EDM, {"evaluation": {"guidance_scale": 3.0}}, "guidance_scale"),
        (
            {},
            EDM,
            {"evaluation": {"metrics": ["kid"], "features": {"type": "transformers", "id": "/nowhere"}}},
            "nowhere",
        ),
        ({}, {"class": "DDIMScheduler"}, {"evaluation": {"steps": 2000}}, "2000|steps"),
    ],
)
def test_what_would_only_fail_at_the_end_fails_at_the_start(model, scheduler, sections, message):
    recipe = tiny_recipe({**UNET, "config": {**UNET["config"], **model}}, scheduler, **sections)
    with pytest.raises(UserError, match=message):
        Run(recipe, None)


def test_a_folder_that_is_trained_into_is_left_alone(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    with pytest.raises(UserError, match="another process is still training into it"):
        check_free(tmp_path)
    lock.close()
    check_free(tmp_path)
