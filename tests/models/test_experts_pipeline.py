"""Sampling with experts: against one network and stock pipelines, by every solver, mixed, from images, published."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from PIL import Image
from tiny import DIT, UNET

from entrecipes import ExpertsPipeline, SlimDiTTransformer2DModel, TimestepExperts
from entrecipes.diffusion.pixel_vae import build_pixel_vae

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++ trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "unipc trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm++ order 3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ flow": ("DPMSolverMultistepScheduler", FLOW),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "edm euler": ("EDMEulerScheduler", {}),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", {}),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}


def solver(name: str) -> Any:
    kind, config = SOLVERS[name]
    return getattr(diffusers, kind)(**config)


class Small(ModelMixin, ConfigMixin):
    """A denoiser that costs nothing, so that a thousand steps don't either: a convolution, a bias by its number.

    It writes down what it is called with.
    """

    @register_to_config
    def __init__(self, number: int = 0, weight: float = 0.1, sample_size: int = 4, in_channels: int = 1) -> None:
        super().__init__()
        self.register_to_config(out_channels=in_channels)
        self.conv = torch.nn.Conv2d(in_channels, in_channels, 3, padding=1)
        torch.nn.init.constant_(self.conv.weight, weight / 9)
        torch.nn.init.constant_(self.conv.bias, number)
        self.number, self.called = number, []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels=None, return_dict: bool = True):
        self.called.append((self.number, timestep[0].item()))
        return (self.conv(sample) * torch.cos(timestep / 500)[:, None, None, None],)


def quiet(pipeline: DiffusionPipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(models: list[ModelMixin], boundaries: list[float], scheduler: Any, vae: Any = None) -> ExpertsPipeline:
    scheduler = type(scheduler).from_config(scheduler.config)  # without the history of another
    return quiet(ExpertsPipeline(TimestepExperts(models, boundaries).eval(), scheduler, vae))


def seed(*numbers: int) -> list[torch.Generator] | torch.Generator:
    made = [torch.Generator().manual_seed(number) for number in numbers]
    return made if len(made) > 1 else made[0]


def unets(count: int = 1, **config) -> list[UNet2DModel]:
    torch.manual_seed(0)
    return [UNet2DModel(**{**UNET["config"], **config}).eval() for _ in range(count)]


def dits(count: int = 1, **config) -> list[DiTTransformer2DModel]:
    torch.manual_seed(0)
    return [DiTTransformer2DModel(**{**DIT["config"], **config}).eval() for _ in range(count)]


def thirds(scheduler: Any, steps: int) -> list[float]:
    """Two borders that the solver crosses, where there are steps enough: one at a timestep, one between two."""
    scheduler.set_timesteps(steps)
    times = sorted(set(scheduler.timesteps.tolist()), reverse=True)
    if len(times) < 3:
        return [times[-1] + 1.0, times[-1]]
    middle = len(times) // 2
    return [times[middle - 1], (times[middle] + times[middle + 1]) / 2]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7, 8])
def test_equal_experts_are_one_model_to_the_bit(name, steps):
    """History, second stages and noise cross the borders; each call is served by whom the timestep says."""
    one = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (model,) = unets(**one)
    asked = {"class_labels": [1, 2], "num_inference_steps": steps, "output_type": "pt"}
    alone = pipeline_of([model], [], solver(name))(**asked, generator=seed(0)).images
    several = pipeline_of([model] * 3, thirds(solver(name), steps), solver(name))
    assert torch.equal(several(**asked, generator=seed(0)).images, alone)
    assert torch.isfinite(alone).all() and (steps == 1 or alone.std() > 0.01)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_is_called_for_its_timesteps_alone(name):
    scheduler, models = solver(name), [Small(number) for number in range(3)]
    first, second = thirds(scheduler, 6)
    scheduler.set_timesteps(6)
    expected = [(0 if t >= first else 1 if t >= second else 2, t) for t in scheduler.timesteps.tolist()]
    called = []
    for model in models:
        model.called = called
    pipeline_of(models, [first, second], scheduler)(num_inference_steps=6, generator=seed(0))
    assert called == expected and [number for number, _ in called] == sorted(number for number, _ in called)
    assert {number for number, _ in called} == {0, 1, 2}


@pytest.mark.parametrize("name", ["ddim", "dpm++ trailing", "heun", "unipc trailing", "edm dpm", "flow euler"])
def test_a_thousand_steps_and_one(name):
    """Other spacings than `trailing` repeat a timestep of the thousand, which divides multistep solvers by zero."""
    times = thirds(solver(name), 1000)
    alone = pipeline_of([Small()], [], solver(name))(num_inference_steps=1000, generator=seed(0), output_type="pt")
    assert torch.isfinite(alone.images).all()
    models = [Small() for _ in range(3)]
    many = pipeline_of(models, times, solver(name))
    assert torch.equal(many(num_inference_steps=1000, generator=seed(0), output_type="pt").images, alone.images)
    counts = [len(model.called) for model in models]
    assert sum(counts) == {"heun": 1999}.get(name, 1000) and min(counts) >= 1
    many(num_inference_steps=1, generator=seed(0))
    assert sum(len(model.called) for model in models) == sum(counts) + 1


def test_the_order_shows_in_what_comes_out():
    """Euler along a flow of constants sums each expert's constant over its share of time."""
    models = [Small(number, weight=0.0) for number in (1, 2, 3)]
    for model in models:
        model.forward = lambda sample, timestep, number=model.number, **_: (torch.full_like(sample, number),)
    pipeline = pipeline_of(models, [800, 300], FlowMatchEulerDiscreteScheduler())
    grid = {"sigmas": [1.0, 0.8, 0.5, 0.3, 0.2]}
    found = pipeline(**grid, generator=seed(0), output_type="latent").images
    start = torch.randn(1, 1, 4, 4, generator=seed(0))
    torch.testing.assert_close(
        found, start - (1 * 0.5 + 2 * 0.3 + 2 * 0.0 + 1 * 0.0) - 3 * 0.2 + 0.0, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), DDPMScheduler(), EDMEulerScheduler(), DPMSolverMultistepScheduler()]
)
@pytest.mark.parametrize("kind", ["pt", "np", "pil"])
def test_one_unet_samples_what_the_stock_pipeline_does(scheduler, kind):
    (model,) = unets(in_channels=3, out_channels=3)
    asked = {"class_labels": [1, 2], "batch_size": 2, "num_inference_steps": 3, "output_type": kind}
    stock = quiet(ConsistencyModelPipeline(model, type(scheduler).from_config(scheduler.config)))
    expected = stock(**asked, generator=seed(0)).images
    (found,) = pipeline_of([model], [], scheduler)(**asked, generator=seed(0), return_dict=False)
    assert np.array_equal(np.stack([np.asarray(a) for a in found]), np.stack([np.asarray(a) for a in expected]))


