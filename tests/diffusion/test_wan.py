"""The family of Wan transformers: what they are given, how they are sampled, what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import EDM, FLOW
from tiny_video import WAN

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
