"""Modules of the user's own: those of docs/your-*.md, each in a process of its own, and the mistakes that are named."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from doc_blocks import ROOT, blocks

from entrecipes.diffusion.pipelines import load_components
from entrecipes.errors import UserError
from entrecipes.evaluation.own import measure_own
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load
from entrecipes.recipe.plugins import admit_registered
from entrecipes.recipe.tree import RecipeError


def in_child(work: Callable[[], None]) -> None:
    """Run it where what it registers ends with it; its exception is the test's."""

    def call() -> None:
        try:
            work()
            theirs.send("")
        except BaseException:
            theirs.send(traceback.format_exc())

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=call)
    child.start()
    said = ours.recv()
    child.join()
    assert not said, said


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The named files of a page of docs/, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / f"docs/your-{request.param}.md"):
        if block.name:
            (tmp_path / block.name).write_text(block.text)
    return tmp_path


def test_without_plugins_nothing_is_made_anew() -> None:
    assert admit_registered() is False


@pytest.mark.parametrize("page", ["metric"], indirect=True)
def test_a_metric_and_an_extractor_of_ones_own(page: Path) -> None:
    def work() -> None:
        with pytest.raises(RecipeError, match="expected fid, kid"):
            load("digits/demo", ["evaluation.metrics=[ink_gap]"])
        loaded = load("measured.yaml")
        assert loaded.warnings == [] and "plugins: [my_metrics]" in loaded.resolved_yaml()
        section = loaded.recipe.evaluation
        with pytest.raises(RecipeError) as wrong:
            load("measured.yaml", ["evaluation.metrics=[ink_gaps]", "evaluation.features.widht=3"])
        assert "did you mean 'ink_gap'?" in str(wrong.value) and "did you mean 'width'?" in str(wrong.value)
        real = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
        options = {"extractor": lambda: build("features", section.features), "batch_size": 7, "seed": 0, "origin": {}}
        ink, centroid = measure_own(section.metrics, real, real + 51, **options)
        assert (ink.name, ink.value, ink.spread, ink.higher_is_better) == ("ink_gap_20", 51, None, False)
        assert centroid.name == "centroid_gap_projection32_20" and centroid.value > 0 and centroid.spread == 0
        assert centroid.origin["plugin"] == "my_metrics" and "projection" in centroid.origin["extractor"]
        assert measure_own(section.metrics, real, real, **options)[1].value == 0
        with pytest.raises(UserError, match="'ink_gap' of my_metrics failed: AttributeError"):
            measure_own(["ink_gap"], real, [], **options)

    in_child(work)


@pytest.mark.parametrize("page", ["model"], indirect=True)
def test_a_model_of_ones_own(page: Path) -> None:
    def work() -> None:
        with pytest.raises(RecipeError, match="MixerModel does not denoise stickers.*take DFGNModel"):
            load("mixer.yaml", ["data={type: stickers}"])
        components = load_components(load("mixer.yaml").recipe.pipeline)
        assert type(components.model).__name__ == "MixerModel" and components.image_size == 8
        components.pipeline().save_pretrained("saved")
        again = DDIMPipeline.from_pretrained("saved")
        x, time = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
        assert torch.equal(again.unet(x, time).sample, components.model(x, time).sample)

    in_child(work)


@pytest.mark.parametrize("page", ["data"], indirect=True)
def test_data_of_ones_own(page: Path) -> None:
    def work() -> None:
        section = load("shapes.yaml").recipe.data
        splits = build("data", section, image_size=8, channels=1)
        assert (len(splits.train), len(splits.held_out)) == (1800, 200)
        assert splits.train.tensor.shape[1:] == (1, 8, 8) and splits.train.label_names == ("disc", "square")
        assert 0 < splits.train.tensor.float().mean() < 128

    in_child(work)


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("no_such_plugin", None, "there is no module 'no_such_plugin'; put no_such_plugin.py into the working"),
        ("my_metrics.py", "", "'my_metrics.py' is not how Python imports a module; write its name, such as my_metrics"),
        ("broken_plugin", "1 / 0", "broken_plugin can't be imported: ZeroDivisionError: division by zero"),
        ("hungry_plugin", "import no_such_library", "No module named 'no_such_library'; install what it needs"),
        (
            "greedy_plugin",
            "from entrecipes.recipe.evaluation import own_metric\nown_metric('kid')(len)",
            "greedy_plugin can't be imported: ValueError: metric 'kid' is registered twice",
        ),
    ],
)
def test_mistakes_stand_at_their_line(name, code, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / name).with_suffix(".py").write_text(code)
    (tmp_path / "mine.yaml").write_text(f"extends: digits/demo\nplugins:\n  - {name}\n")

    def work() -> None:
        with pytest.raises(RecipeError) as wrong:
            load("mine.yaml")
        assert str(wrong.value).startswith("mine.yaml:3: plugins: ") and said in str(wrong.value)

    in_child(work)
