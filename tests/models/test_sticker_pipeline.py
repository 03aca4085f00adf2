"""The pipeline of stickers: tasks, given frames pinned at every noise level, guidance, pictures, saving and loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from PIL import Image, ImageDraw
from tiny_text import save_tiny_text

from entrecipes import DFGNModel, StickerPipeline
from entrecipes.data.text import TextEncoders
from entrecipes.models.sticker import encode_captions, pass_weights, save_animation
from entrecipes.recipe.masks import TASKS, follows_text, given_at
from entrecipes.recipe.pipeline import TextEncoder

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++ flow": ("DPMSolverMultistepScheduler", FLOW),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "edm euler": ("EDMEulerScheduler", {}),
}
FRAMES, SIDE = 4, 8
QUICK = {"num_frames": FRAMES, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoders:
    folder = save_tiny_text(tmp_path_factory.mktemp("text"))
    return TextEncoders.load([TextEncoder(id=str(folder), tokens=4)])


def unet(channels: int = 3) -> DFGNModel:
    """A random network whose output depends on everything."""
    torch.manual_seed(0)
    return DFGNModel(
        in_channels=channels,
        out_channels=channels,
        sample_size=SIDE,
        block_out_channels=(8, 16),
        attention_levels=(False, True),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=12,
        temporal_in=False,
    ).eval()


def image_vae() -> AutoencoderKL:
    """A random VAE of half the side, with a scale and a shift."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.7,
        shift_factor=0.2,
    ).eval()


def pipeline_of(solver: str = "ddim", latent: bool = False, text: TextEncoders | None = None) -> StickerPipeline:
    kind, config = SOLVERS[solver]
    parts = text.components() if text else {}
    scheduler = getattr(diffusers, kind)(**config)
    return quiet(StickerPipeline(unet(4 if latent else 3), scheduler, image_vae() if latent else None, **parts))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def clip(seed: int = 5, side: int = SIDE) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(FRAMES)]


def tensors(pictures: list[Image.Image]) -> torch.Tensor:
    """[F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("task", TASKS)
def test_each_task_depends_on_what_is_given_and_nothing_else(task, text):
    pipeline = pipeline_of(text=text)
    places = [place for place, shown in enumerate(given_at(task, FRAMES)) if shown]

    def sample(caption: str, pictures: list[Image.Image]) -> torch.Tensor:
        prompt = caption if follows_text(task) else None
        frames = {place: pictures[place] for place in places} or None
        return pipeline(prompt, frames, generator=seeds(0), **QUICK).frames

    first = sample("a red cat", clip())
    assert first.shape == (1, FRAMES, 3, SIDE, SIDE) and first.std() > 0.01
    assert torch.equal(first, sample("a blue cat", clip())) != follows_text(task)
    assert torch.equal(first, sample("a red cat", clip(6))) != bool(places)


def test_it_is_the_solvers_own_loop(text):
    """DDIM by hand, from the same noise, with a text and a frame."""
    pipeline, pictures = pipeline_of(text=text), tensors(clip())
    found = pipeline("a red cat", {1: pictures[1]}, generator=seeds(3), **QUICK).frames
    condition = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    condition[0, :, 1] = pictures[1] * 2 - 1
    tokens = encode_captions(["a red cat"], [pipeline.text_encoder], [pipeline.tokenizer], [4]).float()
    alphas = [*pipeline.scheduler.alphas_cumprod[[500, 0]], torch.tensor(1.0)]
    x = torch.randn(1, 3, FRAMES, SIDE, SIDE, generator=seeds(3)[0])
    with torch.no_grad():
        for time, now, following in zip((500, 0), alphas, alphas[1:], strict=False):
            noise = pipeline.unet(x, torch.tensor([time]), tokens, condition).sample
            x0 = (x - (1 - now).sqrt() * noise) / now.sqrt()
            x = following.sqrt() * x0 + (1 - following).sqrt() * noise
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("solver", ["ddim", "dpm++", "dpm++ flow", "flow euler", "euler"])
def test_pinned_frames_stand_there_pixel_for_pixel_and_drive_the_others(solver, latent):
    pipeline, side = pipeline_of(solver, latent), SIDE * (1 + latent)
    pictures = clip(side=side)
    frames = {0: pictures[0], -1: pictures[-1]}
    pinned, free = (pipeline(frames=frames, pin=pin, generator=seeds(0), **QUICK).frames[0] for pin in (True, False))
    assert torch.equal(pinned[[0, -1]], tensors(pictures)[[0, -1]]) and torch.isfinite(pinned).all()
    assert (free[[0, -1]] - pinned[[0, -1]]).abs().max() > 0.05
    assert (free[1:-1] - pinned[1:-1]).abs().max() > 1e-4
    as_pil = pipeline(frames=frames, num_frames=FRAMES, num_inference_steps=1, pin=True).frames[0]
    assert all(np.array_equal(as_pil[place], pictures[place]) for place in frames)


@pytest.mark.parametrize("solver", SOLVERS)
def test_pinned_frames_are_noised_to_the_level_of_each_call(solver, monkeypatch):
    """As the network sees them: a x0 + b noise, with a and b told from the solver's own table by hand."""
    pipeline, pictures, seen = pipeline_of(solver), tensors(clip()), []
    forward = DFGNModel.forward
    monkeypatch.setattr(
        DFGNModel, "forward", lambda self, x, *rest, **named: seen.append(x) or forward(self, x, *rest, **named)
    )
    pipeline(frames={2: pictures[2]}, pin=True, generator=seeds(0), **QUICK)
    scheduler, x0 = pipeline.scheduler, pictures[2] * 2 - 1
    noise = torch.randn(1, 3, FRAMES, SIDE, SIDE, generator=seeds(0)[0])[0, :, 2]
    assert len(seen) == len(scheduler.timesteps)
    for call, x in enumerate(seen):
        if solver == "ddim":
            alpha = scheduler.alphas_cumprod[scheduler.timesteps[call]]
            a, b = alpha.sqrt(), (1 - alpha).sqrt()
        else:
            sigma = scheduler.sigmas[call]
            if "flow" in solver:
                a, b = 1 - sigma, sigma
            else:  # EDM's network sees x / sqrt(sigma^2 + sigma_data^2), those of the others of variance 1
                a = 1 / ((0.25 if "edm" in solver else 1) + sigma**2).sqrt()
                b = sigma * a
        torch.testing.assert_close(x[0, :, 2], (a * x0 + b * noise).to(x.dtype), rtol=1e-4, atol=1e-4)


