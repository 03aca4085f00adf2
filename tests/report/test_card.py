"""The model card: metadata that parses, numbers with their origin, a snippet that runs without entrecipes."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from report_case import METRICS, RUN, SOURCE, write_run

from entrecipes.errors import UserError
from entrecipes.report.card import snippet, write_card


def front_matter(card: Path) -> dict:
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_metadata_holds_every_metric_as_a_float_with_its_origin(run_folder: Path) -> None:
    data = front_matter(write_card(run_folder))
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "apache-2.0" and "entrecipes" in data["tags"]
    assert "datasets" not in data and "base_model" not in data, "neither data nor weights come from the Hub"
    [model] = data["model-index"]
    assert model["name"] == "digits/unet"
    [result] = model["results"]
    assert result["dataset"] == {"name": "digits", "type": RUN["data"]["name"], "split": "train"}
    assert [metric["type"] for metric in result["metrics"]] == [metric.name for metric in METRICS]
    for written, metric in zip(result["metrics"], METRICS, strict=True):
        assert type(written["value"]) is float and written["value"] == metric.value
        assert written["args"].get("spread") == metric.spread
        known = {key: fact for key, fact in metric.origin.items() if fact is not None}
        assert written["args"]["origin"] == known


def test_card_says_everything_and_leaves_nothing_open(run_folder: Path) -> None:
    text = write_card(run_folder).read_text()
    assert "TODO" not in text and "None" not in text and "{{" not in text
    assert "\n```yaml\n" + SOURCE.strip() + "\n```\n" in text, "the recipe verbatim"
    for row in ("| `kid_efflite0_1k` | 0.0123 ± 0.0008 | lower |", "| `precision_efflite0_1k` | 0.75 | higher |"):
        assert row in text
    assert "extractor EfficientNet-Lite0 at 112 px" in text and "- `kid_efflite0_1k`: subsets 50" in text
    assert "**Reduced size:**" in text and "never with a published FID" in text
    assert "gate pivot 0.2" in text and "180 images" in text, "as many as were held out"
    assert "| Source | scikit-learn \\| load_digits |" in text
    assert "| torch | 2.13.0 |" in text and "| Seed | 3 |" in text and "| Peak memory | 0.71 GiB |" in text
    assert "\nentrecipes run recipe.yaml\n" in text


def test_published_folder_is_whole(run_folder: Path) -> None:
    card = write_card(run_folder, repo_id="someone/digits")
    published = run_folder / "pipeline"
    assert (published / "README.md").read_text() == card.read_text()
    assert (published / "recipe.yaml").read_text() == (run_folder / "recipe.yaml").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.read_text())
    assert len(pictures) == 4
    for base in (run_folder, published):
        for picture in pictures:
            with Image.open(base / picture) as image:
                image.verify()
    assert 'from_pretrained("someone/digits")' in card.read_text()
    assert (run_folder / "assets/samples.png").read_bytes() == (run_folder / "samples/final.png").read_bytes()


def test_path_in_the_card_is_relative_to_where_the_user_stands(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_folder.parents[1])
    assert 'from_pretrained("outputs/digits/pipeline")' in write_card(run_folder).read_text()


def test_hub_data_and_base_model_are_linked(run_folder: Path) -> None:
    recipe = json.loads((run_folder / "recipe.yaml").read_text())
    recipe |= {"data": {"type": "hub", "id": "ylecun/mnist"}, "pipeline": {"pretrained": "google/ddpm-cifar10-32"}}
    (run_folder / "recipe.yaml").write_text(json.dumps(recipe))
    data = front_matter(write_card(run_folder))
    assert data["datasets"] == "ylecun/mnist" and data["base_model"] == "google/ddpm-cifar10-32"
    recipe |= {"data": {"type": "hub", "id": str(run_folder)}, "pipeline": {"pretrained": str(run_folder)}}
    (run_folder / "recipe.yaml").write_text(json.dumps(recipe))
    data = front_matter(write_card(run_folder))
    assert "datasets" not in data and "base_model" not in data
    assert f"It started from the weights of `{run_folder}`." in (run_folder / "README.md").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(run_folder: Path, value: float) -> None:
    record = METRICS[0].to_json() | {"value": value}
    write_run(run_folder, RUN | {"metrics": [record]})
    with pytest.raises(UserError, match="kid_efflite0_1k"):
        write_card(run_folder)
    assert not (run_folder / "README.md").exists()


def test_a_run_without_metrics_has_a_card_without_results(run_folder: Path) -> None:
    write_run(run_folder, RUN | {"metrics": []})
    (run_folder / "metrics.jsonl").unlink()
    text = write_card(run_folder).read_text()
    assert "model-index" not in text and "No metric was measured." in text and "assets/loss.png" not in text


def test_unfinished_run_has_no_card(run_folder: Path) -> None:
    (run_folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json: not there"):
        write_card(run_folder)


PIPELINES = {
    "class-conditional UNet": RUN["pipeline"],
    "unconditional UNet": RUN["pipeline"] | {"num_classes": None},
    "DiT": RUN["pipeline"] | {"class": "DiTPipeline", "num_classes": 3, "guidance_scale": 2.0},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_snippet_is_python_that_loads_the_folder(name: str) -> None:
    code = snippet({"pipeline": PIPELINES[name]}, Path("outputs/x/pipeline"))
    tree = ast.parse(code)
    assert any(isinstance(node, ast.Constant) and node.value == "outputs/x/pipeline" for node in ast.walk(tree))
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"diffusers"}
    assert ("class_labels" in code) == bool(PIPELINES[name]["num_classes"])
    assert ("guidance_scale" in code) == (name == "DiT")


def test_snippets_run_where_entrecipes_cannot_be_imported(tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel

    from entrecipes.diffusion.pixel_vae import build_pixel_vae

    for folder, classes in (("class-conditional UNet", 10), ("unconditional UNet", None)):
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=classes,
        )  # fmt: skip
        ConsistencyModelPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / folder)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    DiTPipeline(transformer, build_pixel_vae(1, 8), DDIMScheduler()).save_pretrained(tmp_path / "DiT")

    code = ["import os, sys", "sys.modules['entrecipes'] = None"]
    for folder, facts in PIPELINES.items():
        code += [snippet({"pipeline": facts | {"steps": 2}}, folder), f"os.rename('samples.png', '{folder}.png')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, facts in PIPELINES.items():
        with Image.open(tmp_path / f"{folder}.png") as image:
            assert image.size == (64 * (facts["num_classes"] or 10), 64)
            assert np.asarray(image).std() > 0
