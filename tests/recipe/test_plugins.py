"""Modules of the user's own: those of docs/your-*.md, and the mistakes that are named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMPipeline
from doc_blocks import ROOT, blocks
from tiny import tiny

from entrecipes.diffusion.families import FAMILIES
from entrecipes.diffusion.pipelines import load_components
from entrecipes.errors import UserError
from entrecipes.evaluation.own import measure_own
from entrecipes.recipe.base import REGISTRY, Section, build
from entrecipes.recipe.evaluation import METRICS, OWN_METRICS
from entrecipes.recipe.load import load
from entrecipes.recipe.pipeline import KIND_OF_MODEL
from entrecipes.recipe.plugins import admit_registered, sections_of
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.tree import RecipeError


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, imports and lets recipes say is gone after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    registries = [METRICS, OWN_METRICS, KIND_OF_MODEL, FAMILIES, *REGISTRY.values()]
    before, modules = [dict(registry) for registry in registries], set(sys.modules)
    fields = [(field, field.annotation) for section in all_sections() for field in section.model_fields.values()]
    yield
    for registry, held in zip(registries, before, strict=True):
        registry.clear()
        registry.update(held)
    for name in {"my_metrics", "my_mixer", "my_shapes"} & (set(sys.modules) - modules):
        del sys.modules[name]
    for field, annotation in fields:
        field.annotation = annotation
    for section in all_sections():
        section.model_rebuild(force=True)


def all_sections(section: type[Section] = Recipe) -> list[type[Section]]:
    """Every section of recipes, those inside before those around them."""
    inside = [found for field in section.model_fields.values() for one in sections_of(field.annotation)
              for found in all_sections(one)]  # fmt: skip
    return list(dict.fromkeys([*inside, section]))


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


@pytest.mark.parametrize("page", ["model"], indirect=True)
def test_a_model_of_ones_own(page: Path) -> None:
    with pytest.raises(RecipeError, match="MixerModel does not denoise stickers.*take DFGNModel"):
        load("mixer.yaml", ["data={type: stickers}"])
    components = load_components(load("mixer.yaml").recipe.pipeline)
    assert type(components.model).__name__ == "MixerModel" and components.image_size == 8
    components.pipeline().save_pretrained("saved")
    again = DDIMPipeline.from_pretrained("saved")
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.equal(again.unet(x, time).sample, components.model(x, time).sample)


@pytest.mark.parametrize("page", ["data"], indirect=True)
def test_data_of_ones_own(page: Path) -> None:
    section = load("shapes.yaml").recipe.data
    splits = build("data", section, image_size=8, channels=1)
    assert (len(splits.train), len(splits.held_out)) == (1800, 200)
    assert splits.train.tensor.shape[1:] == (1, 8, 8) and splits.train.label_names == ("disc", "square")
    assert 0 < splits.train.tensor.float().mean() < 128


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

    with pytest.raises(RecipeError) as wrong:
        load("mine.yaml")
    assert str(wrong.value).startswith("mine.yaml:3: plugins: ") and said in str(wrong.value)


@pytest.mark.parametrize("place", ["pulled", "models--me--net/snapshots/1"])
def test_no_code_is_imported_because_a_recipe_of_the_hub_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "pulled.json").write_text("{}") if place == "pulled" else None
    (tmp_path / "theirs.py").write_text("raise SystemExit('imported')")
    text = yaml.safe_dump({"plugins": ["theirs"], **tiny()})
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="came from the Hub, so that 'theirs' is not imported"):
        load(folder / "recipe.yaml")
    (tmp_path / "copy.yaml").write_text(text)
    with pytest.raises(SystemExit, match="imported"):
        load(tmp_path / "copy.yaml")
