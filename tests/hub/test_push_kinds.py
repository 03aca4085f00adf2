"""Runs of experts and of stickers on the Hub: every way to load them that their cards show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from server import Hub
from tiny import DIT, FLOW, UNET, tiny
from tiny_stickers import save_stickers, train_stickers

from entrecipes.cli import main
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
@pytest.mark.parametrize("trained", ["all", "lora"])
def test_checkpoints_of_a_pruned_run_become_the_pipelines_that_they_were(tmp_path: Path, trained: str) -> None:
    deep = {**DIT, "config": {**DIT["config"], "num_layers": 3}}
    prune = {"type": "written", "remove": [1], "distill": {"weight": 0.5}}
    recipe = tiny(deep, FLOW, prune=prune, data={"max_images": 100})
    if trained == "lora":
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