def latent_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    blocks = {"block_out_channels": (4, 8), "norm_num_groups": 2}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(3, 3, down, up, latent_channels=2, scaling_factor=0.3, **blocks).eval()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("case", ["pixels", "latents", "learned variance"])
def test_one_transformer_samples_what_the_stock_pipeline_does(case, guidance):
    channels = 1 if case == "pixels" else 2
    variance = {"out_channels": 4} if case == "learned variance" else {"out_channels": channels}
    (model,) = dits(in_channels=channels, **variance)
    vae = build_pixel_vae(1, 8) if case == "pixels" else latent_vae()
    for scheduler in (
        DDIMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
    ):
        asked = {"class_labels": [3, 5], "guidance_scale": guidance, "num_inference_steps": 3}
        stock = quiet(DiTPipeline(model, vae, type(scheduler).from_config(scheduler.config)))
        expected = stock(**asked, generator=seed(0), output_type="np").images
        ours = pipeline_of([model], [], scheduler, vae)
        assert np.array_equal(ours(**asked, generator=seed(0), output_type="np").images, expected)
        latents = ours(**asked, generator=seed(0), output_type="latent").images
        assert latents.shape == (2, channels, 8, 8)
    if case == "pixels":  # the identity can be left out
        bare = pipeline_of([model], [], scheduler)(**asked, generator=seed(0), output_type="np").images
        np.testing.assert_allclose(bare, expected, rtol=0, atol=1e-4)


