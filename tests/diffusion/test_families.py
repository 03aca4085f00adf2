"""Every family trains, samples and publishes through its stock pipeline on every path that it admits."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tiny import DIT, EDM, FLOW, UNET

from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.families import FAMILIES
from entrecipes.diffusion.pipelines import load_components, load_pipeline
from entrecipes.errors import UserError
from entrecipes.evaluation.generation import balanced_labels, generate
from entrecipes.recipe.pipeline import Model, Pipeline

VP = {"class": "DDIMScheduler", "config": {"clip_sample": False}}
V = {"class": "DDIMScheduler", "config": {"clip_sample": False, "prediction_type": "v_prediction"}}
PAIRS = [(UNET, EDM), (UNET, VP), (UNET, FLOW), (DIT, VP), (DIT, V), (DIT, FLOW)]


def components(model, scheduler, seed=0):
    return load_components(Pipeline.model_validate({"build": {"model": model, "scheduler": scheduler}}), seed)


@pytest.mark.parametrize(("model", "scheduler"), PAIRS, ids=lambda part: part["class"])
def test_a_saved_pipeline_samples_alike_when_reloaded_plainly_and_trains_on(tmp_path, model, scheduler):
    parts = components(model, scheduler)
    denoiser = Denoiser(parts.model, parts.family, parts.path)
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    labels = torch.arange(4)
    error = denoiser.x0_error(x0, noise, torch.zeros(4), labels)
    assert error.shape == (4,) and torch.isfinite(error).all()

    parts.model.eval()
    pipeline = parts.pipeline()
    pipeline.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    arguments = {"steps": 3, "guidance_scale": 1.0, "seed": 5}
    ours = generate(pipeline, parts.family, balanced_labels(6, 10), 6, batch_size=6, **arguments)
    theirs = generate(plain, parts.family, balanced_labels(6, 10), 6, batch_size=4, **arguments)
    assert ours.shape == (6, 1, 8, 8) and ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1, "neither saving nor the batch size may change an image"
    assert not np.array_equal(ours[0], ours[1])

    again = load_components(Pipeline(pretrained=str(tmp_path)))
    assert again.vae is None and again.path.name == parts.path.name
    for name, value in parts.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_schema_names_every_family():
    assert set(get_args(Model.model_fields["class_name"].annotation)) == set(FAMILIES)


def test_fresh_weights_depend_on_the_seed_alone():
    one, same, other = (components(UNET, EDM, seed).model.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_guidance_uses_the_null_label():
    parts = components(DIT, FLOW)
    torch.nn.init.normal_(parts.model.proj_out_2.weight)
    parts.model.eval()
    arguments = {"steps": 2, "seed": 0, "batch_size": 4}
    plain = generate(parts.pipeline(), parts.family, [1, 2], 2, guidance_scale=1.0, **arguments)
    guided = generate(parts.pipeline(), parts.family, [1, 2], 2, guidance_scale=4.0, **arguments)
    assert not torch.equal(plain, guided)
    small = {**DIT, "config": {**DIT["config"], "num_embeds_ada_norm": 10}}
    parts = components(small, FLOW)
    with pytest.raises(UserError, match="num_embeds_ada_norm"):
        parts.family.null_label(parts.model)


def test_a_fresh_dit_starts_as_adaln_zero():
    parts = components(DIT, FLOW)
    output = parts.family.predict(
        parts.model, torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])
    )
    assert output.shape == (2, 1, 8, 8)
    assert all(block.norm1.linear.weight.abs().max() == 0 for block in parts.model.transformer_blocks)


def test_a_learned_variance_is_left_out():
    parts = components({**DIT, "config": {**DIT["config"], "out_channels": 2}}, VP)
    assert parts.family.predict(parts.model, torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 1])).shape[1] == 1
    images = generate(parts.pipeline(), parts.family, [0], 1, steps=2, guidance_scale=1, seed=0, batch_size=1)
    assert images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("source", ["./nowhere", "nowhere/at/all", "someone/no-such-pipeline"])
def test_a_pipeline_that_cannot_be_had(source):
    with pytest.raises(UserError, match=source):
        load_pipeline(source)


def test_a_scheduler_that_cuts_latents_is_told(tmp_path, caplog):
    AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(4,)).save_pretrained(tmp_path)
    latents = {**DIT, "config": {**DIT["config"], "in_channels": 4, "out_channels": 4}}
    build = {"model": latents, "scheduler": VP, "vae": str(tmp_path)}
    load_components(Pipeline.model_validate({"build": build}))
    assert "clip_sample" not in caplog.text
    load_components(Pipeline.model_validate({"build": build | {"scheduler": {"class": "DDIMScheduler"}}}))
    assert "clip_sample cuts latents at 1" in caplog.text
