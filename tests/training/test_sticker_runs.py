"""Real tiny runs on stickers: resume with every curriculum, latents of an image VAE, what recipes may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from tiny import FLOW, state, tiny_recipe
from tiny_dfgn import CONFIG
from tiny_stickers import FRAMES, as_list, save_stickers
from tiny_text import save_tiny_text

from entrecipes.errors import UserError
from entrecipes.recipe.load import compose
from entrecipes.training.loop import train
from entrecipes.training.resume import resume
from entrecipes.training.run import Run


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prepared set of stickers and a text encoder."""
    folder = tmp_path_factory.mktemp("stickers")
    return str(save_stickers(folder)), str(save_tiny_text(folder / "bert"))


def sticker_recipe(places: tuple[str, str], config: dict[str, Any] | None = None, **sections: Any) -> Any:
    model = {"class": "DFGNModel", "config": {k: as_list(v) for k, v in (CONFIG | (config or {})).items()}}
    sections = {
        "data": {"type": "stickers", "name": places[0], "frames": FRAMES, "held_out": 0.25},
        "masks": {"type": "dual", "lengths": [2, FRAMES]},
        "evaluation": {"every": 32, "held_out": {"images": 2, "noise_levels": 4}},
        "training": {"images": 96, "batch_size": 8, "log_every": 32},
        **sections,
    }
    recipe = tiny_recipe(model, FLOW, **sections).model_dump(mode="json", by_alias=True)
    recipe["pipeline"]["build"]["text"] = [{"id": places[1], "tokens": 5}]
    return type(tiny_recipe()).model_validate(recipe)


@pytest.mark.parametrize("curriculum", ["none", "linear", "adaptive", "entropy"])
def test_a_stopped_run_on_stickers_resumes_bit_for_bit(tmp_path: Path, places, curriculum: str) -> None:
    recipe = sticker_recipe(places, curriculum={"type": curriculum}, noise={"type": "infonoise", "warmup": 32})
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = Run(recipe, tmp_path / "whole")
    train(whole)
    part = Run(recipe, tmp_path / "parts")
    part.log.listener = lambda row: setattr(part, "stop_requested", row["images"] >= 64)
    train(part)
    assert 64 <= part.images < 96
    rest = Run(recipe, tmp_path / "parts")
    assert resume(rest)
    train(rest)
    for name, value in state(whole).items():
        assert torch.equal(value, state(rest)[name]), name
    for name, value in whole.curriculum.state_dict().items():
        assert not torch.is_tensor(value) or torch.equal(value, rest.curriculum.state_dict()[name]), name
    assert [row["nats"] for row in whole.log.rows("held_out")] == [row["nats"] for row in rest.log.rows("held_out")]


def test_stickers_train_on_latents_frame_by_frame(tmp_path: Path, places) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        norm_num_groups=2,
        latent_channels=3,
    ).save_pretrained(tmp_path / "vae")
    recipe = sticker_recipe(places, {"sample_size": 4, "patch_size": 1}, training={"images": 16, "batch_size": 8})
    recipe = recipe.model_dump(mode="json", by_alias=True)
    recipe["pipeline"]["build"]["vae"] = str(tmp_path / "vae")
    run = Run(type(tiny_recipe()).model_validate(recipe), None)
    assert run.data.train.tensor.shape[1:] == (6, FRAMES, 4, 4)
    with torch.no_grad():
        pixels = run.data.images.train.tensor[0].float().div(127.5).sub(1).transpose(0, 1)
        mean = run.components.vae.encode(pixels).latent_dist.mean.transpose(0, 1)
    assert torch.allclose(run.data.train.tensor[0, :3], mean, atol=1e-5)
    train(run)
    assert run.evaluator.samples((run.ema or run).model, 2).shape == (2, 3, FRAMES, 8, 8)


def test_padded_frames_have_no_say(places) -> None:
    """The loss is the mean over the frames that count, and no gradient comes from the others."""
    recipe = sticker_recipe(places, training={"images": 16, "batch_size": 4})
    run = Run(recipe, None)
    x0, noise = torch.randn(2, 4, 3, FRAMES, 8, 8).unbind(0)
    counted = torch.tensor([[True, True, False, False]] * 4)
    prediction = torch.randn(4, 3, FRAMES, 8, 8, requires_grad=True)
    loss, x0_error = run.objective(prediction, noise - x0, torch.zeros(4), counted)
    loss.sum().backward()
    assert prediction.grad[:, :, :2].abs().amin() > 0 and not prediction.grad[:, :, 2:].any()
    by_hand = (prediction - (noise - x0)).square()[:, :, :2].flatten(1).mean(1)  # no weighting: plain error
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    assert x0_error.shape == (4,)


BASE = [
    "description=x",
    "data={type: digits}",
    "training={images: 16}",
    "pipeline={build: {model: {class: UNet2DModel}, scheduler: {class: EDMEulerScheduler}}}",
]
CLIPS = ["data={type: stickers}", "pipeline={build: {model: {class: DFGNModel}, scheduler: {class: DDIMScheduler}}}"]
WRONG = {
    "masks.type: 'dual' is for stickers": ["masks={type: dual}"],
    "'adaptive' chooses among the tasks of masks.type: dual": ["curriculum={type: adaptive}"],
    "'simda' is for models of stickers": ["blocks={type: all, adapter: {type: simda}}"],
    "training.label_dropout: stickers have no labels": [*CLIPS, "training.label_dropout=0.1"],
    "'given' needs given frames, and evaluation.task t2v has none": [
        *CLIPS,
        "evaluation={metrics: [given], reference: held_out, task: t2v}",
    ],
}


@pytest.mark.parametrize("said", WRONG)
def test_recipes_say_what_does_not_go_together(said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose([*BASE, *WRONG[said]])


def test_what_is_measured_as_it_is_never_trained_is_said(places, caplog) -> None:
    guided = {"held_out": {"images": 2, "noise_levels": 4}, "guidance_scale": 2, "frame_guidance_scale": 3}
    Run(sticker_recipe(places, masks={"type": "none"}, evaluation=guided), None)
    assert "evaluation.task: it2v is measured, but the tasks that are trained are t2v" in caplog.text
    assert "evaluation.guidance_scale needs masks.uncond above 0" in caplog.text
    assert "evaluation.frame_guidance_scale needs masks.uncond above 0" in caplog.text
    caplog.clear()
    Run(sticker_recipe(places, evaluation=guided), None)
    assert "evaluation." not in caplog.text
