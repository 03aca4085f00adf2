"""Converted DiT and SiT do what the originals do, written here from the papers (Peebles & Xie 2023; Ma et al. 2024)."""

from __future__ import annotations

import argparse
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMapEulerDiscreteScheduler
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import save_file

from entrecipes.diffusion.convert import convert_dit, convert_transformer, read_checkpoint
from entrecipes.diffusion.pipelines import load_components
from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.diffusion.time_embedding import diffusers_embedding, fit_time_embedding, original_embedding
from entrecipes.errors import UserError
from entrecipes.recipe.pipeline import Pipeline

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_dit.py"
HEADS = 4
SHRINK = 3000.0
FAST = 80
"""DiT's sinusoids below this index turn too fast for a narrow network to take over; at width 1152 all are taken."""


def positions(width: int, side: int) -> torch.Tensor:
    """Fixed sine-cosine positions [1, side^2, width]: columns in the first half of the channels, rows in the second."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    both = torch.cat([one.repeat(side, 1), one.repeat_interleave(side, dim=0)], dim=1)
    return both[None].float()


def random_weights(width=64, depth=2, channels=3, out=6, side=4, patch=2, classes=10, slow=True) -> dict:
    """A state dict of the original, with random values also where training starts from zero."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "x_embedder.proj": (width, channels, patch, patch),
        "final_layer.linear": (patch * patch * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        sizes[f"blocks.{i}.attn.qkv"], sizes[f"blocks.{i}.attn.proj"] = (3 * width, width), (width, width)
        sizes[f"blocks.{i}.mlp.fc1"], sizes[f"blocks.{i}.mlp.fc2"] = (4 * width, width), (width, 4 * width)
        sizes[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    state = {}
    for name, size in sizes.items():
        state[f"{name}.weight"] = torch.randn(size, generator=generator) / math.prod(size[1:]) ** 0.5
        state[f"{name}.bias"] = torch.randn(size[0], generator=generator) * 0.1
    if slow:
        state["t_embedder.mlp.0.weight"].view(width, 2, 128)[:, :, :FAST] = 0
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=generator)
    return state | {"pos_embed": positions(width, side)}


def original(state: dict, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, heads: int = HEADS):
    """The forward pass of DiT: `x` [n, c, h, w], its own `time` [n], `labels` [n] -> [n, out, h, w]."""

    def layer(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    weight = state["x_embedder.proj.weight"]
    patch, width = weight.shape[-1], len(weight)
    h = F.conv2d(x, weight, state["x_embedder.proj.bias"], stride=patch).flatten(2).mT + state["pos_embed"]
    angles = time[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t = layer("t_embedder.mlp.2", F.silu(layer("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    c = F.silu(t + state["y_embedder.embedding_table.weight"][labels])
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        block = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = layer(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        three = layer(f"{block}.attn.qkv", norm(h, shift, scale)).unflatten(-1, (3, heads, width // heads))
        q, k, v = three.permute(2, 0, 3, 1, 4)
        attended = (torch.softmax(q @ k.mT / (width // heads) ** 0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
        h = h + gate[:, None] * layer(f"{block}.attn.proj", attended)
        hidden = F.gelu(layer(f"{block}.mlp.fc1", norm(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * layer(f"{block}.mlp.fc2", hidden)
    h = layer("final_layer.linear", norm(h, *layer("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)))
    side = x.shape[-1] // patch
    h = h.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [n, rows, columns, p, p, out]
    return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, side * patch, side * patch)


def velocity(state: dict, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, heads: int = HEADS):
    """SiT's prediction of data - noise at its time, 1 for the data; the second half of the channels is dropped."""
    return original(state, x, time, labels, heads)[:, : x.shape[1]]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("out", [3, 6])
def test_a_dit_predicts_as_the_original(out):
    state = random_weights(out=out)
    model = convert_transformer(state, "dit", num_attention_heads=HEADS)
    times = torch.tensor([0, 1, 57, 500, 998, 999])
    x, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 9, 10, 5])
    found = model(x, timestep=times, class_labels=labels).sample
    assert difference(found, original(state, x, times, labels)) < 1e-5
    assert model.config.out_channels == out and model.config.sample_size == 8
    assert difference(found, original(state, x, times * 0.95, labels)) > 1e-3, "the time must matter"


def test_every_label_beyond_the_classes_is_no_class():
    state = random_weights()
    model = convert_transformer(state, "dit", num_attention_heads=HEADS)
    x, times = torch.randn(2, 3, 8, 8), torch.tensor([500, 500])
    found = model(x, timestep=times, class_labels=torch.tensor([11, 1000])).sample
    assert difference(found, original(state, x, times, torch.tensor([10, 10]))) < 1e-5


@pytest.mark.parametrize("out", [3, 6])
def test_a_sit_predicts_the_velocity_backwards_at_all_times(out):
    state = random_weights(out=out, slow=False)
    model = convert_transformer(state, "sit", num_attention_heads=HEADS)
    timesteps = torch.tensor([0, 0.3, 17.25, 250, 499.9, 731, 999, 1000], dtype=torch.float64)
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    found = model(x, timestep=timesteps, class_labels=labels).sample
    assert difference(-found, velocity(state, x, 1 - timesteps / 1000, labels)) < 1e-5
    assert difference(-found, velocity(state, x, 1 - timesteps / 1000 + 0.01, labels)) > 1e-4, "the time must matter"


def test_a_dit_as_wide_as_the_published_needs_no_slow_time():
    state = random_weights(width=1152, depth=1, channels=4, out=8, classes=1000, slow=False)
    state["t_embedder.mlp.0.weight"] *= 0.3  # to 0.02, as both papers' code starts it
    model = convert_transformer(state, "dit")
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (16, 72)
    times, labels = torch.arange(0, 1000, 90), torch.arange(12) * 90
    x = torch.randn(12, 4, 8, 8)
    found = model(x, timestep=times, class_labels=labels).sample
    assert difference(found, original(state, x, times, labels, heads=16)) < 1e-4


@torch.no_grad()
def test_the_time_embedding_says_how_exact_it_is():
    torch.manual_seed(0)
    layers = TimestepEmbedding(256, 384)
    timesteps = torch.arange(1000.0)
    for kind, low, high in (("dit", 0.01, 0.3), ("sit", 1e-8, 1e-5)):
        wanted = layers(original_embedding(timesteps, kind))
        spread = (wanted - wanted.mean(0)).norm()
        fitted, error = fit_time_embedding(layers, kind)
        found = (fitted(diffusers_embedding(timesteps)) - wanted).norm() / spread
        copied = (layers(diffusers_embedding(timesteps)) - wanted).norm() / spread
        assert low < error < high and found == pytest.approx(error, rel=0.5)
        assert copied > 0.3, "copying the weights is what must not be done"


def sample(pipeline, labels: list[int], steps: int, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The start and the samples of a pipeline whose VAE shrinks them so much that nothing is clamped."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(3))
    asked = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    images = pipeline(labels, **asked).images
    assert 0 < images.min() and images.max() < 1
    return start, (images - 0.5) * 2 * SHRINK


def pipeline_of(state: dict, kind: str, **parts):
    vae = build_pixel_vae(3, 8)
    vae.register_to_config(scaling_factor=SHRINK)
    return convert_dit(state, kind, vae=vae, num_attention_heads=HEADS, **parts)


def test_a_dit_samples_with_ddim_as_by_hand():
    state, guidance, steps = random_weights(), 2.0, 8
    pipeline = pipeline_of(state, "dit")
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    x, found = sample(pipeline, [3, 7], steps, guidance)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t in range(1000 - 1000 // steps, -1, -1000 // steps):
        time = torch.full((2,), t)
        given, free = (original(state, x, time, torch.tensor(labels))[:, :3] for labels in ([3, 7], [10, 10]))
        noise = free + guidance * (given - free)
        before = signal[t - 1000 // steps] if t else torch.tensor(1.0)
        clean = (x - (1 - signal[t]).sqrt() * noise) / signal[t].sqrt()
        x = (before.sqrt() * clean + (1 - before).sqrt() * noise).float()
    assert difference(found, x) < 1e-3


@pytest.mark.parametrize("whole", [False, True], ids=["euler", "dpm-solver of order 1, whole timesteps"])
def test_a_sit_samples_as_by_hand(whole):
    state, steps = random_weights(slow=False), 10
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = DPMSolverMultistepScheduler(solver_order=1, **flow) if whole else FlowMapEulerDiscreteScheduler()
    x, found = sample(pipeline_of(state, "sit", scheduler=scheduler), [3, 7], steps, 1.0)
    sigmas = torch.linspace(0.999 if whole else 1, 0, steps + 1, dtype=torch.float64)
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        time = 1 - math.floor(1000 * now) / 1000 if whole else 1 - now
        x = x + (now - after).float() * velocity(state, x, torch.full((2,), float(time)), torch.tensor([3, 7]))
    assert difference(found, x) < 1e-3


def test_the_default_flow_sampler_solves_the_original_ode():
    state, labels, steps = random_weights(slow=False), torch.tensor([3, 7]), 200
    pipeline = pipeline_of(state, "sit")
    x, found = sample(pipeline, labels.tolist(), 50, 1.0)
    for i in range(steps):  # Heun's method, from the noise at time 0 to the data at 1
        now, after = (torch.full((2,), (i + j) / steps) for j in (0, 1))
        slope = velocity(state, x, now, labels)
        x = x + (slope + velocity(state, x + slope / steps, after, labels)) / (2 * steps)
    assert difference(found, x) < 0.02


def change(**changes) -> dict:
    state = random_weights()
    for name, value in changes.items():
        state[name.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("state", "heads", "words"),
    [
        ({}, HEADS, "x_embedder.proj.weight, pos_embed or"),
        ({k: v for k, v in random_weights().items() if "1.mlp" not in k}, HEADS, "missing: blocks.1.mlp.fc1.weight"),
        ({k: v for k, v in random_weights().items() if "blocks" not in k}, HEADS, "missing: blocks.0.attn.qkv.weight"),
        (change(projectors__0__weight=torch.zeros(2, 2)), HEADS, "unknown: projectors.0.weight"),
        (change(blocks__0__mlp__fc1__bias=torch.zeros(5)), HEADS, "another shape: blocks.0.mlp.fc1.bias"),
        (change(pos_embed=torch.randn(1, 16, 64)), HEADS, "pos_embed: not the fixed"),
        (change(pos_embed=positions(64, 4).flip(1)), HEADS, "pos_embed: not the fixed"),
        (change(pos_embed=torch.zeros(1, 15, 64)), HEADS, "15 positions"),
        (random_weights(out=5), HEADS, "5 out"),
        (random_weights(classes=1001), HEADS, "1002 labels"),
        (random_weights(), None, "num_attention_heads: unknown for the width 64"),
        (random_weights(), 5, "num_attention_heads: 5"),
    ],
)
def test_another_model_is_refused_by_name(state, heads, words):
    with pytest.raises(UserError, match=words):
        convert_transformer(state, "sit", num_attention_heads=heads)


def test_the_vae_must_fit():
    four = random_weights(channels=4, out=8)
    with pytest.raises(UserError, match="there is no VAE"):
        convert_dit(four, "dit", num_attention_heads=HEADS)
    with pytest.raises(UserError, match="latents have 3"):
        convert_dit(four, "dit", vae=build_pixel_vae(3, 8), num_attention_heads=HEADS)
    with pytest.raises(UserError, match="type 'dot'"):
        convert_dit(four, "dot")


def test_files_of_other_kinds_are_refused(tmp_path):
    state = random_weights()
    (tmp_path / "words.pt").write_text("hello")
    (tmp_path / "words.safetensors").write_text("hello, hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": state, "ema": 3}, tmp_path / "number.pt")
    torch.save({"ema": state, "args": argparse.Namespace(path_type="GVP", prediction="velocity")}, tmp_path / "gvp.pt")
    wrong = {"nowhere.pt": "No such file", "words.pt": "no PyTorch", "words.safetensors": "no PyTorch"}
    wrong |= {"list.pt": "no weights", "number.pt": "its key 'ema'", "gvp.pt": "path_type GVP"}
    for name, words in wrong.items():
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            read_checkpoint(tmp_path / name)
    save_file(state, tmp_path / "good.safetensors")
    assert read_checkpoint(tmp_path / "good.safetensors").keys() == state.keys()


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


PLAIN = """
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipeline([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[2])
"""


def test_the_script_writes_a_pipeline_that_needs_no_entrecipes(tmp_path, monkeypatch, capsys):
    averaged, raw = random_weights(slow=False), {name: value * 2 for name, value in random_weights().items()}
    raw["pos_embed"] = averaged["pos_embed"]
    arguments = argparse.Namespace(path_type="Linear", prediction="velocity")
    torch.save({"model": raw, "ema": averaged, "opt": {"state": {}}, "args": arguments}, tmp_path / "sit.pt")
    common = ["--type", "sit", "--num-attention-heads", HEADS]
    assert call(monkeypatch, tmp_path / "sit.pt", tmp_path / "out", *common) == 0
    assert "weights" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "out"), str(tmp_path / "images.pt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pipeline = convert_dit(averaged, "sit", num_attention_heads=HEADS)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), pipeline([1, 2], **asked).images)

    parts = load_components(Pipeline(pretrained=str(tmp_path / "out")))
    assert parts.vae is None and parts.path.name == "flow" and parts.family.null_label(parts.model) == 1000

    assert call(monkeypatch, tmp_path / "sit.pt", tmp_path / "raw", *common, "--no-ema") == 0
    raw_parts = load_components(Pipeline(pretrained=str(tmp_path / "raw")))
    assert torch.equal(raw_parts.model.proj_out_1.weight, raw["final_layer.adaLN_modulation.1.weight"])


def test_the_script_says_in_one_sentence_what_is_wrong(tmp_path, monkeypatch, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for file, words in (("nowhere.pt", "No such file"), ("other.pt", "no weights of a DiT")):
        assert call(monkeypatch, tmp_path / file, tmp_path / "out", "--type", "dit") == 2
        said = capsys.readouterr().err
        assert file in said and words in said and said.count("\n") == 1
    assert call(monkeypatch, tmp_path / "other.pt", tmp_path, "--type", "dit") == 2
    assert "exists already" in capsys.readouterr().err