def test_a_clip_depends_on_its_own_generator_alone(text):
    pipeline, pictures = pipeline_of(text=text), clip()
    prompts, frames = ["a red cat", "", "a blue cat"], [{0: pictures[0]}, {}, {3: pictures[1]}]
    options = QUICK | {"pin": True, "guidance_scale": 3.0, "frame_guidance_scale": 2.0}
    together = pipeline(prompts, frames, generator=seeds(0, 1, 2), **options).frames
    for row in range(3):
        (alone,) = pipeline(prompts[row], frames[row], generator=seeds(row), return_dict=False, **options)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.05


def test_guidance_is_the_published_sum_and_takes_no_pass_too_many(text, monkeypatch):
    pipeline, calls = pipeline_of(text=text), []
    tokens = text.encode(["a red cat"]).float()
    condition = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    condition[:, :, 0] = tensors(clip())[0] * 2 - 1
    x = torch.randn(1, 3, FRAMES, SIDE, SIDE, generator=seeds(0)[0])
    with torch.no_grad():
        nothing, of_text, of_frames, of_both = (
            pipeline.unet(x, 500, tokens * words, condition * shown).sample
            for words, shown in ((0, 0), (1, 0), (0, 1), (1, 1))
        )
    found, step = [], DDIMScheduler.step
    monkeypatch.setattr(
        DDIMScheduler, "step", lambda self, output, *rest, **named: found.append(output) or step(self, output, *rest)
    )
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))

    def close(passes: int, expected: torch.Tensor, with_text: bool, with_frames: bool, scale: float, frame: float):
        asked = {"prompt_embeds": tokens if with_text else None, "condition": condition if with_frames else None}
        found.clear(), calls.clear()
        options = QUICK | {"guidance_scale": scale, "frame_guidance_scale": frame, "return_dict": True}
        pipeline(**asked, **options | {"generator": seeds(0)})
        torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-5)
        assert calls == [passes] * 2

    three = nothing + 2 * (of_frames - nothing) + 5 * (of_both - of_frames)
    close(3, three, True, True, 5, 2)
    close(2, of_frames + 5 * (of_both - of_frames), True, True, 5, 1)
    close(2, nothing + 4 * (of_both - nothing), True, True, 4, 4)
    close(1, of_both, True, True, 1, 1)
    close(2, nothing + 5 * (of_text - nothing), True, False, 5, 2)
    close(2, nothing + 2 * (of_frames - nothing), False, True, 5, 2)
    close(1, of_frames, False, True, 5, 1)
    close(1, nothing, False, False, 5, 2)
    hook.remove()
    assert pass_weights(1, 1, True, True) == {(True, True): 1}


