"""The pipeline of clips: against a loop written by hand, what it takes and refuses, saving and loading."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from PIL import Image
from tiny_video import wan, wan_vae

from entrecipes import PoseVideoPipeline
from entrecipes.diffusion.path import GaussianPath

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "flow": [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        DPMSolverMultistepScheduler(**FLOW),
    ],
    "vp": [DDIMScheduler(clip_sample=False)],
    "edm": [EDMEulerScheduler(sigma_data=1.0)],
}
CASES = [(path, scheduler) for path, schedulers in SCHEDULERS.items() for scheduler in schedulers]


def pipeline_of(model: WanTransformer3DModel, scheduler=None, vae=None) -> PoseVideoPipeline:
    pipeline = PoseVideoPipeline(model, scheduler or FlowMatchEulerDiscreteScheduler(), vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(count: int = 2, frames: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """References [n, 3, H, W] and poses [n, F, 3, H, W] that PIL images can hold, in [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 256, (count, frames + 1, 3, size, size), generator=generator) / 255
    return values[:, -1], values[:, :-1]


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_eulers_method_along_the_flow(guidance):
    """x' = velocity, from noise at time 1 to the clip at 0; guidance goes away from a condition of zeros."""
    pipeline, (reference, poses) = pipeline_of(wan()), asked()
    found = pipeline(
        reference, poses, num_inference_steps=4, guidance_scale=guidance, generator=seeds(3, 4), output_type="pt"
    ).frames

    signed = poses.transpose(1, 2) * 2 - 1
    condition = torch.cat([signed, (reference * 2 - 1)[:, :, None].repeat(1, 1, 3, 1, 1)], 1)
    assert torch.equal(pipeline.encode_condition(signed, reference * 2 - 1), condition)
    model, text = pipeline.transformer, torch.zeros(2, 1, 8)
    x = torch.cat([torch.randn(1, 3, 3, 8, 8, generator=generator) for generator in seeds(3, 4)])
    pipeline.scheduler.set_timesteps(4)
    sigmas = pipeline.scheduler.sigmas
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        time = (sigma * 1000).expand(2)
        velocity = model(torch.cat([x, condition], 1), time, text).sample
        if guidance != 1:
            unguided = model(torch.cat([x, torch.zeros_like(condition)], 1), time, text).sample
            velocity = unguided + guidance * (velocity - unguided)
        x = x + (following - sigma) * velocity
    assert torch.equal(found, (x.transpose(1, 2).clamp(-1, 1) / 2 + 0.5).clamp(0, 1))
    assert found.std() > 0.05