def test_a_learned_variance_reaches_the_scheduler_that_asks_for_it():
    (model,) = dits(in_channels=1, out_channels=2)
    fixed, learned = DDPMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False, variance_type="learned_range")
    asked = {"class_labels": [3], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    found = [pipeline_of([model], [], kind)(**asked, generator=seed(0)).images for kind in (fixed, learned)]
    assert not torch.equal(*found) and all(torch.isfinite(images).all() for images in found)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "lms"])
def test_an_image_depends_on_its_own_generator_alone(name):
    pipeline = pipeline_of(unets(2), [500], solver(name))
    asked = {"num_inference_steps": 4, "output_type": "pt"}
    if "generator" not in inspect.signature(pipeline.scheduler.step).parameters:
        assert name not in ("ddpm", "dpm++ sde", "euler ancestral")
    together = pipeline(class_labels=[1, 2, 3], generator=seed(5, 6, 7), **asked).images
    alone = pipeline(class_labels=[3], generator=[seed(7)], **asked).images
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-3)


def test_mixing_says_who_serves_which_steps():
    def served(scheduler=None, **options) -> list[int]:
        models = [Small(number) for number in range(3)]
        called = []
        for model in models:
            model.called = called
        pipeline_of(models, [700, 300], scheduler or DDIMScheduler(clip_sample=False))(**options)
        return [number for number, _ in called]

    assert served(num_inference_steps=4) == [0, 1, 2, 2], "timesteps 750, 500, 250, 0"
    assert served(num_inference_steps=4, experts=[2, 0, 0, 1]) == [2, 0, 0, 1]
    assert served(num_inference_steps=10, shares=[0.5, 0.2, 0.3]) == [0] * 5 + [1] * 2 + [2] * 3
    assert served(num_inference_steps=10, shares=[0, 1, 0]) == [1] * 10
    assert served(num_inference_steps=3, shares=[0.9, 0.05, 0.05]) == [0, 0, 0]
    assert served(HeunDiscreteScheduler(), num_inference_steps=3, experts=[0, 2, 1]) == [0, 0, 2, 2, 1]
    assert served(HeunDiscreteScheduler(), num_inference_steps=3, experts=[0, 1, 2, 1, 0]) == [0, 1, 2, 1, 0]
    image = {"image": torch.rand(1, 1, 4, 4), "strength": 0.5, "num_inference_steps": 4}
    assert served(**image) == [2, 2] and served(**image, experts=[0, 1, 2, 0]) == [2, 0]
    for options, message in (
        ({"experts": [0, 1]}, "give one of 0 to 2 for each of 4 steps or 4 calls"),
        ({"experts": [0, 1, 2, 3]}, "give one of 0 to 2"),
        ({"shares": [0.5, 0.5]}, "give 3, one an expert, that sum to 1"),
        ({"shares": [0.5, 0.7, -0.2]}, "sum to 1"),
        ({"shares": [0.5, 0.5, float("nan")]}, "sum to 1"),
        ({"shares": [1, 0, 0], "experts": [0] * 4}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            served(num_inference_steps=4, **options)


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "ddpm",
        "dpm++",
        "heun",
        "unipc",
        "euler",
        "edm euler",
        "edm dpm",
        "flow euler",
        "flow heun",
        "dpm++ flow",
    ],
)
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_an_image_is_noised_to_the_level_where_sampling_starts(name, strength):
    """What the network is given is the image with the noise of that level, and what it takes it for comes out."""
    image = torch.rand(2, 1, 4, 4, generator=seed(3))
    models, scheduler = [Small(0), Small(1)], solver(name)
    pipeline = pipeline_of(models, [0.0], scheduler)
    given = []
    for model in models:
        model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[:2]))
    pipeline(image=image, strength=strength, num_inference_steps=8, generator=seed(0), output_type="latent")
    sample, timestep = given[0]
    noise, x0 = torch.randn(2, 1, 4, 4, generator=seed(0)), image * 2 - 1
    times = type(scheduler).from_config(scheduler.config)
    times.set_timesteps(8)
    steps = {0.01: 1, 0.5: 4, 1.0: 8}[strength]
    assert len(given) == {"heun": 2 * steps - 1, "flow heun": 2 * steps - 1}.get(name, steps)
    assert timestep[0] == times.timesteps[len(times.timesteps) - len(given)]
    a, b = level(name, pipeline.scheduler, timestep[0])
    torch.testing.assert_close(sample, a * x0 + b * noise, rtol=2e-3, atol=2e-3)


