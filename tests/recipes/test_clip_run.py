"""Runs on clips, from a folder of GIFs to pipelines that other processes load; on pixels and on latents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from moving import figures
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny
from tiny_video import WAN, wan, wan_vae

from entrecipes import PoseVideoPipeline
from entrecipes.cli import main
from entrecipes.data.skeleton import draw_poses
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.hub import export_shim

MODEL = {"class": "WanTransformer3DModel", "config": {**WAN, "num_layers": 4}}
EULER = {"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}}


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """accelerate keeps its state for the life of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three GIFs of 16 frames with their poses."""
    folder = tmp_path_factory.mktemp("videos")
    clips, keypoints = figures(3, 16, size=16)
    for i in range(3):
        frames = [Image.fromarray(frame) for frame in clips[i].permute(1, 2, 3, 0).numpy()]
        frames[0].save(folder / f"take{i}.gif", save_all=True, append_images=frames[1:], duration=100)
        (folder / f"take{i}.poses.json").write_text(json.dumps(keypoints[i].tolist()))
    return folder


def train(folder: Path, videos: Path, frames: int = 4, **sections: Any) -> Path:
    """A run folder."""
    data = {"type": "video_folder", "path": str(videos), "image_size": 16, "frames": frames, "frame_step": 1}
    evaluation = {"metrics": ["ssim"], "samples": 4, "grid": 2, "reference": "held_out", "batch_size": 4}
    recipe = tiny(MODEL, EULER, data=data | {"min_motion": 0.0, "held_out": 0.3}, evaluation=evaluation)
    recipe["training"] |= {"images": 48}
    recipe |= sections
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "recipe.yaml"), f"training.output={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def finished(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), videos)


def frames_of(path: Path) -> list[Image.Image]:
    with Image.open(path) as image:
        return [image.seek(i) or image.convert("RGB") for i in range(image.n_frames)]


def test_the_card_says_how_plain_diffusers_loads_and_samples(finished: Path, tmp_path: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "image-to-video" in card and "brings its source along" in card and "show people of the data set" in card
    assert [path.name for path in (finished / "pipeline" / "example").iterdir()] == ["poses.gif"], "no real person's"
    Image.new("RGB", (16, 16), "green").save(tmp_path / "person.png")
    snippet = card.split("```python\n")[1].split("```")[0]
    more = """
from diffusers import WanTransformer3DModel