@pytest.mark.parametrize(("path", "scheduler"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_clip_depends_on_its_own_generator_alone(path, scheduler):
    assert GaussianPath.from_scheduler(scheduler).name == path
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    if shift:
        assert GaussianPath.from_scheduler(scheduler).log_shift == pytest.approx(np.log(shift))
    pipeline, (reference, poses) = pipeline_of(wan(), scheduler), asked(3)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    together = pipeline(reference, poses, generator=seeds(0, 1, 2), **options).frames
    (alone,) = pipeline(reference[2:], poses[2:], generator=seeds(2), return_dict=False, **options)
    assert together.shape == (3, 3, 3, 8, 8) and torch.isfinite(together).all() and together.std() > 0.01
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-4)


def test_all_that_can_be_given_is_the_same():
    pipeline, (reference, poses) = pipeline_of(wan()), asked()
    options = {"num_inference_steps": 2, "output_type": "pt"}
    first = pipeline(reference, poses, generator=seeds(0, 1), **options).frames
    lists = [pictures(clip) for clip in poses]
    from_pil = pipeline(pictures(reference), lists, generator=seeds(0, 1), **options).frames
    torch.testing.assert_close(from_pil, first, rtol=0, atol=1e-5)
    condition = pipeline.encode_condition(poses.transpose(1, 2) * 2 - 1, reference * 2 - 1)
    assert torch.equal(pipeline(condition=condition, generator=seeds(0, 1), **options).frames, first)
    palette = pictures(reference)[0].convert("P", palette=Image.Palette.ADAPTIVE)
    assert torch.equal(
        *(
            pipeline(image, lists[0], generator=seeds(0), **options).frames
            for image in (palette, palette.convert("RGB"))
        )
    )
    one = pipeline(pictures(reference)[0], lists[0], generator=seeds(0), **options).frames
    torch.testing.assert_close(one, first[:1], rtol=1e-3, atol=1e-5)
    large = pictures(reference)[0].resize((16, 16), Image.Resampling.NEAREST)
    assert pipeline(large, lists[0], **options).frames.shape == (1, 3, 3, 8, 8), "a reference is resized to the poses"


def test_what_comes_out():
    pipeline, (reference, poses) = pipeline_of(wan()), asked()
    as_pt, as_np, as_pil = (
        pipeline(reference, poses, num_inference_steps=2, generator=seeds(0, 1), output_type=kind).frames
        for kind in ("pt", "np", "pil")
    )
    assert as_np.shape == (2, 3, 8, 8, 3) and np.array_equal(as_np, as_pt.permute(0, 1, 3, 4, 2).numpy())
    assert [len(clip) for clip in as_pil] == [3, 3]
    assert np.array_equal(np.asarray(as_pil[1][2]), (as_np[1, 2] * 255).round().astype(np.uint8))


def test_what_does_not_fit_is_refused():
    pipeline, (reference, poses) = pipeline_of(wan()), asked()
    refused = {
        "give both": (reference, None),
        "give one for each": (reference[:1], poses),
        "resize one": (torch.rand(2, 3, 16, 16), poses),
        "of one length": (reference, [poses[0], poses[1, :2]]),
        "patch_size": asked(size=7),
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            pipeline(*arguments, num_inference_steps=1)
    with pytest.raises(ValueError, match="3 channels, but the transformer takes 6"):
        pipeline(condition=torch.zeros(1, 3, 3, 8, 8))


@torch.no_grad()
def test_behind_a_vae_it_works_on_normalised_latents():
    vae = wan_vae()
    pipeline = pipeline_of(wan(in_channels=12, out_channels=4), vae=vae)
    reference, poses = asked(2, 5, 16)
    signed = poses.transpose(1, 2) * 2 - 1
    condition = pipeline.encode_condition(signed, reference * 2 - 1)
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    still = (reference * 2 - 1)[:, :, None].repeat(1, 1, 5, 1, 1)
    expected = [(vae.encode(video).latent_dist.mean - mean) / std for video in (signed, still)]
    assert condition.shape == (2, 8, 2, 2, 2)
    torch.testing.assert_close(condition, torch.cat(expected, 1))
    frames = pipeline(reference, poses, num_inference_steps=1, generator=seeds(0, 1), output_type="pt").frames
    assert frames.shape == (2, 5, 3, 16, 16)
    x = torch.cat([torch.randn(1, 4, 2, 2, 2, generator=generator) for generator in seeds(0, 1)])
    velocity = pipeline.transformer(torch.cat([x, condition], 1), torch.full((2,), 1000.0), torch.zeros(2, 1, 8)).sample
    video = vae.decode((x - velocity) * std + mean).sample
    torch.testing.assert_close(frames, (video / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    for frames, size, message in ((4, 16, "multiple of 4 frames and one"), (5, 12, "multiples of 8")):
        with pytest.raises(ValueError, match=message):
            pipeline(*asked(1, frames, size))


@pytest.mark.parametrize("latent", [False, True])
def test_saving_and_loading_change_nothing(tmp_path, latent):
    model = wan(in_channels=12, out_channels=4) if latent else wan()
    pipeline, arguments = pipeline_of(model, vae=wan_vae() if latent else None), asked(1, 5, 16)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "PoseVideoPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"], "needs nothing of ours"
    again = PoseVideoPipeline.from_pretrained(tmp_path)
    assert (again.vae is None) != latent
    assert (tmp_path / "pipeline.py").read_text() == inspect.getsource(inspect.getmodule(PoseVideoPipeline))
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            state = getattr(again, name).state_dict()
            assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
    options = {"num_inference_steps": 2, "output_type": "pt"}
    ours, theirs = (p(*arguments, generator=seeds(0), **options).frames for p in (pipeline, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # how a file lies in memory changes a last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_text_to_video_model_is_widened_and_stays_what_it_is(dtype):
    model = wan(in_channels=4, out_channels=4).to(dtype)
    x, condition, time = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 8, 2, 4, 4), torch.tensor([30.0, 800.0])
    x, condition, text = x.to(dtype), condition.to(dtype), torch.zeros(2, 1, 8, dtype=dtype)
    before = model(x, time, text).sample
    pipeline = pipeline_of(model, vae=wan_vae())
    assert pipeline.transformer.config.in_channels == 12 and model.patch_embedding.weight.dtype == dtype
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(model(torch.cat([x, condition], 1), time, text).sample, before, **tolerance)
    with torch.enable_grad():
        model(torch.cat([x, condition], 1), time, text).sample.float().square().mean().backward()
    assert model.patch_embedding.weight.grad[:, 4:].any(), "the condition is learned"
    weight = model.patch_embedding.weight
    PoseVideoPipeline(model, pipeline.scheduler)
    assert model.patch_embedding.weight is weight, "once"
