"""Block scores on fixed draws of training images, for the trainer, the command line and loops of one's own."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import DIT, FLOW, SEQUENCE, TEXT, tiny_recipe

from entrecipes import InfoNoiseScheduler, score_blocks
from entrecipes.blocks.measuring import Draw, measure_blocks
from entrecipes.blocks.scores import BlockScores
from entrecipes.blocks.stack import BlockStack
from entrecipes.data.opening import OpenedData, open_data
from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.path import GaussianPath
from entrecipes.diffusion.pipelines import Components, load_components
from entrecipes.errors import UserError
from entrecipes.evaluation.scoring import Scoring
from entrecipes.noise.base import NoiseSampler, RunFacts
from entrecipes.recipe.base import Section, build
from entrecipes.recipe.noise import InfoNoiseSection, LogNormalNoise, LossAwareNoise, UniformNoise
from entrecipes.recipe.prune import Draws

CPU = torch.device("cpu")
FEW = Draws(images=12, noise_levels=5)
DDPM = {"class": "DDIMScheduler"}


def subject(model: dict = DIT, scheduler: dict = DDPM, **sections) -> tuple[Components, OpenedData]:
    """A tiny model whose blocks do something from the start, and its data."""
    recipe = tiny_recipe(model, scheduler, **sections)
    components = load_components(recipe.pipeline, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in components.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return components, open_data(recipe.data, components, CPU)


@pytest.fixture(scope="module")
def dit() -> tuple[Components, OpenedData]:
    return subject()


def same(first: BlockScores, second: BlockScores, **tolerance: float) -> bool:
    return all(torch.allclose(first.score(name), second.score(name), **tolerance) for name in first.names)


def test_the_same_draws_every_time(dit) -> None:
    components, data = dit
    scoring = Scoring.on_images(FEW, components, data, CPU)
    first = scoring.measure(components.model)
    assert same(first, scoring.measure(components.model), rtol=0, atol=0)
    anew = Scoring.on_images(FEW, components, data, CPU, batch_size=5)
    assert same(first, anew.measure(components.model), rtol=1e-4), "batches differ by rounding only"
    other = Scoring.on_images(FEW.model_copy(update={"seed": 1}), components, data, CPU)
    assert not same(first, other.measure(components.model), rtol=1e-2)


def test_the_full_model_is_measured_as_in_an_evaluation(dit) -> None:
    components, data = dit
    scoring = Scoring.on_images(FEW, components, data, CPU, batch_size=5)
    found = scoring.measure(components.model, gradients=False)
    denoiser = Denoiser(components.model.eval(), components.family, components.path)
    held_out = scoring.bundle.measure(denoiser.x0_error)
    assert found.log_sigma.tolist() == held_out.log_sigma.tolist() and found.gate_pivot == 0.2
    assert (found.full["x0_error"] * 64).tolist() == pytest.approx(held_out.x0_error.tolist(), rel=1e-5)
    assert "taylor" not in found.names


def test_where_the_scores_come_from(dit) -> None:
    components, data = dit
    scoring = Scoring.on_images(FEW, components, data, CPU, model="mine")
    origin = scoring.measure(components.model).origin
    assert origin["model"] == "mine" and origin["data"] == "digits" and origin["device"] == "cpu"
    assert (origin["images"], origin["noise_levels"], origin["samples"], origin["seed"]) == (12, 5, 60, 0)
    assert origin["passes"] == 60 * (1 + 1 / 2 + 3) and origin["seconds"] > 0
    assert origin["data_fingerprint"] == scoring.data_fingerprint
    more = Scoring.on_images(FEW.model_copy(update={"seed": 1, "images": 13}), components, data, CPU)
    assert more.data_fingerprint == scoring.data_fingerprint, "of the data set, however much of it is drawn"


def test_a_model_in_training_stays_in_training(dit) -> None:
    components, data = dit
    model = components.model.train()
    scoring = Scoring.on_images(FEW, components, data, CPU)
    before = torch.get_rng_state()
    seconds = scoring.try_out(model)
    assert seconds > 0 and model.training
    scoring.measure(model)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    scoring.weights(build("noise", UniformNoise(), path=components.path))
    assert torch.equal(torch.get_rng_state()[:8], before[:8]), "the trainer's own draws go on as before"


@pytest.mark.parametrize("section", [UniformNoise(), LogNormalNoise(mean=0.5, std=0.7)], ids=lambda s: s.type)
def test_the_weights_of_a_fixed_schedule(dit, section: Section) -> None:
    components, data = dit
    sampler = build("noise", section, path=components.path)
    scoring = Scoring.on_images(FEW, components, data, CPU)
    levels = scoring.bundle.log_sigma
    ends = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
    assert scoring.weights(sampler).tolist() == pytest.approx(sampler.cdf(edges).diff().tolist(), abs=1e-3)


def learned(section: Section, path: GaussianPath) -> NoiseSampler:
    """A sampler that has seen large rates and losses above log sigma 1.4, and small ones below."""
    sampler = build("noise", section, path=path, facts=RunFacts(images=1000))
    log_sigma = build("noise", UniformNoise(), path=path).quantile(torch.linspace(0, 1, 4000, dtype=torch.float64))
    rate, loss = torch.where(log_sigma > 1.4, 1.0, 1e-3), torch.where(log_sigma > 1.4, 4.0, 1.0)
    sampler.record(log_sigma, rate * log_sigma.mul(2).exp(), loss)
    sampler.refresh(1000)
    return sampler


def test_the_weights_of_learned_schedules(dit) -> None:
    components, data = dit
    scoring = Scoring.on_images(FEW, components, data, CPU)
    uniform = scoring.weights(build("noise", UniformNoise(), path=components.path))
    section = InfoNoiseSection(warmup=500, ramp=0, refresh_every=500, floor=0.1, buffer=4000)
    infonoise = learned(section, components.path)
    loss_aware = learned(LossAwareNoise(refresh_every=1), components.path)
    before = infonoise.state_dict()
    found = scoring.weights(infonoise)
    assert found.sum() == pytest.approx(1) and found[3:].sum() > 0.8 > 0.6 > uniform[3:].sum()
    assert torch.equal(infonoise.state_dict()["buffer"]["pairs"], before["buffer"]["pairs"])
    drawn = loss_aware.sample(4096, torch.Generator().manual_seed(0))[0]
    assert (drawn > 1.4).double().mean() > 1.4 * uniform[3:].sum(), "it draws more where the loss is large,"
    assert scoring.weights(loss_aware).tolist() == pytest.approx(uniform.tolist(), abs=0.03), "and weights that back"


def test_a_stream_is_refused(dit) -> None:
    components, data = dit
    stream = SimpleNamespace(train=object())
    with pytest.raises(UserError, match="set data.streaming: false"):
        Scoring.on_images(FEW, components, stream, CPU)


def test_sequences_and_flow() -> None:
    components, data = subject(SEQUENCE, FLOW, data=TEXT)
    scores = Scoring.on_images(FEW, components, data, CPU).measure(components.model)
    assert scores.dimensions == 27 * 16 and len(scores.paths) == 2
    assert bool(scores.score("output_distance").gt(0).all()) and bool(scores.score("bi").isfinite().all())


def test_scores_in_a_loop_of_ones_own(dit) -> None:
    components, data = dit
    scoring = Scoring.on_images(FEW, components, data, CPU)
    expected = scoring.measure(components.model)
    pipeline, (x0, labels) = components.pipeline(), (scoring.bundle.x0, scoring.bundle.condition)
    assert same(expected, score_blocks(pipeline, x0, labels, noise_levels=5), rtol=0, atol=0)
    pipeline.scheduler = InfoNoiseScheduler.from_config(
        {**pipeline.scheduler.config, "_class_name": "DDIMScheduler"}, train_images=1000
    )
    found = score_blocks(pipeline, x0, labels, noise_levels=5, gate_pivot=None, gradients=False)
    assert found.gate_pivot is None and torch.equal(found.skipped["loss"], expected.skipped["loss"])


def test_half_precision() -> None:
    torch.manual_seed(0)
    pipeline, x0, labels = subject()[0].pipeline(), torch.rand(32, 1, 8, 8) * 2 - 1, torch.arange(32) % 10
    expected = score_blocks(pipeline, x0, labels, noise_levels=5)
    found = score_blocks(pipeline.to(torch.bfloat16), x0, labels, noise_levels=5)
    for name in ("loss_rise", "output_distance", "taylor"):
        assert found.score(name).tolist() == pytest.approx(expected.score(name).tolist(), rel=0.1), name


MISTAKES = {
    "whole numbers": ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, "give at least two as float"),
    "one image": ({"images": torch.zeros(1, 1, 8, 8)}, "give at least two as float"),
    "no labels": ({"labels": None}, "the model is class-conditional; give one label for each image"),
    "too few labels": ({"labels": torch.zeros(3, dtype=torch.int64)}, "give one label for each image"),
    "a label too high": ({"labels": torch.full((4,), 5000)}, "the model fails on"),
    "another shape": ({"images": torch.zeros(4, 3, 8, 8)}, "the model fails on"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_ones_own_loop(dit, name: str) -> None:
    change, said = MISTAKES[name]
    given = {"images": torch.zeros(4, 1, 8, 8), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(UserError, match=said):
        score_blocks(dit[0].pipeline(), **given)


def test_a_text_conditional_model_with_ones_own_draws() -> None:
    """What the docstring of `score_blocks` sends users of such models to."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=4,
        cross_attention_dim=16,
        caption_channels=16,
    ).eval()
    path = GaussianPath.from_scheduler(diffusers.DPMSolverMultistepScheduler())
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, 4, dtype=torch.float64)
    latents, captions = torch.randn(6, 4, 4, 4), torch.randn(6, 5, 16)

    def call(level: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level))
        levels = log_sigma[level].expand(len(latents))
        prediction = model(
            path.add_noise(latents, noise, levels),
            encoder_hidden_states=captions,
            timestep=path.timestep(levels).float(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]  # without the learned variance
        return prediction, path.target(latents, noise, levels)

    draws = (Draw(level, partial(call, level)) for level in range(4))
    scores = measure_blocks(
        BlockStack(model), draws, log_sigma=log_sigma, x0_error_scale=path.x0_error_scale(log_sigma), gate_pivot=0.2
    )
    assert scores.paths == tuple(f"transformer_blocks.{i}" for i in range(3))
    assert all(bool(scores.score(name).isfinite().all()) for name in scores.names)
    assert bool(scores.score("output_distance").gt(0).all())


def test_importing_entrecipes_imports_no_torch() -> None:
    code = "import sys, entrecipes; assert 'score_blocks' in entrecipes._LAZY; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
