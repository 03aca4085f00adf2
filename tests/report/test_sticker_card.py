"""The card and the report of runs on stickers: what they tell, and that their snippets run."""

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
from PIL import Image
from tiny_stickers import CAPTIONS, FRAMES, SIDE, save_stickers, train_stickers

from entrecipes.data.sources.stickers import LICENSE
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.recipe.masks import TASKS
from entrecipes.report.card import write_card
from entrecipes.report.report import write_report
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.snippet import snippet
from entrecipes.report.stickers import draw_sticker_plots, stickers


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stickers")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    return train_stickers(folder, save_stickers(folder))


def code_of(card: Path) -> str:
    return card.read_text().split("```python\n")[1].split("```")[0]


def test_the_card_tells_of_tasks_texts_and_data(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["pipeline_tag"] == "text-to-video" and "StickerPipeline" in about["tags"]
    section = re.search(r"## Stickers\n(.*?)\n## ", card, re.DOTALL)[1]
    for said in (
        "i2v, t2v, it2v, interpolation, pre_frame_prediction, post_frame_prediction |",
        "one task a sample, 2 to 4 frames of each clip, 10% of the samples are given nothing",
        "| Curriculum | adaptive: ",
        "RDTF (arXiv 2503.17735)",
        "5 tokens of 12 channels",
        "6 moving and 2 still to train on, 4 frames of 8 px",
        "2 moving clips; no drawing, in whatever skin tone, is on both sides",
        f"| Licence of the data | {LICENSE} |",
        "![How likely each task was to be drawn",
        "![Measured difficulty of each task",
    ):
        assert said in section, said
    assert "Only diffusers, transformers and torch are needed." in card
    assert "| Training clips | 8 |" in card and "Clips seen in training" in card and "clips/s" in card
    assert "the frames that are given (the others grey)" in card and "Captions, from the top: a " in card
    assert "None" not in card and "{{" not in card and "show people" not in card and "Other ways" not in card


def test_the_report_shows_the_odds_and_nats_that_were_logged(finished: Path) -> None:
    run = stickers(RunFolder(finished))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if row["kind"] == "train"]
    odds = np.array([run.column("odds", task) for task in run.tasks])
    assert run.tasks == TASKS[:-1] and odds.shape == (6, len(logged)) and np.allclose(odds.sum(0), 1, atol=1e-3)
    [table] = run.tables()
    [row] = [row for row in table.rows if row[0] == "interpolation"]
    shares = [row["odds"]["interpolation"] for row in logged]
    assert row[3:6] == [f"{share:.1%}" for share in (shares[0], np.mean(shares), shares[-1])]
    html = write_report(finished).read_text()
    section = html.split('<section id="stickers">')[1].split("</section>")[0]
    assert section.count("<img") == 2 and "<td>frames on both sides of those to be made</td>" in section
    assert "A clip a row: what is given" in html and "Captions, from the top: " in html and "Training clips" in html
    for path in draw_sticker_plots(RunFolder(finished)).values():
        with Image.open(path) as image:
            assert image.size[0] == 960 and np.asarray(image.convert("L")).std() > 20


