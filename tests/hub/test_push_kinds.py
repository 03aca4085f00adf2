"""Runs of every kind on the Hub: experts, stickers, adapters, pruned ones, several processes; loaded by their cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from push_case import asks, hashes, titles, token_in, trained, weights
from server import TOKEN, Hub
from tiny import DIT, FLOW, UNET, tiny
from tiny_stickers import save_stickers, train_stickers

from entrecipes.cli import main
from entrecipes.diffusion.pipelines import load_pipeline
from entrecipes.errors import UserError
from entrecipes.hub import push
from entrecipes.recipe.load import load
from entrecipes.training.checkpoint import listed
from entrecipes.training.pushing import save_checkpoint

SEARCH = {
    "rounds": 1,
    "candidates": 1,
    "recovery": {"steps": 1, "batch_size": 4},
    "draws": {"images": 4, "noise_levels": 4},
    "tolerance": 0.2,
}
TDC = {"type": "tdc", "groups": 2, "k": 0.7, "search": SEARCH}
VP = {"class": "DDIMScheduler", "config": {"beta_schedule": "squaredcos_cap_v2"}}
WIDE = {**UNET, "config": {**UNET["config"], "block_out_channels": [16, 16], "norm_num_groups": 8}}


def shown(card: bytes) -> list[str]:
    """The Python on a card."""
    return re.findall("```python\n(.*?)```", card.decode(), re.DOTALL)


@pytest.mark.slow
def test_experts_are_pushed_whole_and_each_way_to_load_them_works(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny(WIDE, VP, experts=TDC, training={"images": 320}, hub={"repo_id": "me/tdc"})))
    assert main(["run", str(recipe), f"training.output={tmp_path / 'run'}"]) == 0
    assert len(hub.asked("POST", "/commit/")) == 1, "the parts are not pushed"
    files = hub.repository("me/tdc").files()
    assert {"pipeline.py", "denoiser/expert_1/config.json", "stock/expert_0/config.json"} <= files.keys()
    monkeypatch.chdir(tmp_path)
    blocks = shown(files["README.md"])
    assert len(blocks) == 4
    for block in blocks:
        assert "me/tdc" in block and str(tmp_path) not in block
        exec(block, {})
    assert (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_stickers_are_pushed_with_their_source_and_an_example(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_stickers(tmp_path, save_stickers(tmp_path))
    for revision in (None, "drawn"):
        push(run, "me/bars", revision=revision)
        files = hub.repository("me/bars").files(revision or "main")
        assert {"pipeline.py", "samples/final.gif", "text_encoder/config.json"} <= files.keys()
        block = shown(files["README.md"])[0]
        assert ('revision="drawn"' in block and 'custom_revision="drawn"' in block) == (revision is not None)
        (tmp_path / f"made-{revision}").mkdir()
        monkeypatch.chdir(tmp_path / f"made-{revision}")
        pick = "frame.png" if "frame.png" in block and "example/frame.png" not in block else None
        if pick:  # the reader's own picture
            Image.new("RGB", (8, 8), "white").save(pick)
        exec(block.replace("https://huggingface.co", hub.url), {})
        assert Path("samples.gif").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["all", "lora"])
def test_checkpoints_of_a_pruned_run_become_the_pipelines_that_they_were(tmp_path: Path, what: str) -> None:
    deep = {**DIT, "config": {**DIT["config"], "num_layers": 3}}
    prune = {"type": "written", "remove": [1], "distill": {"weight": 0.5}}
    recipe = tiny(deep, FLOW, prune=prune, data={"max_images": 100})
    if what == "lora":
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny(deep, FLOW, data={"max_images": 100})))
        assert main(["run", str(tmp_path / "base.yaml"), f"training.output={tmp_path / 'base'}"]) == 0
        recipe["pipeline"] = {"pretrained": str(tmp_path / "base")}
        recipe["blocks"] = {"type": "all", "adapter": {"type": "lora", "rank": 2, "merge": True}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "run.yaml"), f"training.output={tmp_path / 'run'}"]) == 0
    last = listed(tmp_path / "run" / "checkpoints")[-1]
    made = save_checkpoint(last, load(tmp_path / "run" / "recipe.yaml").recipe, tmp_path / "run", tmp_path)
    wanted = tmp_path / "run" / "pipeline"
    for name in ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (made / name).read_bytes() == (wanted / name).read_bytes(), name


@pytest.mark.slow
def test_an_adapter_names_its_base_on_the_hub_and_takes_a_pipelines_place(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "base", tiny(DIT, FLOW, data={"max_images": 100}))
    lora = {"type": "all", "adapter": {"type": "lora", "rank": 2}}
    recipe = tiny(DIT, FLOW, blocks=lora, data={"max_images": 100}) | {"pipeline": {"pretrained": str(run)}}
    adapted, before = trained(tmp_path / "adapted", recipe), hashes(run)
    push(run, "me/tiny")
    with pytest.raises(UserError, match="lies on .*run, which nobody else has; push that first.*--base owner/name"):
        push(adapted, "me/other")
    assert main(["push", str(adapted), "--repo-id", "me/other", "--base", "me/tiny"]) == 0
    asks(run, "repo_id=me/tiny")
    assert not push(adapted, "me/other").changed, "the base's own recipe says where it is"
    files = hub.repository("me/other").files()
    assert "model_index.json" not in files and str(tmp_path) not in files["base.json"].decode()

    card = files["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert '"me/tiny"' in snippet and '"me/other"' in snippet and "base_model: me/tiny" in card
    monkeypatch.chdir(tmp_path)
    exec(snippet, names := {})
    found, wanted = (pipeline.transformer for pipeline in (names["pipeline"], load_pipeline(str(adapted))))
    loras = [name for name, _ in wanted.named_parameters() if ".lora_" in name]
    assert loras and all(torch.equal(found.get_parameter(name), wanted.get_parameter(name)) for name in loras)
    ours = load_pipeline("me/other").transformer
    assert all(torch.equal(ours.get_parameter(name), wanted.get_parameter(name)) for name in loras)

    push(adapted, "me/tiny", base="me/base")
    files = hub.repository("me/tiny").files()
    assert "base.json" in files and not {
        "model_index.json",
        "vae/config.json",
        "infonoise/scheduler_config.json",
    } & set(files)
    assert hashes(run).keys() == before.keys()


@pytest.mark.slow
def test_of_two_processes_one_pushes_once(hub: Hub, tmp_path: Path) -> None:
    recipe, root = tmp_path / "recipe.yaml", Path(__file__).parents[2]
    recipe.write_text(yaml.safe_dump(tiny(DIT, FLOW, data={"max_images": 100}, hub={"repo_id": "me/tiny"})))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", root / "recipes/accelerate/ddp.yaml"]
    command = [*launch, root / "scripts/train.py", recipe, f"training.output={tmp_path / 'run'}"]
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert '"world_size": 2' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert len(titles(hub)) == 1 and len(hub.asked("POST", "/commit/")) == 1 and done.stderr.count("pushed to") == 1
    assert not token_in(tmp_path / "run", hub)
    assert torch.equal(weights("me/tiny"), weights(tmp_path / "run" / "pipeline"))
