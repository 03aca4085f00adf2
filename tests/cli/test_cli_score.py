"""`entrecipes score` end to end: a run of ours, a stock pipeline folder, what its files are good for, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import DIT, SEQUENCE, TEXT, UNET, tiny

from entrecipes.blocks.scores import SCORES, BlockScores
from entrecipes.cli import main

FAST = ["--images", "8", "--levels", "4"]
DIGITS = ["--data", "{type: digits, max_images: 200}"]
DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 5}}
INFONOISE = {"type": "infonoise", "bins": 32, "warmup": 32, "refresh_every": 32}
SHORT = ["training.images=64", "evaluation.every=null"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, a tiny InfoNoise run of 5 blocks; `stock`, saved by diffusers; `sequences`; and `unet`, without blocks."""
    folder = tmp_path_factory.mktemp("score")
    recipe = tiny(DEEP, {"class": "DDIMScheduler"}, noise=INFONOISE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "tiny.yaml"), f"training.output={folder / 'run'}", *SHORT]) == 0
    torch.manual_seed(0)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "run/pipeline")
    pipeline.transformer = diffusers.DiTTransformer2DModel(**DEEP["config"])
    pipeline.save_pretrained(folder / "stock")
    small = diffusers.UNet2DModel(**UNET["config"])
    diffusers.DDPMPipeline(small, diffusers.DDPMScheduler()).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: Path) -> dict:
    """The JSON, after a look at the other files."""
    with Image.open(folder / "scores.png") as image:
        assert image.width == 960 and len(np.unique(np.asarray(image.convert("L")))) > 50
    found = json.loads((folder / "scores.json").read_text())
    page = (folder / "scores.md").read_text()
    assert "![Every block at every noise level](scores.png)" in page
    assert all(f"- `{name}`: {SCORES[name]}" in page for name in found["scores"])
    return found


def test_a_run_is_scored_as_it_was_trained(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(folders / "run"), *FAST]) == 0
    said = capsys.readouterr().out
    found = written(folders / "run/scores")
    assert "DiTTransformer2DModel (vp, epsilon), 5 blocks, on 8 training images of digits, each at 4 noise" in said
    assert f"{32 * (1 + 2 + 3):,} passes in" in said
    assert "weighted as the training draws them: infonoise (as the run had learned it by 64 images)" in said
    assert "the head reads its embedder" in said and "named in keep" in said
    assert "blocks        0 to 4 are transformer_blocks" in said

    scores, weights = BlockScores.from_json(folders / "run/scores/scores.json"), torch.tensor(found["noise"]["weights"])
    assert weights.sum() == pytest.approx(1) and weights.max() > 0.3
    for name in SCORES:
        expected = scores.score(name, weights.double())
        assert found["scores"][name] == pytest.approx(expected.tolist()), name
        order = expected.argsort().tolist()
        assert found["removes"][name] == [index for index in order if index not in (0, 4)][:2], name
        assert f"{expected[1]:.3g}" in said
    ranks = [int(row.rpartition("(")[2].split(")")[0]) for row in said.split("magnitude\n")[1].splitlines()[:5]]
    assert [ranks.index(rank) for rank in range(5, 0, -1)] == scores.score("magnitude").argsort().tolist()