def test_a_run_without_a_curriculum_has_equal_odds_and_no_plot(finished: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["curriculum"], recipe["masks"] = {"type": "none"}, {"type": "dual", "tasks": ["t2v", "i2v"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = stickers(RunFolder(tmp_path))
    assert [row[:4] for row in run.tables()[0].rows] == [
        ["t2v", "no frame", "yes", "50.0%"],
        ["i2v", "one frame", "no", "50.0%"],
    ]
    assert not draw_sticker_plots(RunFolder(tmp_path)) and dict(run.rows())["Curriculum"].startswith("none: ")
    assert "Stickers</h2>" in write_report(tmp_path).read_text(), "while it is still going on"


def test_the_snippet_makes_a_sticker_without_entrecipes(finished: Path, tmp_path: Path) -> None:
    code = code_of(finished / "README.md")
    assert code == code_of(finished / "pipeline" / "README.md") and "import entrecipes" not in code
    assert any(f'prompt="{caption}"' in code for caption in CAPTIONS) and "frames={0: load_image(picture)}" in code
    with Image.open(finished / "pipeline" / "example" / "frame.png") as image:
        assert image.size == (SIDE, SIDE)
    more = 'import numpy as np\nnp.save("sampled.npy", np.stack([np.asarray(frame) for frame in frames[0]]))'
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", f'import sys\nsys.modules["entrecipes"] = None\n{code}\n{more}']
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "samples.gif") as image:
        assert (image.n_frames, image.size) == (FRAMES, (SIDE, SIDE))
    names: dict[str, Any] = {}
    arguments = code[code.index("frames = pipeline(") : code.index("pipeline.save_animation")]
    names |= {"pipeline": load_pipeline(str(finished)), "torch": torch, "load_image": Image.open}
    names["picture"] = finished / "pipeline" / "example" / "frame.png"
    exec(arguments, names)
    ours = np.stack([np.asarray(frame) for frame in names["frames"][0]])
    assert np.array_equal(ours, np.load(tmp_path / "sampled.npy")), "to the bit"


def test_what_may_show_people_or_follows_no_text_is_asked_for_otherwise(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert run["data"]["rendered"], "emoji are drawings"
    run["data"]["rendered"] = False
    assert 'picture = "frame.png"  # yours' in snippet(run, "someone/stickers")
    run["stickers"]["example"] = {"caption": None, "frame": False}
    code = snippet(run, "someone/stickers")
    assert "load_image" not in code and "prompt" not in code and 'folder = "someone/stickers"' in code
    run["data"]["rendered"], run["stickers"]["example"] = True, {"caption": 'a "cat"', "frame": True}
    code = snippet(run, "someone/stickers")
    assert 'picture = "https://huggingface.co/someone/stickers/resolve/main/example/frame.png"' in code
    compile(code, "snippet", "exec")


@pytest.mark.parametrize("kind", ["lora", "simda", "i2v_adapter"])
def test_an_adapters_snippet_puts_it_on_its_base(
    kind: str, folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"type": kind} | ({"rank": 2, "targets": ["*temporal_attentions*.to_q"]} if kind == "lora" else {})
    sections = {
        "pipeline": {"pretrained": str(finished)},
        "blocks": {"type": "all", "adapter": adapter},
        "curriculum": {"type": "none"},
        "masks": {"type": "dual", "tasks": ["it2v"], "lengths": [4, 4]},
        "optimizer": {"type": "adamw", "learning_rate": 0.05},
    }
    run = train_stickers(folder, folder / "set", kind, **sections)
    card, code = (run / "adapter" / "README.md").read_text(), code_of(run / "README.md")
    names = {"lora": "A LoRA adapter", "simda": "A SimDA adapter", "i2v_adapter": "An I2V-Adapter"}
    assert f"{names[kind]} for `{finished}`" in card and "entrecipes" not in code
    assert ("peft" in card.split("## Load it")[1].split("```")[0]) == (kind == "lora")
    monkeypatch.chdir(tmp_path)
    exec(code, plain := {})
    assert (tmp_path / "samples.gif").exists()
    asked = {"prompt": "a red cat", "num_frames": FRAMES, "num_inference_steps": 2, "output_type": "pt"}
    asked["frames"] = {0: Image.new("RGB", (SIDE, SIDE), "green")}
    pipelines = plain["pipeline"], load_pipeline(str(run)), load_pipeline(str(finished))
    theirs, ours, base = (p(**asked, generator=torch.Generator().manual_seed(0)).frames for p in pipelines)
    assert torch.equal(theirs, ours) and not torch.allclose(ours, base, atol=1e-4)
    assert write_card(run).read_text() == (run / "adapter" / "README.md").read_text()
