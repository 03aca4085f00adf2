"""`entrecipes diagnose` end to end: a run of ours, a stock pipeline folder, and whatever a user may get wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny

from entrecipes.cli import main
from entrecipes.recipe.load import load

FAST = ["--images", "16", "--levels", "12"]
DIGITS = ["--data", "{type: digits}"]


def unet(**keys) -> diffusers.UNet2DModel:
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    return diffusers.UNet2DModel(**config | keys)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, a tiny InfoNoise run; `ddpm`, saved by diffusers; `classes`, class-conditional; and others that fail."""
    folder = tmp_path_factory.mktemp("diagnose")
    recipe = tiny(noise={"type": "infonoise", "bins": 32, "warmup": 32, "refresh_every": 32})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "tiny.yaml"), f"training.output={folder / 'run'}"]) == 0
    ddpm = diffusers.DDPMScheduler()
    for name, model, scheduler in (
        ("ddpm", unet(), ddpm),
        ("classes", unet(num_class_embeds=10), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("scores", unet(), diffusers.ScoreSdeVeScheduler()),
        ("variance", unet(out_channels=2), ddpm),
    ):
        diffusers.DDPMPipeline(model, scheduler).save_pretrained(folder / name)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler()).save_pretrained(folder / "latents")
    vq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    diffusers.LDMPipeline(vq, unet(), diffusers.DDIMScheduler()).save_pretrained(folder / "ldm")
    for name in ("cut", "unknown"):
        shutil.copytree(folder / "ddpm", folder / name)
    weights = folder / "cut/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "unknown/model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: Path) -> dict:
    """The JSON, after a look at the other files."""
    with Image.open(folder / "diagnosis.png") as image:
        assert image.size == (960, 960) and len(np.unique(np.asarray(image.convert("L")))) > 50
    return json.loads((folder / "diagnosis.json").read_text())


def test_a_run_is_held_against_what_it_learned(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(folders / "run"), *FAST]) == 0
    said = capsys.readouterr().out
    found = written(folders / "run/diagnosis")
    assert "16 held-out images of digits" in said and "192 passes" in said
    assert "trained with  infonoise, " in said and "bins 32 (as the run had learned it by 160 images)" in said
    rows = [json.loads(line) for line in (folders / "run/metrics.jsonl").read_text().splitlines()]
    density = [row for row in rows if row["kind"] == "noise"][-1]["density"]
    assert found["curves"]["this_draws"] == pytest.approx(np.repeat(density, 4), rel=1e-3), "32 bins shown as 128"
    for key in ("draws", "effective", "loss"):
        shares = found["shares"]["this"][key]
        assert shares["outside"] == pytest.approx(shares["below"] + shares["above"])
        assert f"{100 * shares['outside']:5.1f} %" in said
    low, high = found["window_sigma"]
    assert f"sigma {low:.3g} to {high:.3g}" in said and 0 < found["nats"]["gated"] < found["nats"]["ungated"]


def test_what_it_writes_can_be_used(folders: Path) -> None:
    assert main(["diagnose", str(folders / "run"), *FAST, "-o", "out"]) == 0
    found, text = written(Path("out")), Path("out/noise.yaml").read_text()
    fixed = "\n".join(line.removeprefix("# ") for line in text.splitlines()[-4:])
    for name, section in (("infonoise", text), ("log_normal", fixed)):
        Path("mine.yaml").write_text(f"extends: digits/flow\n{section}\n")
        noise = load("mine.yaml").recipe.noise
        assert noise.type == name and noise.model_dump() == found["recommended"][name]
    from entrecipes import InfoNoiseScheduler

    scheduler = InfoNoiseScheduler.from_pretrained("out/infonoise")
    assert scheduler.as_sigmas(20) == pytest.approx(found["sampling"]["steps"]["20"]["sigmas"])
    assert [len(steps["sigmas"]) for steps in found["sampling"]["steps"].values()] == [10, 20, 50]


def test_a_pipeline_saved_by_diffusers(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(folders / "ddpm"), *DIGITS, *FAST]) == 0
    said = capsys.readouterr().out
    assert "UNet2DModel (vp, epsilon) on 16 images of digits" in said
    assert (
        "trained with  uniform (assumed: say --noise if it was trained otherwise), objective.weighting none (assumed)"
        in said
    )
    assert written(Path("outputs/diagnose/ddpm"))["split"] == "train"


def test_a_class_conditional_flow_with_what_it_was_trained_with(folders: Path, capsys) -> None:
    noise = ["--noise", "{type: log_normal, mean: 0, std: 1}", "--weighting", "min_snr"]
    assert main(["diagnose", str(folders / "classes"), "--recipe", "digits/flow", *noise, *FAST, "-o", "out"]) == 0
    said = capsys.readouterr().out
    assert "trained with  log_normal, mean 0.0, std 1.0, objective.weighting min_snr\n" in said
    found = written(Path("out"))
    assert found["split"] == "held_out" and found["path"] == "flow" and "assumed" not in said
    assert max(found["sampling"]["steps"]["10"]["sigmas"]) < 1, "times"


def test_latents(folders: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRECIPES_HOME", "home")
    assert main(["diagnose", str(folders / "latents"), *DIGITS, *FAST, "-o", "out"]) == 0
    assert "DiTTransformer2DModel (vp, epsilon) on 16 images of digits" in capsys.readouterr().out
    assert written(Path("out"))["dimensions"] == 4 * 4 * 4


MISTAKES = {
    "no data": (["ddpm"], "no recipe.yaml in it; say which data"),
    "no pipeline": (["nowhere", *DIGITS], "nowhere: no such folder"),
    "data without a section": (["ddpm", "--data", "digits"], "data: expected a section"),
    "no such data": (["ddpm", "--data", "{type: digit}"], "did you mean 'digits'"),
    "no data folder": (["ddpm", "--data", "{type: folder, path: nope}"], "the folder nope does not exist"),
    "another size": (["ddpm", "--data", "{type: digits, image_size: 16}"], "the model takes 8 px"),
    "sequences for images": (
        ["ddpm", "--data", "{type: sequences}"],
        "but a UNet2DModel denoises images; take other data",
    ),
    "no such noise": (["ddpm", *DIGITS, "--noise", "{type: infonose}"], "did you mean 'infonoise'"),
    "no such weighting": (["ddpm", *DIGITS, "--weighting", "minsnr"], "did you mean 'min_snr'"),
    "no such recipe": (["ddpm", "--recipe", "digits/dmo"], "did you mean 'digits/demo'"),
    "too few images": (["ddpm", *DIGITS, "--images", "1"], "--images 1: at least 2"),
    "too few levels": (["ddpm", *DIGITS, "--levels", "3"], "--levels 3: at least 8"),
    "another scheduler": (["scores", *DIGITS], "ScoreSdeVeScheduler is not supported"),
    "learned variance": (["variance", *DIGITS], "a learned variance is not supported"),
    "another pipeline": (["ldm", *DIGITS], "LDMPipeline also carries vqvae"),
    "damaged weights": (["cut", *DIGITS], "no DiffusionPipeline could be loaded"),
    "unknown class": (["unknown", *DIGITS], "NoSuchPipeline"),
    "empty folder": (["empty", *DIGITS], "no file named model_index.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(folders: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline, *options), said = MISTAKES[name]
    assert main(["diagnose", str(folders / pipeline), *options, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and said in error, error
    assert not Path("out").exists(), "nothing may be left behind"


def test_help_imports_no_torch() -> None:
    code = "import sys; from entrecipes.cli import main; main(['diagnose', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--weighting NAME" in done.stdout, done.stderr
