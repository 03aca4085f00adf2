"""Trained here, pushed, and loaded back from the Hub: by strangers with plain diffusers, by our verbs, by recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from server import STRANGER, TOKEN, Hub
from tiny import DIT, FLOW, tiny

from entrecipes import InfoNoiseScheduler
from entrecipes.cli import main
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.hub import push

BRANCH = "images-160"
LEARNED = {"type": "infonoise", "warmup": 48, "ramp": 48, "refresh_every": 32, "buffer": 100}
SMALL = {"max_images": 100}

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder: Path, recipe: dict) -> Path:
    """A run of the recipe, in this process."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "recipe.yaml"), f"training.output={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that learned its noise schedule."""
    return trained(tmp_path_factory.mktemp("round") / "first", tiny(DIT, FLOW, noise=LEARNED, data=SMALL))


STRANGERS = """
import sys
sys.modules["entrecipes"] = None
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
folder, repository, branch, commit = sys.argv[1:]
found = []
for place, revision in ((folder, None), (repository, branch), (repository, commit)):
    pipeline = DiffusionPipeline.from_pretrained(place, revision=revision)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found.append(pipeline([3, 7], num_inference_steps=4, generator=generator, output_type="np").images)
assert (found[0] == found[1]).all() and (found[0] == found[2]).all() and found[0].std() > 0
exec(open("snippet.py").read(), {})
"""


def test_a_stranger_gets_the_same_samples_bit_for_bit(hub: Hub, finished: Path, tmp_path: Path) -> None:
    """In a process without entrecipes, whose connection breaks and whose Hub is slow; by the card's own lines, too."""
    pushed = push(finished, "me/tiny", revision=BRANCH)
    card = hub.repository("me/tiny").files(BRANCH)["README.md"].decode()
    (tmp_path / "snippet.py").write_text(card.split("```python\n")[1].split("```")[0])
    hub.fail("GET", "/storage/", cut="download")
    hub.fail("GET", "/api/models/", delay=0.5, times=2)
    command = [sys.executable, "-c", STRANGERS, finished / "pipeline", "me/tiny", BRANCH, pushed.commit]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert not [fault for fault in hub.faults if fault.times > 0], "all of it went wrong once"
    assert TOKEN not in done.stdout + done.stderr + card


def test_the_verbs_take_what_was_pushed(
    hub: Hub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate`, `diagnose` and `generate` take a branch, and what `pull` makes of it, with the recipe in it."""
    push(finished, "me/tiny", revision=BRANCH)
    monkeypatch.chdir(tmp_path)
    named = f"me/tiny@{BRANCH}"
    hub.fail("GET", "/resolve/.*/recipe.yaml", status=503)
    monkeypatch.setattr("entrecipes.reference.PAUSES", (0.01,))
    assert main(["pull", named]) == 0
    pulled = f"outputs/me--tiny--{BRANCH}"
    assert "the run recipe: 160 images of digits" in capsys.readouterr().out
    for number, place in enumerate((str(finished), named, pulled)):
        assert main(["evaluate", place, "-o", f"{number}.json"]) == 0
    measured = [json.loads(Path(f"{number}.json").read_text())[0]["value"] for number in range(3)]
    assert measured[0] == measured[1] == measured[2]
    small = ["--images", "8", "--levels", "8"]
    assert main(["diagnose", named, *small]) == 0 and "learned" in capsys.readouterr().out
    assert Path(f"outputs/diagnose/me--tiny--{BRANCH}/diagnosis.json").is_file()
    assert main(["diagnose", pulled, *small]) == 0 and Path(pulled, "diagnosis/diagnosis.json").is_file()
    grids = []
    for place in (str(finished), named, pulled):
        assert main(["generate", place, "-n", "2", "--labels", "3", "--steps", "2", "-o", "grid.png"]) == 0
        grids.append(Path("grid.png").read_bytes())
    assert grids[0] == grids[1] == grids[2]

    learned = [
        InfoNoiseScheduler.from_pretrained(place, subfolder="infonoise", revision=revision)
        for place, revision in ((finished / "pipeline", None), ("me/tiny", BRANCH), (pulled, None))
    ]
    assert learned[0].profile is not None
    assert all(torch.equal(one.profile.x0_error, learned[0].profile.x0_error) for one in learned)


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_branch_and_comes_back(
    hub: Hub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(finished, "me/tiny", revision=BRANCH)
    monkeypatch.chdir(tmp_path)
    adapter = {"type": "all", "adapter": {"type": "lora", "rank": 2}}
    recipe = tiny(DIT, FLOW, blocks=adapter, data=SMALL, training={"images": 32})
    run = trained(tmp_path / "second", recipe | {"pipeline": {"pretrained": f"me/tiny@{BRANCH}"}})
    base = json.loads((run / "adapter" / "base.json").read_text())
    assert (base["source"], base["revision"], base["local"]) == ("me/tiny", BRANCH, False)
    push(run, "me/lora", private=True)

    own = load_pipeline(str(run)).transformer.state_dict()
    assert main(["pull", "me/lora"]) == 0 and "an adapter of me/tiny" in capsys.readouterr().out
    for place in ("me/lora", "outputs/me--lora"):
        found = load_pipeline(place).transformer.state_dict()
        assert found.keys() == own.keys() and any(".lora_" in name for name in own)
        assert all(torch.equal(found[name], value) for name, value in own.items())
    assert main(["evaluate", "me/lora"]) == 0

    assert main(["pull", f"me/tiny@{BRANCH}", "-o", "base"]) == 0
    run = trained(tmp_path / "third", recipe | {"pipeline": {"pretrained": "base"}})
    push(run, "me/other")
    found = json.loads(hub.repository("me/other").files()["base.json"])
    commit = hub.repository("me/tiny").resolve(BRANCH).oid
    assert (found["source"], found["revision"], found["local"]) == ("me/tiny", commit, False), "where it was pulled"
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    capsys.readouterr()
    assert main(["pull", "me/lora", "-o", "mine"]) == 2
    said = capsys.readouterr().err
    assert "a private one needs `hf auth login`" in said and STRANGER not in said and not Path("mine").exists()