def test_all_that_can_be_given_is_the_same(text):
    pipeline, pictures = pipeline_of(text=text), clip()
    options = QUICK | {"pin": True}
    first = pipeline("a red cat", {0: pictures[0], 3: pictures[3]}, generator=seeds(0), **options).frames
    backwards = {-1: tensors(pictures)[3], -FRAMES: tensors(pictures)[0]}
    assert torch.equal(pipeline(["a red cat"], [backwards], generator=seeds(0), **options).frames, first)
    condition = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    condition[0, :, [0, 3]] = tensors(pictures)[[0, 3]].transpose(0, 1) * 2 - 1
    given = torch.tensor([[True, False, False, True]])
    asked = {"condition": condition, "given": given, "prompt_embeds": text.encode(["a red cat"])}
    torch.testing.assert_close(pipeline(**asked, generator=seeds(0), **options).frames, first, rtol=0, atol=1e-6)
    assert torch.equal(
        pipeline("", {0: pictures[0]}, generator=seeds(0), **QUICK).frames,
        pipeline(frames={0: pictures[0]}, generator=seeds(0), **QUICK).frames,
    ), "an empty text is none"


def test_pictures_are_resized_and_stand_on_white():
    pipeline = pipeline_of()
    half = Image.new("RGBA", (2 * SIDE, 2 * SIDE), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, SIDE, 2 * SIDE))
    frame = pipeline(frames={1: half}, pin=True, **QUICK).frames[0, 1]
    assert (frame[:, 4, 1] - torch.tensor([1.0, 0, 0])).abs().max() < 0.05 and frame[:, 4, 6].min() > 0.95
    palette = half.convert("P")
    grey = Image.new("L", (SIDE, SIDE), 51)
    found = pipeline(frames={0: palette, 1: grey}, pin=True, **QUICK).frames[0]
    assert found[0, :, 4, 1].argmax() == 0 and torch.equal(found[1], torch.full((3, SIDE, SIDE), 0.2))


def test_other_lengths_and_sizes():
    pipeline = pipeline_of()
    assert pipeline(num_frames=1, num_inference_steps=1, output_type="np").frames.shape == (1, 1, SIDE, SIDE, 3)
    wide = pipeline(
        frames={0: clip()[0]}, height=4, width=12, pin=True, generator=seeds(0, 1), **QUICK | {"num_frames": 9}
    )
    assert wide.frames.shape == (2, 9, 3, 4, 12), "two generators: two clips"
    latent = pipeline_of(latent=True)(num_inference_steps=1).frames
    assert [len(frames) for frames in latent] == [8] and latent[0][0].size == (16, 16)


