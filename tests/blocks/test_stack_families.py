"""Every family: skipping a block is as removing it, and what is pruned loads in a process without entrecipes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from tiny_models import FAMILIES, build, output

from entrecipes.blocks.stack import BlockStack
from entrecipes.models.sequence import SequenceTransformer1DModel

PINNED = {"dit": {0}, "sd3": {3}, "sd35": {3}, "mochi": {2}, "latte": {0}, "unet_attention_last": {2, 3, 4, 8, 9, 10}}
LOAD = """
import json, sys
sys.modules["entrecipes"] = None
from pathlib import Path
import diffusers, torch
torch.set_num_threads(1)
report = {}
for folder in map(Path, sys.argv[1:]):
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    model, info = getattr(diffusers, kind).from_pretrained(folder, output_loading_info=True)
    inputs, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        got = model.eval()(**inputs, return_dict=False)[0]
    report[folder.name] = {"equal": torch.equal(got, expected), "info": {k: list(v) for k, v in info.items()}}
print(json.dumps(report))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_a_block_equals_removing_it(family: str) -> None:
    model, inputs = build(family)
    stack, full = BlockStack(model), output(model, inputs)
    with stack.recorded() as calls:
        assert torch.equal(output(model, inputs), full)
    assert {block.index for block in stack.blocks if block.pinned} == PINNED.get(family, set())
    for block in stack.blocks[:: 4 if family.startswith("unet") else 1]:
        with stack.skipped(block.index):
            skipped = output(model, inputs)
        with stack.skipped(block.index, calls=calls):
            assert torch.equal(output(model, inputs), skipped)
        assert (skipped - full).abs().max() > 0.05, "this block would not be missed: the comparison says nothing"
        if not block.pinned:
            pruned = copy.deepcopy(model)
            BlockStack(pruned).remove([block.index])
            assert len(BlockStack(pruned)) == len(stack) - 1
            torch.testing.assert_close(output(pruned, inputs), skipped, rtol=0, atol=1e-5)
    assert torch.equal(output(model, inputs), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_main_stream_before_and_after(family: str) -> None:
    model, inputs = build(family)
    stack = BlockStack(model)
    with stack.recorded() as calls:
        output(model, inputs)
    for index in range(len(stack)):
        before, after = stack.hidden_states(index, calls)
        assert before.shape == after.shape and before.dim() == 3
        assert not torch.equal(before, after)
        if family not in ("latte", "unet", "unet_attention_last", "auraflow", "flux2") and index + 1 < len(stack):
            assert torch.equal(after, stack.hidden_states(index + 1, calls)[0])
    with stack.skipped(*range(len(stack))), stack.recorded() as calls:
        output(model, inputs)
    for index in range(1, len(stack)):
        before, after = stack.hidden_states(index, calls)
        assert torch.equal(before, after)


def prune(family: str, folder: Path) -> Path:
    """A model less every third block that may go, saved with inputs and what it gives for them."""
    model, inputs = build(family)
    stack = BlockStack(model)
    gone = [block.index for block in stack.blocks if not block.pinned][::3]
    with stack.skipped(*gone):
        skipped = output(model, inputs)
    stack.remove(gone)
    torch.testing.assert_close(output(model, inputs), skipped, rtol=0, atol=1e-5)
    model.save_pretrained(folder / family)
    torch.save((inputs, output(model, inputs)), folder / family / "expected.pt")
    return folder / family


def test_pruned_models_load_without_entrecipes(tmp_path: Path) -> None:
    folders = [prune(family, tmp_path) for family in FAMILIES if family != "sequence"]
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {folder.name for folder in folders}
    for family, found in report.items():
        assert found["equal"] and not any(found["info"].values()), (family, found)


def test_a_pruned_sequence_model_loads(tmp_path: Path) -> None:
    folder = prune("sequence", tmp_path)
    model, info = SequenceTransformer1DModel.from_pretrained(folder, output_loading_info=True)
    inputs, expected = torch.load(folder / "expected.pt")
    assert torch.equal(output(model.eval(), inputs), expected) and not any(info.values())


def test_a_pruned_dit_samples_the_same_in_its_pipeline(tmp_path: Path) -> None:
    model, _ = build("dit")
    BlockStack(model).remove([1, 3])
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4)
    pipeline = DiTPipeline(model, vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.config.num_layers == len(loaded.transformer.transformer_blocks) == 2

    def sample(pipeline: DiTPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], guidance_scale=4.0, generator=generator, num_inference_steps=2, output_type="np").images

    assert (sample(loaded) == sample(pipeline)).all()
