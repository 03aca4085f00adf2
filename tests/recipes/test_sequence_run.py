"""A run on labelled sequences, from a prepared folder to a pipeline that another process loads by its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import FLOW, SEQUENCE, TEXT, tiny, tiny_recipe

from entrecipes.cli import main
from entrecipes.errors import UserError
from entrecipes.training.run import Run

DNA = {
    **SEQUENCE,
    "config": {**SEQUENCE["config"], "sample_size": 12, "alphabet": "ACGT", "num_class_embeds": 3, "patch_size": 2},
}


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """accelerate keeps its state for the life of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `entrecipes data prepare splice` would leave: 120 sequences of 12 bases in 3 classes."""
    folder = tmp_path_factory.mktemp("prepared") / "junctions"
    random = np.random.default_rng(0)
    rows = [{"sequence": "".join(random.choice(list("ACGT"), 12)), "label": "abc"[i % 3]} for i in range(120)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    noted = {"name": "junctions", "source": "Random bases.", "license": "CC0", "options": {}, "images": 120}
    (folder / "prepared.json").write_text(json.dumps(noted | {"alphabet": "ACGT", "independent": True}))
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a class-conditional flow model."""
    place = tmp_path_factory.mktemp("run")
    evaluation = {"metrics": ["ngrams"], "samples": 12, "reference": "held_out"}
    recipe = tiny(DNA, FLOW, data={"type": "sequences", "name": str(folder)}, evaluation=evaluation)
    (place / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(place / "r.yaml"), f"training.output={place / 'out'}"]) == 0
    return place / "out"


def test_numbers_pictures_and_texts_are_left(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    metrics = {metric["name"]: metric for metric in run["metrics"]}
    assert list(metrics) == [
        "heldout_nats", "heldout_nats_per_symbol", "ngram1_tv_12", "ngram2_tv_12", "ngram3_tv_12",
    ]  # fmt: skip
    assert metrics["heldout_nats"]["value"] == pytest.approx(12 * metrics["heldout_nats_per_symbol"]["value"])
    assert metrics["ngram3_tv_12"]["origin"]["split"] == "held_out" and run["data"]["label_names"] == ["a", "b", "c"]
    texts = (finished / "samples/final.txt").read_text().split()
    assert len(texts) == 3 and all(len(text) == 12 and set(text) <= set("ACGT") for text in texts)
    with Image.open(finished / "samples/final.png") as grid:
        assert len(np.unique(np.asarray(grid).reshape(-1, 3), axis=0)) > 4, "a ground for each base"
    assert "ngram3_tv_12" in (finished / "report.html").read_text()


def test_the_snippet_of_the_card_prints_sequences_in_another_process(finished: Path, tmp_path: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "entrecipes is needed" in card and "Only diffusers and torch" not in card and "image-generation" not in card
    (tmp_path / "snippet.py").write_text(card.split("```python\n")[1].split("```")[0])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "snippet.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    texts = done.stdout.split()
    assert len(texts) == 3 and all(len(text) == 12 and set(text) <= set("ACGT") for text in texts), done.stderr


def test_generate_evaluate_and_training_on_take_the_pipeline(finished: Path, folder: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    assert main(["generate", str(finished), "-n", "4", "--labels", "2,0", "--steps", "2", "-o", str(grid)]) == 0
    assert len((tmp_path / "grid.txt").read_text().split()) == 4 and grid.exists()
    assert main(["evaluate", str(finished), "-o", str(tmp_path / "numbers.json")]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())[0]["value"] == pytest.approx(
        json.loads((finished / "run.json").read_text())["metrics"][0]["value"], rel=1e-4
    )
    data = {"type": "sequences", "name": str(folder)}
    again = Run(tiny_recipe(data=data, pipeline={"build": None, "pretrained": str(finished)}), None)
    assert again.components.family.kind == "sequences" and again.data.num_classes == 3


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({"alphabet": "ACGT"}, {}, "27 symbols.*set pipeline.build.model.config.alphabet"),
        ({}, {"length": 17}, "data.length: 17 symbols, but the model takes 16"),
        ({"num_class_embeds": 3}, {}, "class-conditional, but pride has no labels"),
        ({"sample_size": 60_000}, {}, "no window of 60000 symbols"),
        ({"patch_size": 3}, {}, "patch_size 3 does not divide sample_size 16"),
        ({"in_channels": 4}, {}, "SequenceTransformer1DModel takes no such argument"),
    ],
)
def test_what_does_not_fit_is_said_before_training(config: dict, data: dict, message: str) -> None:
    model = {**SEQUENCE, "config": {**SEQUENCE["config"], **config}}
    with pytest.raises(UserError, match=message):
        Run(tiny_recipe(model, data={**TEXT, **data}), None)


def test_images_for_a_pretrained_sequence_model_are_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="digits holds images, but a SequenceTransformer1DModel denoises seq"):
        Run(tiny_recipe(pipeline={"build": None, "pretrained": str(finished)}), None)
