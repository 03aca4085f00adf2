"""The family of Wan transformers: what they are given, how they are sampled, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tiny import EDM, FLOW
from tiny_video import WAN, wan, wan_vae

from entrecipes import PoseVideoPipeline
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.pipelines import Components, load_components
from entrecipes.diffusion.space import ClipSpace
from entrecipes.errors import UserError
from entrecipes.evaluation.generation import generate
from entrecipes.recipe.pipeline import Pipeline

EULER = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}}
UNIPC = {"class": "UniPCMultistepScheduler", "config": {**FLOW["config"], "flow_shift": 3.0}}


def components(scheduler=EULER, **config) -> Components:
    model = {"class": "WanTransformer3DModel", "config": WAN | config}
    return load_components(Pipeline.model_validate({"build": {"model": model, "scheduler": scheduler}}))


@pytest.mark.parametrize("scheduler", [EULER, UNIPC, FLOW, EDM], ids=lambda part: part["class"])
def test_a_saved_pipeline_samples_alike_when_reloaded_and_trains_on(tmp_path, scheduler):
    parts = components(scheduler)
    x0, noise = torch.randn(2, 4, 3, 3, 8, 8)
    condition = torch.randn(4, 6, 3, 8, 8)
    error = Denoiser(parts.model, parts.family, parts.path).x0_error(x0, noise, torch.zeros(4), condition)
    assert error.shape == (4,) and torch.isfinite(error).all()
    parts.model.eval()
    pipeline = parts.pipeline()
    pipeline.save_pretrained(tmp_path)
    again = load_components(Pipeline(pretrained=str(tmp_path)))
    assert again.path.name == parts.path.name and type(again.pipeline()) is PoseVideoPipeline
    arguments = {"steps": 3, "guidance_scale": 2.0, "seed": 5}
    ours = generate(pipeline, parts.family, condition, 4, batch_size=4, **arguments)
    theirs = generate(again.pipeline(), again.family, condition, 4, batch_size=3, **arguments)
    assert ours.shape == (4, 3, 3, 8, 8) and ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1, "neither saving nor the batch size may change a clip"


def test_the_model_is_given_clip_poses_reference_and_time_and_no_text():
    parts = components()
    sample, condition, time = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 6, 3, 8, 8), torch.tensor([20.0, 900.0])
    found = parts.family.predict(parts.model, sample, time, condition)
    plain = parts.model(torch.cat([sample, condition], 1), time, torch.zeros(2, 1, 8)).sample
    assert torch.equal(found, plain) and found.shape == sample.shape
    assert isinstance(parts.family.space(parts.model), ClipSpace) and parts.family.num_classes(parts.model) is None


def test_channels_that_do_not_hold_the_condition_are_refused():
    with pytest.raises(UserError, match="in_channels: 3, but the clip.*set 9"):
        components(in_channels=3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What a text-to-video pipeline of Wan's leaves, its text encoder named but not there."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    model = wan(in_channels=4, out_channels=4)
    parts = {"transformer": model, "vae": wan_vae(), "scheduler": scheduler, "transformer_2": None}
    WanPipeline(tokenizer=None, text_encoder=None, **parts).save_pretrained(tmp_path / "wan")
    index = json.loads((tmp_path / "wan" / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "wan"


@torch.no_grad()
def test_a_text_to_video_pipeline_starts_as_what_it_is(base):
    parts = load_components(Pipeline(pretrained=str(base)))
    assert parts.path.name == "flow" and type(parts.scheduler) is UniPCMultistepScheduler
    assert parts.model.config.in_channels == 12 and type(parts.vae) is AutoencoderKLWan
    assert not any(parameter.requires_grad for parameter in parts.vae.parameters())
    assert parts.family.blind_layer(parts.model) == "patch_embedding"
    assert parts.family.blind_layer(wan(in_channels=12, out_channels=4)) is None
    x, condition, time = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 8, 2, 2, 2), torch.tensor([900.0, 30.0])
    found = parts.family.predict(parts.model, x, time, condition)
    old = wan(in_channels=4, out_channels=4)(x, time, torch.zeros(2, 1, 8)).sample
    torch.testing.assert_close(found, old, rtol=0, atol=1e-6)
    clips = generate(parts.pipeline(), parts.family, condition, 2, steps=2, guidance_scale=1, seed=0, batch_size=2)
    assert clips.shape == (2, 3, 5, 16, 16)


def test_the_vae_of_a_whole_pipeline_can_be_built_with(base):
    build = {"model": {"class": "WanTransformer3DModel", "config": WAN | {"in_channels": 12, "out_channels": 4}}}
    for place in (base, base / "vae"):
        parts = load_components(Pipeline.model_validate({"build": build | {"scheduler": EULER, "vae": str(place)}}))
        assert parts.vae.config.z_dim == 4 and parts.pipeline().vae is parts.vae
    build["model"]["config"] = WAN
    with pytest.raises(UserError, match="out_channels: 3, but the VAE's latents have 4"):
        load_components(Pipeline.model_validate({"build": build | {"scheduler": EULER, "vae": str(base)}}))


def test_two_transformers_are_refused(base):
    index = json.loads((base / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two transformers"):
        load_components(Pipeline(pretrained=str(base)))