model = WanTransformer3DModel.from_pretrained(f"{folder}/transformer")
assert torch.equal(model.proj_out.weight.cpu(), pipeline.transformer.proj_out.weight.cpu())
torch.save([load_image(person), load_video(f"{example}/poses.gif"), frames[0]], "sampled.pt")
pipeline.save_pretrained("again")
"""
    code = f'import sys\nsys.modules["entrecipes"] = None\n{snippet}\n{more}'
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(frames_of(tmp_path / "samples.gif")) == 4
    reference, poses, theirs = torch.load(tmp_path / "sampled.pt", weights_only=False)
    pipeline = PoseVideoPipeline.from_pretrained(finished / "pipeline")
    generator = torch.Generator().manual_seed(0)
    (ours,) = pipeline(reference, poses, num_inference_steps=2, generator=generator).frames
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), "to the bit"
    assert (tmp_path / "again" / "pipeline.py").read_bytes() == (finished / "pipeline" / "pipeline.py").read_bytes()


def test_an_export_needs_no_name_of_the_file(finished: Path, tmp_path: Path) -> None:
    export_shim(finished / "pipeline", tmp_path / "export")
    assert not list((tmp_path / "export").rglob("from_entrecipes.py")), "its own source, not ours, is imported"
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert type(pipeline).__name__ == "PoseVideoPipeline"


def test_every_verb_takes_the_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = {row["name"]: row["value"] for row in logged if row["kind"] == "metric"}
    assert main(["evaluate", str(finished), "-o", str(tmp_path / "numbers.json")]) == 0
    for metric in json.loads((tmp_path / "numbers.json").read_text()):
        assert metric["value"] == pytest.approx(trained[metric["name"]], rel=1e-4)
    quick = ["--images", "4", "--batch-size", "4"]
    assert main(["score", str(finished), *quick, "--levels", "4"]) == 0
    scores = json.loads((finished / "scores" / "scores.json").read_text())
    assert len(scores["scores"]["cei"] if "scores" in scores else scores["rows"]) == 4
    assert main(["diagnose", str(finished), *quick, "--levels", "8"]) == 0
    assert "WanTransformer3DModel (flow" in capsys.readouterr().out


def test_generate_shows_the_runs_own_clips(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["-n", "2", "--steps", "2"]
    each = ["--separate", str(tmp_path / "each")]
    assert main(["generate", str(finished), *options, "-o", str(tmp_path / "clips.gif")]) == 0
    assert "2 clips of 4 frames" in capsys.readouterr().out
    moving = frames_of(tmp_path / "clips.gif")
    assert len(moving) == 4 and moving[0].size == (3 * 96, 2 * 96), "reference, poses, generated; a clip a row"
    assert main(["generate", str(finished / "pipeline"), *options, "-o", str(tmp_path / "strip.png"), *each]) == 0
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "each" / "00001.png") as alone:
        assert strip.size == (5 * 96 + 8, 4 * 96 + 12), "poses over generated frames, the reference on the left"
        shown = strip.crop((4 + 96, 8 + 3 * 96, 4 + 5 * 96, 8 + 4 * 96))
        assert np.array_equal(shown, alone.resize((4 * 96, 96), Image.Resampling.NEAREST))
    assert main(["generate", str(finished), *options, "-o", str(tmp_path / "x.gif"), *each]) == 0
    assert [frame.size for frame in frames_of(tmp_path / "each" / "00001.gif")] == [(16, 16)] * 4
    pytest.importorskip("cv2")
    assert main(["generate", str(finished), *options, "-o", str(tmp_path / "clips.mp4")]) == 0
    assert (tmp_path / "clips.mp4").stat().st_size > 1000


def test_generate_takes_poses_of_every_kind_alike(finished: Path, videos: Path, tmp_path: Path) -> None:
    poses = json.loads((videos / "take1.poses.json").read_text())
    maps = [Image.fromarray(frame.transpose(1, 2, 0)) for frame in draw_poses(np.array(poses), 16)[:8]]
    (tmp_path / "maps").mkdir()
    for i, picture in enumerate(maps):
        picture.save(tmp_path / "maps" / f"{i:03d}.png")
    maps[0].save(tmp_path / "maps.gif", save_all=True, append_images=maps[1:], duration=100)
    frames_of(videos / "take0.gif")[0].resize((40, 32)).save(tmp_path / "person.png")
    written = []
    for name in (videos / "take1.poses.json", tmp_path / "maps", tmp_path / "maps.gif"):
        output = tmp_path / f"{len(written)}.png"
        asked = ["--reference", str(tmp_path / "person.png"), "--poses", str(name), "--frame-step", "2"]
        assert main(["generate", str(finished), *asked, "--steps", "2", "-o", str(output)]) == 0
        written.append(np.asarray(Image.open(output)).astype(int))
    assert written[0].std() > 0 and np.array_equal(written[0], written[1])
    assert np.abs(written[0] - written[2]).mean() < 2, "a GIF's palette"


def test_what_generate_cannot_use_is_said(finished: Path, videos: Path, tmp_path: Path, capsys: Any) -> None:
    person, poses = tmp_path / "person.png", videos / "take1.poses.json"
    frames_of(videos / "take0.gif")[0].save(person)
    (tmp_path / "notes.txt").write_text("no poses")
    (tmp_path / "broken.json").write_text("[[1, 2]]")
    (tmp_path / "empty").mkdir()
    refused = {
        "go together": ["--poses", poses],
        "no picture can be read .no such file": ["--reference", tmp_path / "nobody.png", "--poses", poses],
        "no picture can be read .not an image": ["--reference", tmp_path / "notes.txt", "--poses", poses],
        "neither a video": ["--reference", person, "--poses", tmp_path / "notes.txt"],
        "not frames x 13": ["--reference", person, "--poses", tmp_path / "broken.json"],
        "no pictures in it": ["--reference", person, "--poses", tmp_path / "empty"],
        "no such file or folder": ["--reference", person, "--poses", tmp_path / "nothing.gif"],
        "16 poses, but a clip has 20": ["--reference", person, "--poses", poses, "--frames", 20],
        "4 poses with --frame-step 4, but": ["--reference", person, "--poses", poses, "--frame-step", 4, "--frames", 5],
        "own clips have 4": ["--frames", 5],
        "unconditional": ["--labels", "1"],
        "name it": ["-o", tmp_path / "clips.txt"],
    }
    for message, options in refused.items():
        assert main(["generate", str(finished), "--steps", "1", *map(str, options)]) == 2, message
        assert re.search(message, capsys.readouterr().err), message


def test_a_text_to_video_pipeline_is_trained_on_latents(videos: Path, tmp_path: Path, capsys: Any) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    model, vae = wan(in_channels=4, out_channels=4), wan_vae()
    WanPipeline(None, None, vae, scheduler, model).save_pretrained(tmp_path / "wan")
    pipeline = {"pretrained": str(tmp_path / "wan")}
    run = train(tmp_path, videos, frames=5, pipeline=pipeline)
    facts = json.loads((run / "run.json").read_text())["pipeline"]
    assert facts["latent"] and facts["class"] == "PoseVideoPipeline" and facts["scheduler_class"].startswith("UniPC")
    weights = load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["patch_embedding.weight"].shape[1] == 12 and weights["patch_embedding.weight"][:, 4:].any()
    kept = load_file(run / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in vae.state_dict().items())
    assert main(["generate", str(run), "-n", "1", "--steps", "1", "-o", str(tmp_path / "clip.gif")]) == 0
    assert len(frames_of(tmp_path / "clip.gif")) == 5
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()
    for change, message in (
        ("data.frames=4", "data.frames: 4, but the VAE makes one latent frame .* take 5 or 9"),
        ("data.image_size=24", "data.image_size: 24, but the model takes multiples of 16"),
        ("curriculum={type: phases, phases: [{frames: 1}]}", "phases cuts clips, and the data are latents"),
    ):
        assert main(["run", str(tmp_path / "recipe.yaml"), f"training.output={tmp_path / 'no'}", change]) == 2
        assert re.search(message, capsys.readouterr().err), change


def test_an_adapter_beside_a_text_to_video_pipeline_loads_by_its_card(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    base = WanPipeline(None, None, wan_vae(), scheduler, wan(in_channels=4, out_channels=4))
    base.save_pretrained(tmp_path / "wan")
    adapter = {"type": "lora", "rank": 2, "targets": ["*.to_[qkv]", "patch_embedding"]}
    sections = {"blocks": {"type": "all", "adapter": adapter}, "optimizer": {"type": "adamw", "learning_rate": 0.01}}
    run = train(tmp_path, videos, frames=5, pipeline={"pretrained": str(tmp_path / "wan")}, **sections)
    assert (run / "adapter" / "pipeline.py").exists() and not (run / "pipeline").exists()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "green").save("person.png")
    plain: dict[str, Any] = {}
    exec((run / "README.md").read_text().split("```python\n")[1].split("```")[0], plain)
    asked = {"num_inference_steps": 2, "output_type": "pt"}
    condition = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    pipelines = (load_pipeline(str(run)), plain["pipeline"], PoseVideoPipeline.from_pretrained(tmp_path / "wan"))
    ours, theirs, without = (
        p(condition=condition, generator=torch.Generator().manual_seed(0), **asked).frames for p in pipelines
    )
    assert torch.equal(ours, theirs) and not torch.allclose(ours, without, atol=1e-3)
    assert main(["generate", str(run), "-n", "1", "--steps", "1", "-o", str(tmp_path / "clip.gif")]) == 0
