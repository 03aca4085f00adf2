"""Networks that share the timesteps: which serves what, what pipelines see of them, saving, loading, and memory."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from tiny import DIT, UNET

from entrecipes import SlimUNet2DModel, TimestepExperts
from entrecipes.diffusion.pixel_vae import build_pixel_vae


def unets(count: int = 3, **config) -> list[UNet2DModel]:
    torch.manual_seed(0)
    return [UNet2DModel(**{**UNET["config"], **config}).eval() for _ in range(count)]


def dits(count: int = 2, **config) -> list[DiTTransformer2DModel]:
    torch.manual_seed(0)
    return [DiTTransformer2DModel(**{**DIT["config"], **config}).eval() for _ in range(count)]


def slim(channels: int) -> SlimUNet2DModel:
    torch.manual_seed(channels)
    return SlimUNet2DModel(**UNET["config"], widths={"down_blocks.0.resnets.0": channels}).eval()


@pytest.fixture
def three() -> TimestepExperts:
    return TimestepExperts(unets(), [700, 300]).eval()


def drawn(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


def test_a_boundary_belongs_to_the_noisier_one(three):
    served = {1000: 0, 700: 0, 699.99: 1, 300: 1, 299: 2, 0: 2, -5: 2, math.inf: 0, -math.inf: 2}
    assert {timestep: three.expert_for(timestep) for timestep in served} == served
    assert TimestepExperts(unets(1), []).expert_for(3) == 0
    edm = TimestepExperts(unets(2), [torch.tensor(0.3).item()])
    assert edm.expert_for(0.3) == edm.expert_for(torch.tensor(0.3).item()) == 0, "whatever precision it came in"
    assert edm.expert_for(0.2999999) == 1


@torch.no_grad()
@pytest.mark.parametrize("timestep", [700, 700.0, torch.tensor(700), torch.tensor([700]), torch.full((4,), 700.0)])
def test_one_timestep_is_one_call_of_one_expert(three, timestep):
    sample, labels = drawn(4)
    for boundary, number in ((700, 0), (701, 1)):
        three.boundaries[0] = boundary
        expected = three.experts[number](sample, torch.tensor(700), class_labels=labels).sample
        assert torch.equal(three(sample, timestep, class_labels=labels).sample, expected)
        assert torch.equal(three(sample, timestep, labels, return_dict=False)[0], expected)


def test_a_mixed_batch_is_split_with_its_labels_and_gradients_reach_their_experts(three):
    sample, labels = drawn(6)
    timesteps = torch.tensor([10, 900, 500, 20, 650, 990])
    sample.requires_grad_(True)
    output = three(sample, timesteps, class_labels=labels)
    assert type(output).__name__ == "UNet2DOutput"
    assert torch.equal(three(sample, timesteps, class_labels=labels, return_dict=False)[0], output.sample)
    for row, number in enumerate([2, 0, 1, 2, 1, 0]):
        expected = three.experts[number](sample[row : row + 1], timesteps[row], class_labels=labels[row : row + 1])
        torch.testing.assert_close(output.sample[row : row + 1], expected.sample, rtol=1e-4, atol=1e-5)
    output.sample[[1, 5]].sum().backward()
    assert three.experts[0].conv_in.weight.grad.abs().sum() > 0, "rows 1 and 5 are the first expert's"
    assert not any(p.grad.any() for e in list(three.experts)[1:] for p in e.parameters() if p.grad is not None)
    assert sample.grad[[1, 5]].abs().sum() > 0 and not sample.grad[[0, 2, 3, 4]].any()


@torch.no_grad()
def test_a_transformer_is_called_as_it_is():
    model = TimestepExperts(dits(), [500])
    sample, labels = drawn(4)
    timesteps = torch.tensor([900, 10, 500, 499])
    output = model(sample, timestep=timesteps, class_labels=labels)
    assert type(output).__name__ == "Transformer2DModelOutput" and model.config.patch_size == 2
    for row, number in enumerate([0, 1, 0, 1]):
        one = slice(row, row + 1)
        expected = model.experts[number](sample[one], timestep=timesteps[one], class_labels=labels[one]).sample
        torch.testing.assert_close(output.sample[one], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(sample, 900, class_labels=labels).sample, model(sample, torch.tensor(900), labels).sample)


@torch.no_grad()
def test_who_serves_can_be_chosen(three):
    sample, labels = drawn(2)
    with three.serving(1):
        chosen = three(sample, torch.tensor([math.nan, 999.0]).nan_to_num(5), class_labels=labels).sample
        with three.serving(None):
            usual = three(sample, torch.tensor(999), class_labels=labels).sample
    assert torch.equal(usual, three.experts[0](sample, torch.tensor(999), class_labels=labels).sample)
    assert torch.equal(chosen, three.experts[1](sample, torch.tensor([5.0, 999.0]), class_labels=labels).sample)
    assert torch.equal(three(sample, 999, class_labels=labels).sample, usual), "ended with the block"
    with pytest.raises(ValueError, match="expert 3: there are experts 0 to 2"), three.serving(3):
        pass


def test_what_can_not_be_routed_is_refused(three):
    sample, labels = drawn(3)
    for timestep in (math.nan, torch.tensor(math.nan), torch.tensor([1.0, math.nan, 2.0])):
        with pytest.raises(ValueError, match="timestep nan"):
            three(sample, timestep, class_labels=labels)
    with pytest.raises(ValueError, match="2 timesteps for 3 samples"):
        three(sample, torch.tensor([1, 2]), class_labels=labels)
    for boundaries, message in (
        ([300, 700], "descend"),
        ([300, 300], "descend"),
        ([700], "3 experts take 2 boundaries, not 1"),
        ([700, math.nan], "nan"),
    ):
        with pytest.raises(ValueError, match=message):
            TimestepExperts(unets(), boundaries)
    with pytest.raises(ValueError, match=r"experts differ in num_class_embeds: \[10, 5\]"):
        TimestepExperts(unets(1) + unets(1, num_class_embeds=5), [500])


def test_pipelines_see_one_model(three):
    config = three.config
    assert (config.sample_size, config.in_channels, config.out_channels, config.num_class_embeds) == (8, 1, 1, 10)
    assert three.dtype == torch.float32 and three.device.type == "cpu" and not three.training
    assert three.train().experts[2].training and three.to(torch.bfloat16).experts[1].dtype == three.dtype
    three.enable_gradient_checkpointing()
    assert three.is_gradient_checkpointing
    mixed = TimestepExperts([slim(4), *unets(1)], [500])
    assert mixed.config.in_channels == 1 and "widths" not in mixed.config, "what differs is no key of all"
    copied = copy.deepcopy(three)
    assert copied.boundaries == three.boundaries and copied.experts[0] is not three.experts[0]


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_it_stands_in_stock_pipelines(kind):
    """Of one network twice nothing changes, and of two each is called with its timesteps."""
    models, called = unets(2) if kind == "unet" else dits(2), []

    def record(number: int, inputs: tuple, named: dict) -> None:
        timestep = inputs[1] if len(inputs) > 1 else named["timestep"]
        called.append((number, timestep.reshape(-1)[0].item()))

    for number, model in enumerate(models):
        model.register_forward_pre_hook(lambda _, *given, number=number: record(number, *given), with_kwargs=True)

    def images(model) -> torch.Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        if kind == "unet":
            pipeline, asked = ConsistencyModelPipeline(model, scheduler), {"batch_size": 2}
        else:
            pipeline, asked = DiTPipeline(model, build_pixel_vae(1, 8), scheduler), {"guidance_scale": 2.0}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        asked |= {"class_labels": [1, 2], "num_inference_steps": 4, "generator": generator, "output_type": "np"}
        return torch.tensor(pipeline(**asked).images)

    alone, twice = images(models[0]), images(TimestepExperts([models[0], models[0]], [500]))
    assert torch.equal(alone, twice)
    called.clear()
    assert not torch.equal(images(TimestepExperts(models, [500])), alone)
    assert called == [(0, 750), (0, 500), (1, 250), (1, 0)]


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_to_the_bit_and_each_loads_alone(tmp_path):
    model = TimestepExperts([slim(4), *unets(1), slim(0)], [700, 300]).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = TimestepExperts.from_pretrained(tmp_path / "m")
    assert loaded.boundaries == [700, 300] and not loaded.training
    assert [type(expert).__name__ for expert in loaded.experts] == ["SlimUNet2DModel", "UNet2DModel", "SlimUNet2DModel"]
    sample, labels = drawn(3)
    timesteps = torch.tensor([900, 500, 100])
    expected = model(sample, timesteps, class_labels=labels).sample
    assert torch.equal(loaded(sample, timesteps, class_labels=labels).sample, expected)
    for cls, number in ((SlimUNet2DModel, 0), (UNet2DModel, 1)):
        alone = cls.from_pretrained(tmp_path / "m", subfolder=f"expert_{number}")
        assert all(map(torch.equal, alone.parameters(), model.experts[number].parameters()))
    inside = TimestepExperts.from_pretrained(tmp_path, subfolder="m")
    assert torch.equal(inside(sample, timesteps, class_labels=labels).sample, expected)
    loaded.save_pretrained(tmp_path / "m")  # over itself
    assert TimestepExperts.from_pretrained(tmp_path / "m").config.expert_configs == model.config.expert_configs


def test_options_of_diffusers_pass_through(three, tmp_path):
    three.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    assert list((tmp_path / "expert_1").glob("*fp16-00001*"))
    loaded = TimestepExperts.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    assert {expert.dtype for expert in loaded.experts} == {torch.bfloat16}
    with pytest.raises(ValueError, match="expert_0: this expert can't be loaded"):
        TimestepExperts.from_pretrained(tmp_path)


def change_config(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def swap(folder: Path) -> None:
    shutil.move(folder / "expert_0", folder / "aside")
    shutil.move(folder / "expert_1", folder / "expert_0")
    shutil.move(folder / "aside", folder / "expert_1")


DAMAGE = {
    "expert_1: missing, one of 3": lambda f: shutil.rmtree(f / "expert_1"),
    "expert_2: this expert can't be loaded": lambda f: next((f / "expert_2").glob("*.safetensors")).unlink(),
    "expert_0: this expert can't be loaded": lambda f: next((f / "expert_0").glob("*.safetensors")).write_bytes(b"x"),
    "expert_3: one too many for the 3 experts": lambda f: shutil.copytree(f / "expert_1", f / "expert_3"),
    "expert_02: one too many": lambda f: shutil.copytree(f / "expert_1", f / "expert_02"),
    r"expert_0: another model's expert \(_class_name is UNet2DModel, not SlimUNet2DModel\)": swap,
    r"expert_1: another model's expert \(num_class_embeds is 5, not 10\)": lambda f: unets(1, num_class_embeds=5)[
        0
    ].save_pretrained(f / "expert_1"),
    r"expert_2: another model's expert \(widths is": lambda f: slim(4).save_pretrained(f / "expert_2"),
    "expert_1: its weights are another model's|expert_1: this expert can't": lambda f: shutil.copyfile(
        f / "expert_0/diffusion_pytorch_model.safetensors", f / "expert_1/diffusion_pytorch_model.safetensors"
    ),
    "expert_1: no model class Nonesuch": lambda f: change_config(
        f, expert_configs=[{"_class_name": name} for name in ("SlimUNet2DModel", "Nonesuch", "SlimUNet2DModel")]
    ),
    "has no boundaries": lambda f: (
        change_config(f, expert_configs=None) or shutil.copyfile(f / "expert_1/config.json", f / "config.json")
    ),
    "2 experts take 1 boundaries|3 experts take 2 boundaries": lambda f: change_config(f, boundaries=[5]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_wrong_folder_is_named(message, tmp_path):
    TimestepExperts([slim(4), *unets(1), slim(2)], [700, 300]).save_pretrained(tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        TimestepExperts.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value) or "boundaries" in message
    assert "\n" not in str(raised.value)


def test_a_folder_that_holds_more_experts_is_not_saved_into(three, tmp_path):
    three.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expert_2: of another model"):
        TimestepExperts(unets(2), [5]).save_pretrained(tmp_path)
    with pytest.raises(OSError):
        TimestepExperts.from_pretrained(tmp_path / "nothing")


def test_a_stock_pipeline_of_experts_needs_no_entrecipes(three, tmp_path):
    """The source lies in the component's folder, where diffusers finds it."""
    pipeline = ConsistencyModelPipeline(three, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    asked = {"batch_size": 1, "class_labels": [3], "num_inference_steps": 3, "output_type": "pt"}
    torch.save(pipeline(**asked, generator=torch.Generator().manual_seed(0)).images, tmp_path / "expected.pt")
    pipeline.save_pretrained(tmp_path / "p")
    code = f"""
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained("p", trust_remote_code=True)
images = pipeline(**{asked}, generator=torch.Generator().manual_seed(0)).images
assert torch.equal(images, torch.load("expected.pt"))
pipeline.save_pretrained("again")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert TimestepExperts.from_pretrained(tmp_path / "again" / "unet").boundaries == [700, 300]


@torch.no_grad()
def test_idle_experts_wait_on_the_cpu_and_move_when_a_border_is_crossed(three, monkeypatch):
    moves, to = [], UNet2DModel.to
    numbers = {id(expert): number for number, expert in enumerate(three.experts)}

    def recorded(self, *args, **kwargs):
        moves.append((numbers[id(self)], str(args[0])))
        return to(self, "cpu")  # there is no other device here; what counts is who is sent where

    sample, labels = drawn(1)
    expected = [three(sample, timestep, class_labels=labels).sample for timestep in range(999, 0, -111)]
    monkeypatch.setattr(UNet2DModel, "to", recorded)
    three.enable_expert_offload("cuda")
    assert moves == [(0, "cpu"), (1, "cpu"), (2, "cpu")] and three.device == torch.device("cuda")
    moves.clear()
    found = [three(sample, timestep, class_labels=labels).sample for timestep in range(999, 0, -111)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert moves == [(0, "cuda"), (0, "cpu"), (1, "cuda"), (1, "cpu"), (2, "cuda")]
    moves.clear()
    three.to("cuda:1")
    assert {device for _, device in moves} == {"cpu"} and str(three.device) == "cuda:1", "the others stay"
    moves.clear()
    three(sample, 500, class_labels=labels)
    assert moves == [(1, "cuda:1")]
    monkeypatch.undo()
    three._onload = torch.device("cpu")
    three.to(torch.bfloat16)
    assert {expert.dtype for expert in three.experts} == {torch.bfloat16}
    three.disable_expert_offload()
    assert three.device.type == "cpu" and three.to("meta").experts[1].device.type == "meta", "all of them again"


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_experts_leave_the_memory_of_the_gpu():
    model = TimestepExperts(unets(3, block_out_channels=[64, 64]), [700, 300]).eval()
    one = sum(parameter.nbytes for parameter in model.experts[0].parameters())
    sample, labels = drawn(2)
    expected = model.to("cuda")(sample.cuda(), 500, class_labels=labels.cuda()).sample
    before = torch.cuda.memory_allocated()
    model.enable_expert_offload("cuda")
    for timestep in (999, 500, 10):
        found = model(sample.cuda(), timestep, class_labels=labels.cuda()).sample
        assert torch.cuda.memory_allocated() < before - 1.5 * one
        assert sum(expert.device.type == "cuda" for expert in model.experts) == 1
        if timestep == 500:
            assert torch.equal(found, expected)