@torch.no_grad()
def test_behind_a_vae_it_works_on_scaled_latents(monkeypatch):
    pipeline, pictures, seen = pipeline_of(latent=True), tensors(clip(side=16)), []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3]))
    pipeline(frames=[{0: pictures[0], 2: pictures[2]}, {1: pictures[1]}], **QUICK | {"num_inference_steps": 1})
    hook.remove()
    means = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mean
    expected = torch.zeros(2, 4, FRAMES, SIDE, SIDE)
    for row, place in ((0, 0), (0, 2), (1, 1)):
        expected[row, :, place] = (means[place] - 0.2) * 0.7
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
    pinned = pipeline(condition=expected, given=(expected != 0).any(1).flatten(2).any(2), pin=True, **QUICK).frames
    decoded = pipeline.vae.decode(expected[0, :, 2][None] / 0.7 + 0.2).sample
    torch.testing.assert_close(pinned[0, 2], (decoded[0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def drawn() -> Image.Image:
    """A red ring around white, on a ground that is not quite white."""
    picture = Image.new("RGB", (SIDE, SIDE), (250, 252, 249))
    ImageDraw.Draw(picture).rectangle((2, 2, 5, 5), fill="white", outline="red")
    return picture


def test_transparent_is_what_is_white_up_to_the_border():
    pipeline = pipeline_of()
    options = {"num_frames": 2, "num_inference_steps": 1, "pin": True}
    (pictures,) = pipeline(frames={0: drawn(), 1: drawn()}, transparent=True, **options).frames
    alpha = np.asarray(pictures[0].getchannel("A"))
    expected = np.zeros((SIDE, SIDE), int)
    expected[2:6, 2:6] = 255
    assert np.array_equal(alpha, expected), "white inside the ring stays"
    assert np.array_equal(pictures[1].convert("RGB"), drawn())
    (whole,) = pipeline(frames={0: drawn(), 1: drawn()}, **options).frames
    assert whole[0].mode == "RGB"


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_animations_come_back_as_they_were(tmp_path, ending, transparent):
    pictures = []
    for place in range(3):
        picture = Image.new("RGBA" if transparent else "RGB", (SIDE, SIDE), (0, 0, 0, 0) if transparent else "white")
        ImageDraw.Draw(picture).rectangle((place, 2, place + 3, 5), fill="red")
        pictures.append(picture)
    path = save_animation(pictures, tmp_path / "deep" / f"x{ending}", fps=4)
    with Image.open(path) as file:
        assert file.n_frames == 3 and file.info.get("loop", 0) == 0
        for place, picture in enumerate(pictures):
            file.seek(place)
            file.load()
            assert file.info["duration"] == 250
            found = file.convert("RGBA")
            assert np.array_equal(found.getchannel("A"), picture.convert("RGBA").getchannel("A")), "nothing lingers"
            on_white = [
                np.asarray(Image.alpha_composite(Image.new("RGBA", (SIDE, SIDE), "white"), image.convert("RGBA")))
                for image in (found, picture)
            ]
            assert np.array_equal(*on_white)
    with pytest.raises(ValueError, match="ends in"):
        save_animation(pictures, tmp_path / "x.mp4")


def test_what_does_not_fit_is_refused(text):
    pipeline, pictures = pipeline_of(text=text), clip()
    condition = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    refused = {
        "no frame 4 in a clip of 4": {"frames": {4: pictures[0]}},
        "no frame -5 in a clip of 4": {"frames": {-5: pictures[0]}},
        "frame 3 is given twice": {"frames": {3: pictures[0], -1: pictures[1]}},
        r"tensor of \[3, 4, 8\], not of \[3, 8, 8\]": {"frames": {0: torch.zeros(3, 4, 8)}},
        "not str": {"frames": {0: "a.png"}},
        "multiples of 2": {"height": 5},
        "either frames or condition": {"frames": {0: pictures[0]}, "condition": condition},
        "either prompt or prompt_embeds": {"prompt": "a cat", "prompt_embeds": torch.zeros(1, 4, 12)},
        "`pin` needs to know": {"condition": condition, "pin": True},
        "2 texts, 3 clips of frames": {"prompt": ["a", "cat"], "frames": [{}, {}, {}]},
        "2 texts, 1 clips of frames, 1 generators": {"prompt": ["a", "cat"], "generator": seeds(0)},
        "give pil": {"output_type": "jpg"},
        "needed by `transparent`": {"transparent": True},
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            pipeline(**QUICK | arguments)
    with pytest.raises(ValueError, match="no text encoder"):
        pipeline_of()("a cat")
    with pytest.raises(ValueError, match="multiples of 2"):
        pipeline_of(latent=True)(height=17)
    with pytest.raises(ValueError, match="text_tokens"):
        StickerPipeline(unet(), DDIMScheduler(), **text.components() | {"text_tokens": [4, 4]})


def test_saved_it_loads_here_as_our_classes_and_elsewhere_without_us(tmp_path: Path, text):
    pipeline = pipeline_of("flow euler", latent=True, text=text)
    clip(side=16)[0].save(tmp_path / "first.png")
    asked = {"num_frames": FRAMES, "num_inference_steps": 2, "guidance_scale": 2.0, "pin": True, "output_type": "pt"}

    def sample(pipeline: Any) -> torch.Tensor:
        picture = Image.open(tmp_path / "first.png")
        return quiet(pipeline)("a red cat", {0: picture}, generator=seeds(0), **asked).frames

    pipeline.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["_class_name"] == "StickerPipeline" and index["unet"] == ["entrecipes", "DFGNModel"]
    assert index["text_tokens"] == [4] and index["text_encoder_2"] == [None, None]
    for loaded in (StickerPipeline.from_pretrained(tmp_path / "p"), DiffusionPipeline.from_pretrained(tmp_path / "p")):
        assert type(loaded) is StickerPipeline and type(loaded.unet) is DFGNModel
        for name in ("unet", "vae", "text_encoder"):
            state = getattr(loaded, name).state_dict()
            assert all(torch.equal(value, state[key]) for key, value in getattr(pipeline, name).state_dict().items())
        again = sample(loaded)
        torch.testing.assert_close(again, sample(pipeline), rtol=0, atol=1e-5)
    torch.save(again, tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline
from PIL import Image

torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained("p", custom_pipeline="p", trust_remote_code=True)
given, generator = {{0: Image.open("first.png")}}, torch.Generator().manual_seed(0)
frames = pipeline("a red cat", given, generator=generator, **{asked}).frames
torch.testing.assert_close(frames, torch.load("expected.pt"), rtol=0, atol=1e-5)
(pictures,) = pipeline(num_inference_steps=1, transparent=True).frames
pipeline.save_animation(pictures, "x.gif")
pipeline.save_pretrained("again")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("pipeline.py", "sticker_io.py", "unet/entrecipes.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "p" / name).read_text()
    torch.testing.assert_close(sample(StickerPipeline.from_pretrained(tmp_path / "again")), again, rtol=0, atol=1e-5)
    assert (tmp_path / "x.gif").stat().st_size
