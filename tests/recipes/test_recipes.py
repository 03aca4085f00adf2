"""Every recipe that we publish: valid, its header's commands load it, and it builds and steps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from moving import figures
from PIL import Image
from tiny_text import save_tiny_text
from tiny_video import wan, wan_vae

from entrecipes import DFGNModel, PoseVideoPipeline, StickerPipeline
from entrecipes.cli import main
from entrecipes.data.text import TextEncoders
from entrecipes.recipe.load import load
from entrecipes.recipe.pipeline import TextEncoder
from entrecipes.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


def commands(path: Path) -> list[list[str]]:
    """The training commands in a recipe's header comment, as words."""
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    found = [line for line in header if line.startswith(("entrecipes run ", "accelerate launch "))]
    return [shlex.split(line, comments=True) for line in found]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins(tmp_path_factory.mktemp("people"))


def stand_ins(folder: Path) -> Path:
    """Drawn videos with poses, a pixel model of 8 blocks and a latent one as it comes, without condition; a VAE of
    images, as strong as the usual one."""
    clips, keypoints = figures(3, 24, size=16)
    (folder / "videos").mkdir()
    for i in range(3):
        frames = [Image.fromarray(frame) for frame in clips[i].permute(1, 2, 3, 0).numpy()]
        frames[0].save(folder / "videos" / f"{i}.gif", save_all=True, append_images=frames[1:])
        (folder / "videos" / f"{i}.poses.json").write_text(json.dumps(keypoints[i].tolist()))
    pixels = wan(num_layers=8)
    PoseVideoPipeline(pixels, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "pixels")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    latents = wan(num_layers=8, in_channels=4, out_channels=4)
    WanPipeline(None, None, wan_vae(), scheduler, latents).save_pretrained(folder / "latents")
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = AutoencoderKL(3, 3, down, up, [4] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2)
    vae.save_pretrained(folder / "vae")
    text = TextEncoders.load([TextEncoder(id=str(save_tiny_text(folder / "text", channels=384)), tokens=5)])
    model = DFGNModel(**load("stickers/base").recipe.pipeline.build.model.config)
    StickerPipeline(model, FlowMatchEulerDiscreteScheduler(), **text.components()).save_pretrained(folder / "stickers")
    return folder


def embedded(recipe: Recipe, people: Path) -> list[str]:
    """What puts data that travels with the package in the place of what would have to be prepared or downloaded."""
    config = "pipeline.build.model.config"
    if recipe.data.kind == "clips":
        data = {"type": "video_folder", "path": str(people / "videos"), "image_size": 16, "frames": 5, "frame_step": 1}
        origin = people / ("latents" if "Wan-AI" in (recipe.pipeline.pretrained or "") else "pixels")
        features = [
            "evaluation.features={type: efficientnet_lite0}",
            "evaluation.video_features={type: frame_statistics}",
        ]
        measured = [
            "evaluation.metrics=[ssim, fvd]",
            "evaluation.held_out.images=4",
            "evaluation.held_out.noise_levels=4",
        ]
        return [
            f"data={json.dumps(data | {'held_out': 0.3, 'min_motion': 0})}",
            *([f"pipeline.pretrained={origin}"] if recipe.pipeline.pretrained else []),
            *features,
            *measured,
        ]
    if recipe.data.kind == "stickers":
        return stickers(recipe, people)
    if recipe.pipeline.pretrained:
        return [*fresh(recipe), "data={type: digits, held_out: 0.1}", "evaluation.features={type: efficientnet_lite0}"]
    if recipe.data.type in ("sequences", "hub_sequences"):
        small = ["evaluation.held_out.images=4", f"{config}.num_layers=2"]
        return ["data={type: sequences, name: pride}", f"{config}.alphabet={' abcdefghijklmnopqrstuvwxyz'!r}", *small]
    if recipe.data.type == "digits":
        return []
    changes = ["data.type=digits", "data.held_out=0.1"]
    if recipe.pipeline.build.vae:
        changes += [f"pipeline.build.vae={people / 'vae'}", "data.max_images=40"]
    if recipe.pipeline.build.model.config.get("num_class_embeds"):
        changes.append(f"{config}.num_class_embeds=10")
    if recipe.evaluation.features.type != "efficientnet_lite0":
        changes.append("evaluation.features={type: efficientnet_lite0}")
    return changes