def test_a_pipeline_saved_by_diffusers(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gate-pivot", "0", "--no-gradients", "--remove", "0.2"]
    assert main(["score", str(folders / "stock"), *DIGITS, *FAST, *options]) == 0
    said = capsys.readouterr().out
    found = written(Path("outputs/score/stock"))
    assert "uniform (assumed: say --noise if it was trained otherwise)" in said and "not gated" in said
    assert "taylor" not in found["scores"] and found["gate_pivot"] is None and f"{32 * 3} passes" in said
    assert "Which 1 of 5 blocks each score would remove" in said


def test_the_noise_schedule_weighs_the_levels(folders: Path) -> None:
    found = {}
    for name, section in (("low", "{type: log_normal, mean: -3, std: 0.5}"), ("high", "{type: log_normal, mean: 3}")):
        assert main(["score", str(folders / "run"), *FAST, "--noise", section, "-o", name]) == 0
        found[name] = written(Path(name))
    low, high = (found[name]["noise"]["weights"] for name in ("low", "high"))
    assert sum(low[:2]) > 0.95 and sum(high[2:]) > 0.9
    assert found["low"]["scores"]["ced"] != found["high"]["scores"]["ced"]
    assert found["low"]["scores"]["information"] == found["high"]["scores"]["information"]


def test_warnings_are_about_the_score_asked_for(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for score in ("ced", "magnitude"):
        assert main(["score", str(folders / "stock"), *DIGITS, *FAST, "--remove", "0.6", "--score", score]) == 0
        said, found = capsys.readouterr().out, written(Path("outputs/score/stock"))
        rise = found["scores"]["loss_rise"]
        important = max(range(5), key=rise.__getitem__)
        expected = [score] if important in found["removes"][score] else []
        assert [line.split()[1] for line in said.splitlines() if line.startswith("warning:")] == expected


def test_pruning_takes_the_scores_of_the_same_model_and_data(folders: Path, capsys) -> None:
    recipe = tiny(DEEP, {"class": "DDIMScheduler"}) | {"pipeline": {"pretrained": str(folders / "stock")}}
    draws = {"images": 8, "noise_levels": 4, "seed": 3}
    recipe["prune"] = {"type": "one_shot", "score": "ced", "ratio": 0.4, "draws": draws, "scores": "out/scores.json"}
    Path("prune.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["score", str(folders / "stock"), "--recipe", "prune.yaml", "-o", "out"]) == 0
    found = written(Path("out"))
    assert (found["origin"]["images"], len(found["log_sigma"]), found["origin"]["seed"]) == (8, 4, 3)
    assert main(["run", "prune.yaml", "training.output=pruned", *SHORT]) == 0
    record = json.loads(Path("pruned/pruning.json").read_text())
    assert sorted(record["removed"]) == sorted(found["removes"]["ced"])
    assert main(["score", "pruned", *FAST, "--remove", "0.2"]) == 0, "what is left can be scored again"
    capsys.readouterr()
    assert main(["run", "prune.yaml", "training.output=other", "data.max_images=150"]) == 2
    assert "these scores were measured on another data set (digits)" in capsys.readouterr().err


def test_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    deeper = {**SEQUENCE, "config": {**SEQUENCE["config"], "num_layers": 4}}
    Path("text.yaml").write_text(yaml.safe_dump(tiny(deeper, data=TEXT)))
    assert main(["run", "text.yaml", "training.output=text", *SHORT]) == 0
    assert main(["score", "text", *FAST]) == 0
    assert "SequenceTransformer1DModel (edm, epsilon), 4 blocks, on 8 training sequences" in capsys.readouterr().out
    assert written(Path("text/scores"))["dimensions"] == 27 * 16


MISTAKES = {
    "no stack": (["unet", "--data", "{type: folder, path: nope}"], "UNet2DModel can't be pruned by blocks"),
    "no data": (["stock"], "no recipe.yaml in it; say which data"),
    "no such data": (["stock", "--data", "{type: digit}"], "did you mean 'digits'"),
    "no pipeline": (["nowhere", *DIGITS], "nowhere: no such folder"),
    "another size": (["stock", "--data", "{type: digits, image_size: 16}"], "the model takes 8 px"),
    "no such score": (["stock", *DIGITS, "--score", "loss_rises"], "did you mean 'loss_rise'"),
    "nothing like a score": (["stock", *DIGITS, "--score", "x"], "there are information, loss_rise,"),
    "a score that is not measured": (["stock", *DIGITS, "--score", "random"], "there is no score 'random'"),
    "taylor": (["stock", *DIGITS, "--score", "taylor", "--no-gradients"], "leave out --no-gradients"),
    "all blocks": (["stock", *DIGITS, "--remove", "1"], "--remove 1: a share of the blocks between 0 and 1"),
    "too many": (["stock", *DIGITS, "--remove", "0.9"], "would remove 4 of 5 blocks, but only 3 may go"),
    "too few images": (["stock", *DIGITS, "--images", "1"], "--images 1: at least 2"),
    "too few levels": (["stock", *DIGITS, "--levels", "3"], "--levels 3: at least 4"),
    "pivot": (["stock", *DIGITS, "--gate-pivot", "-1"], "--gate-pivot -1.0: at least 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(folders: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline, *options), said = MISTAKES[name]
    assert main(["score", str(folders / pipeline), *options, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and said in error, error
    assert not Path("out").exists(), "nothing may be left behind"


def test_damaged_weights_are_refused(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders / "stock")
    pipeline.transformer.transformer_blocks[2].attn1.to_q.weight.data.fill_(float("nan"))
    pipeline.save_pretrained("damaged")
    assert main(["score", "damaged", *DIGITS, *FAST, "-o", "out"]) == 2
    assert "is not finite" in capsys.readouterr().err and not Path("out").exists()


def test_help_imports_no_torch() -> None:
    code = "import sys; from entrecipes.cli import main; main(['score', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--remove RATIO" in done.stdout, done.stderr