def level(name: str, scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """What the network sees of image and noise at a timestep, by the definition of the three kinds of noise."""
    if "flow" in name:
        time = float(timestep) / 1000
        return 1 - time, time
    if "edm" in name:
        sigma = float(torch.exp(4 * timestep))
        scale = (sigma**2 + 0.5**2) ** -0.5
        return scale, scale * sigma
    alpha = np.interp(float(timestep), range(1000), scheduler.alphas_cumprod.numpy())
    return alpha**0.5, (1 - alpha) ** 0.5


@torch.no_grad()
def test_images_pass_the_vae_and_come_in_all_kinds():
    pipeline = pipeline_of(
        dits(2, in_channels=2, out_channels=2), [500], DDIMScheduler(clip_sample=False), latent_vae()
    )
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=seed(2)) / 255
    images = [Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()) for image in pixels]
    asked = {"class_labels": [1, 2], "strength": 0.6, "num_inference_steps": 5, "output_type": "pt"}
    expected = pipeline(image=pixels, **asked, generator=seed(0)).images
    assert expected.shape == (2, 3, 16, 16)
    for given in (images, [image.convert("RGBA") for image in images], pixels.permute(0, 2, 3, 1).numpy()):
        assert torch.allclose(pipeline(image=given, **asked, generator=seed(0)).images, expected, atol=1e-5)
    first = pipeline(image=images[0], **{**asked, "class_labels": [1]}, generator=seed(0)).images
    several = pipeline(image=images[0], **{**asked, "class_labels": [1, 1]}, generator=seed(0, 0)).images
    torch.testing.assert_close(several, first.expand(2, -1, -1, -1), rtol=1e-3, atol=1e-4)
    large = images[0].resize((32, 32), Image.Resampling.NEAREST)
    assert pipeline(image=large, **{**asked, "class_labels": [1]}).images.shape == (1, 3, 16, 16)
    latents = pipeline._encode(pixels)
    torch.testing.assert_close(latents, pipeline.vae.encode(pixels * 2 - 1).latent_dist.mode() * 0.3)
    four = pipeline_of([Small(in_channels=4)], [], DDIMScheduler())
    assert four._encode(torch.zeros(1, 4, 4, 4)).unique().tolist() == [-1], "four channels are no latents"


