"""The sequence model and its pipeline: shapes, the times of every path, exact samples, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from entrecipes import SequencePipeline, SequenceTransformer1DModel

SIZE = {"sample_size": 12, "alphabet": "ACGT", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = [
    EDMEulerScheduler(sigma_data=1.0),
    EDMDPMSolverMultistepScheduler(sigma_data=1.0),
    DDIMScheduler(clip_sample=False),
    EulerDiscreteScheduler(),
    DPMSolverMultistepScheduler(**FLOW),
    FlowMatchEulerDiscreteScheduler(),
]


def build(**config) -> SequenceTransformer1DModel:
    """A model whose output depends on everything (a fresh one predicts zero)."""
    torch.manual_seed(0)
    model = SequenceTransformer1DModel(**(SIZE | config))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    assert all(parameter.any() for parameter in model.parameters())
    return model.eval()


def pipeline_of(model: SequenceTransformer1DModel, scheduler) -> SequencePipeline:
    pipeline = SequencePipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("patch", [1, 3])
def test_every_position_sees_every_other_and_the_order(patch):
    model = build(patch_size=patch)
    x = torch.randn(2, 4, 12, requires_grad=True)
    y = model(x, torch.tensor([-1.0, 1.0])).sample
    assert y.shape == x.shape
    (seen,) = torch.autograd.grad(y[0, :, 0].sum(), x)
    assert (seen[0].abs().sum(0) > 0).all() and not seen[1].any(), "all positions of its own sequence, and no other"
    turned = model(x.flip(-1), torch.tensor([-1.0, 1.0])).sample.flip(-1)
    assert not torch.allclose(turned, y, atol=1e-4)


def test_patches_keep_symbols_in_their_places():
    """With the transformer's blocks shut, a token's output depends on its own patch alone."""
    model = build(patch_size=3, num_layers=0)
    x = torch.randn(1, 4, 12)
    changed = x.clone()
    changed[0, 2, 4] += 1
    moved = (model(x, 0.0).sample - model(changed, 0.0).sample).abs().sum(1)[0] > 0
    assert moved.nonzero().ravel().tolist() == [3, 4, 5]


def test_a_kernel_adds_the_neighbours_and_starts_at_zero():
    model, x = build(kernel_size=3, num_layers=0), torch.randn(1, 4, 12)
    changed = x.clone()
    changed[0, 2, 4] += 1
    moved = (model(x, 0.0).sample - model(changed, 0.0).sample).abs().sum(1)[0] > 0
    assert moved.nonzero().ravel().tolist() == [3, 4, 5]
    assert not SequenceTransformer1DModel(**SIZE, kernel_size=3).conv_in.weight.any()
    with pytest.raises(ValueError, match="odd"):
        SequenceTransformer1DModel(**SIZE, kernel_size=2)


def test_a_fresh_model_predicts_zero_and_every_weight_gets_a_gradient_after_a_step():
    model = SequenceTransformer1DModel(**SIZE, num_class_embeds=3, kernel_size=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = torch.randn(6, 4, 12), torch.arange(6) % 3
    assert not model(x, 0.5, labels).sample.any()
    for _ in range(4):  # zeros open one after the other: the head, the gates, what lies behind them
        optimizer.zero_grad()
        (model(x, torch.randn(6), labels).sample - x).square().mean().backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("times", [(-1.5, -0.2, 0.0, 1.1), (0.0, 1.0, 500.0, 999.0)])
def test_times_of_every_path_are_told_apart(times):
    model, x = build(), torch.randn(1, 4, 12)
    with torch.no_grad():
        outputs = [model(x, time).sample for time in times]
        batch = model(x.expand(4, -1, -1), torch.tensor(times)).sample
    torch.testing.assert_close(batch, torch.cat(outputs))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(outputs, outputs[1:], strict=False))
    scaled = build(timestep_scale=100.0)
    torch.testing.assert_close(scaled(x, 0.3).sample, model(x, 30.0).sample)


def test_classes_matter_and_are_asked_for():
    model, x = build(num_class_embeds=3), torch.randn(2, 4, 12)
    assert not torch.allclose(model(x, 0.0, torch.tensor([0, 1])).sample, model(x, 0.0, torch.tensor([0, 2])).sample)
    with pytest.raises(ValueError, match="class_labels"):
        model(x, 0.0)


def test_checkpointing_changes_nothing_and_bf16_little():
    model, x = build(), torch.randn(2, 4, 12)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(x, 0.4).sample.square().sum().backward()
        gradients.append(model.proj_in.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        whole, half = model(x, 0.4).sample, model.to(torch.bfloat16)(x.bfloat16(), 0.4).sample
    assert half.dtype == torch.bfloat16 and (whole - half.float()).abs().max() < 0.1 * whole.abs().max()


def test_configs_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        SequenceTransformer1DModel(sample_size=10, patch_size=4)
    for alphabet in ("A", "ABA"):
        with pytest.raises(ValueError, match="each once"):
            SequenceTransformer1DModel(alphabet=alphabet)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_sequence_depends_on_its_own_generator_alone(scheduler):
    pipeline = pipeline_of(build(), scheduler)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = pipeline(batch_size=3, num_inference_steps=4, generator=seeds, output_type="pt").sequences
    alone = pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(2), output_type="pt").sequences
    assert together.shape == (3, 4, 12) and torch.isfinite(together).all()
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-4)


def test_a_model_that_knows_one_text_samples_it():
    """The exact denoiser of a single text, as the bias of the head: every path must end in that text."""
    text = "GATTACATTTCC"
    model = SequenceTransformer1DModel(**SIZE | {"patch_size": 12})
    ids = torch.tensor([["ACGT".index(symbol) for symbol in text]])
    with torch.no_grad():
        model.proj_out.bias.copy_(2 * torch.nn.functional.one_hot(ids[0], 4).float().ravel() - 1)
    pipeline = pipeline_of(model, DDIMScheduler(prediction_type="sample", clip_sample=False))
    assert pipeline(batch_size=2, num_inference_steps=3).sequences == [text] * 2
    assert torch.equal(pipeline(num_inference_steps=3, output_type="ids").sequences, ids.to(torch.uint8))
    assert pipeline(num_inference_steps=3, return_dict=False) == ([text],)


def test_the_grid_can_be_given():
    pipeline = pipeline_of(build(), EulerDiscreteScheduler())
    pipeline(sigmas=[5.0, 1.0, 0.2, 0.0])
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([5.0, 1.0, 0.2, 0.0])
    pipeline.scheduler = DPMSolverMultistepScheduler()
    pipeline(timesteps=[900, 100])
    assert pipeline.scheduler.timesteps.tolist() == [900, 100]


def test_labels_that_do_not_fit_are_refused():
    classes = pipeline_of(build(num_class_embeds=3), DDIMScheduler())
    assert len(classes(class_labels=[0, 2], num_inference_steps=1).sequences) == 2
    assert len(classes(batch_size=2, class_labels=1, num_inference_steps=1).sequences) == 2
    for arguments in ({}, {"batch_size": 3, "class_labels": [0, 1]}):
        with pytest.raises(ValueError, match="class_labels"):
            classes(**arguments)
    with pytest.raises(ValueError, match="no classes"):
        pipeline_of(build(), DDIMScheduler())(class_labels=[0])
    with pytest.raises(ValueError, match="output_type"):
        classes(class_labels=0, output_type="pil")


def test_saving_and_loading_change_nothing(tmp_path: Path):
    pipeline = pipeline_of(build(num_class_embeds=3, patch_size=2), EDMEulerScheduler(sigma_data=1.0))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "SequencePipeline"
    assert index["transformer"] == ["entrecipes", "SequenceTransformer1DModel"], "where another process looks it up"
    again = SequencePipeline.from_pretrained(tmp_path)
    arguments = {"class_labels": [0, 1, 2], "num_inference_steps": 4, "output_type": "pt"}
    ours, theirs = (p(**arguments, generator=torch.Generator().manual_seed(0)).sequences for p in (pipeline, again))
    assert torch.equal(ours, theirs)


def test_a_hub_repository_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """diffusers' own download would look for `transformer/entrecipes.py` in the repository."""
    pipeline_of(build(), DDIMScheduler()).save_pretrained(tmp_path / "snapshot")
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("entrecipes.models.sequence.snapshot_download", snapshot)
    loaded = SequencePipeline.from_pretrained("somebody/sequences", revision="v1", cache_dir=str(tmp_path))
    assert loaded.transformer.config.alphabet == "ACGT"
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("somebody/sequences", "v1", str(tmp_path))