def stickers(recipe: Recipe, people: Path) -> list[str]:
    """The embedded stickers, a text encoder and a base that need no network; a narrow model where it is huge."""
    config = "pipeline.build.model.config"
    changes = ["data={type: stickers, name: stickers, max_images: 100}", "evaluation.metrics=[fvd, motion]"]
    changes += ["evaluation.held_out.images=4", "evaluation.held_out.noise_levels=4"]
    changes += ["evaluation.video_features={type: frame_statistics}"]
    if recipe.pipeline.pretrained:
        return [*changes, f"pipeline.pretrained={people / 'stickers'}"]
    encoders = [{"id": str(people / "text"), "tokens": 5} for _ in recipe.pipeline.build.text]
    changes.append(f"pipeline.build.text={json.dumps(encoders)}")
    if recipe.pipeline.build.vae is None:
        return changes
    changes += [f"pipeline.build.vae={people / 'vae'}", f"{config}.sample_size=4", f"{config}.norm_num_groups=4"]
    changes += [f"{config}.block_out_channels=[8, 8, 8]", f"{config}.attention_levels=[true, true, false]"]
    return [*changes, f"{config}.text_channels=[384, 384]", f"{config}.text_tokens=[5, 5]"]


def fresh(recipe: Recipe) -> list[str]:
    """What puts a new small transformer in the place of a pre-trained one."""
    flow = "sit" in recipe.pipeline.pretrained
    build = load(f"entpruner/pretrain_{'sit' if flow else 'dit'}").recipe.pipeline.build
    config = {**build.model.config, "sample_size": 8}
    model = build.model.model_copy(update={"config": config})
    build = build.model_copy(update={"model": model}).model_dump(mode="json", by_alias=True)
    held_out = ["evaluation.held_out.images=4", "evaluation.held_out.noise_levels=4"]
    return ["pipeline.pretrained=null", f"pipeline.build={json.dumps(build)}", *held_out]


def narrow(recipe: Recipe) -> list[str]:
    """What makes a paper-sized UNet one that steps on a CPU: as deep, but narrow; and a DiT on latents."""
    build, config = recipe.pipeline.build, "pipeline.build.model.config"
    widths = build.model.config.get("block_out_channels", []) if build else []
    if recipe.data.kind == "stickers":
        return []
    if build and build.vae:
        small = [
            f"{config}.{key}={n}" for key, n in (("sample_size", 4), ("num_attention_heads", 8), ("num_layers", 4))
        ]
    elif 256 in widths:
        small = [f"{config}.block_out_channels={[32] * len(widths)}"]
    else:
        return []
    small.append(f"{config}.attention_head_dim=8")
    return [*small, "evaluation.held_out.images=4", "evaluation.held_out.noise_levels=4"]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_commands_name_this_recipe_and_dry_run(path, people, capsys, monkeypatch, tmp_path):
    """On the embedded digits at the recipe's own size where its data would have to be prepared first; small batches."""
    own = 0
    quick = ["training.batch_size=4", "training.precision=no"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ENTRECIPES_HOME", str(tmp_path))
    for words in commands(path):
        arguments = words[2:] if words[0] == "entrecipes" else words[words.index("scripts/train.py") + 1 :]
        loaded = load(arguments[0], arguments[1:])
        assert not loaded.warnings
        if loaded.path.resolve() != path.resolve():  # one that makes what this one starts from
            continue
        own += 1
        assert (
            main(["run", *arguments, *quick, *embedded(loaded.recipe, people), *narrow(loaded.recipe), "--dry-run"])
            == 0
        )
        assert "nothing was written to the run folder" in capsys.readouterr().out
    assert own, "a recipe's header says how to run it"


@pytest.mark.parametrize("blocks", ["{type: all, adapter: {type: lora}}", "{type: entprog, inputs: never}"])
def test_a_condition_that_would_never_be_learned_is_refused(people: Path, blocks: str, capsys, monkeypatch) -> None:
    """A text-to-video model's first layer, widened, does not read it yet."""
    monkeypatch.chdir(ROOT)
    recipe = load("entprog/wan_1.3b_full").recipe
    quick = ["training.batch_size=4", "training.precision=no", *embedded(recipe, people)]
    assert main(["run", "entprog/wan_1.3b_full", *quick, f"blocks={blocks}", "--dry-run"]) == 2
    assert "patch_embedding does not read the poses yet" in capsys.readouterr().err


def test_all_recipes_validate_and_are_counted(capsys):
    assert main(["validate", str(ROOT / "recipes")]) == 0
    assert f"{len(RECIPES)} recipes" in capsys.readouterr().out


def test_every_topic_has_a_page():
    assert len(RECIPES) >= 5
    for folder in {path.parent for path in RECIPES}:
        assert (folder / "README.md").exists(), folder