def test_what_does_not_fit_is_refused():
    unet, dit = pipeline_of(unets(2), [500], DDIMScheduler()), pipeline_of(dits(2), [500], DDIMScheduler())
    image = torch.rand(1, 1, 8, 8)
    for pipeline, options, message in (
        (unet, {}, "class_labels: one an image"),
        (pipeline_of([Small()], [], DDIMScheduler()), {"class_labels": [1]}, "there are no classes"),
        (unet, {"class_labels": [10]}, "from 0 to 9"),
        (dit, {"class_labels": [-1]}, "from 0 to 999"),
        (unet, {"class_labels": [1, 2, 3], "batch_size": 2}, r"for \[2, 3\] images"),
        (unet, {"class_labels": [1, 2], "batch_size": 1}, r"for \[1, 2\] images"),
        (unet, {"class_labels": [1, 2, 3], "generator": seed(1, 2)}, "images"),
        (unet, {"class_labels": [1, 2], "generator": [seed(1)]}, "generator: 1 for 2 images"),
        (unet, {"class_labels": [1], "guidance_scale": 2.0}, "no null label"),
        (unet, {"class_labels": [1], "output_type": "gif"}, "output_type 'gif'"),
        (unet, {"class_labels": [1], "sigmas": [3.0, 1.0]}, "sigmas: DDIMScheduler makes its own"),
        (unet, {"class_labels": [1], "image": image, "strength": 0.0}, "strength 0.0"),
        (unet, {"class_labels": [1], "image": image, "strength": 1.1}, "strength 1.1"),
        (unet, {"class_labels": [1], "image": torch.rand(1, 3, 8, 8)}, "3 channels, but the experts know images of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(num_inference_steps=2, **options)
    with pytest.raises(ValueError, match="variant"):
        unet.save_pretrained("nowhere", variant="fp16")
    assert not Path("nowhere").exists()


def test_one_label_or_a_grid_of_ones_own():
    pipeline = pipeline_of(unets(2), [500], DDPMScheduler())
    asked = {"num_inference_steps": 3, "output_type": "pt"}
    found = [
        pipeline(class_labels=labels, batch_size=2, generator=seed(0), **asked).images
        for labels in (3, [3], [3, 3], torch.tensor(3), torch.tensor([3, 3]))
    ]
    assert all(torch.equal(images, found[0]) for images in found[1:])
    pipeline(class_labels=3, timesteps=[900, 500, 100])
    assert pipeline.scheduler.timesteps.tolist() == [900, 500, 100]
    assert isinstance(pipeline(class_labels=3, num_inference_steps=1).images[0], Image.Image)


def test_saved_it_loads_here_as_our_classes_and_elsewhere_without_us(tmp_path):
    slim = SlimDiTTransformer2DModel(**DIT["config"], widths={"transformer_blocks.0.attn1": 1}).eval()
    pipeline = pipeline_of([slim, *dits()], [500], DPMSolverMultistepScheduler(), build_pixel_vae(1, 8))
    asked = {"class_labels": [3], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    pipeline.save_pretrained(tmp_path / "p")
    for loaded in (ExpertsPipeline.from_pretrained(tmp_path / "p"), DiffusionPipeline.from_pretrained(tmp_path / "p")):
        assert type(loaded) is ExpertsPipeline and type(loaded.denoiser) is TimestepExperts
        assert type(loaded.denoiser.experts[0]) is SlimDiTTransformer2DModel
        torch.save(quiet(loaded)(**asked, generator=seed(0)).images, tmp_path / "expected.pt")
    half = ExpertsPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16, vae=None)
    assert half.denoiser.experts[1].dtype == torch.bfloat16 and half.vae is None
    assert quiet(half)(**asked).images.dtype == torch.bfloat16 and len(half(class_labels=[1]).images) == 1
    code = f"""
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained("p", custom_pipeline="p", trust_remote_code=True)
images = pipeline(**{asked}, generator=torch.Generator().manual_seed(0)).images
assert torch.equal(images, torch.load("expected.pt"))
pipeline.save_pretrained("again")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = quiet(ExpertsPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(again(**asked, generator=seed(0)).images, torch.load(tmp_path / "expected.pt"))


def test_all_experts_leave_the_device_together_or_one_by_one(monkeypatch):
    """Under `enable_model_cpu_offload` the hook moves the model, and with idle experts offloaded only who serves."""
    pipeline, moves = pipeline_of(unets(2), [500], DDIMScheduler(clip_sample=False)), []
    experts = list(pipeline.denoiser.experts)
    expected = pipeline(class_labels=[1], num_inference_steps=4, generator=seed(0), output_type="pt").images
    to = UNet2DModel.to
    monkeypatch.setattr(
        UNet2DModel, "to", lambda self, device: moves.append((experts.index(self), str(device))) or to(self, "cpu")
    )
    pipeline.denoiser.enable_expert_offload("cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    moves.clear()
    found = pipeline(class_labels=[1], num_inference_steps=4, generator=seed(0), output_type="pt").images
    assert torch.equal(found, expected)
    assert [move for move in moves if move[1] == "cpu:0"] == [(0, "cpu:0"), (1, "cpu:0")], "a border, one move"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu():
    pipeline = pipeline_of(unets(2), [500], DPMSolverMultistepScheduler()).to("cuda")
    asked = {"class_labels": [1, 2], "num_inference_steps": 8, "generator": seed(0), "output_type": "latent"}
    pipeline(**asked)
    predict = pipeline._predict

    def strict(*args: Any) -> torch.Tensor:  # from the first call on; what comes before happens once
        prediction = predict(*args)
        torch.cuda.set_sync_debug_mode("error")
        return prediction

    pipeline._predict = strict
    try:
        images = pipeline(**asked).images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(images).all()
