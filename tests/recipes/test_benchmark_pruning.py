"""What the benchmark of pruned pipelines counts is known exactly; what it times is written down in pairs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import diffusers
import pytest
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from entrecipes.diffusion.pixel_vae import build_pixel_vae

BLOCKS, TOKENS, WIDTH, TIME = 6, 16, 16, 256


def save(folder: Path, layers: int, size: int = 8) -> Path:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=1, out_channels=1, num_layers=layers,
        sample_size=size, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    DiTPipeline(model, build_pixel_vae(1, size), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def benchmark(monkeypatch):
    """The script's `main`, called with arguments in this process."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import benchmark_pruning

    def call(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["benchmark_pruning.py", *map(str, arguments)])
        return benchmark_pruning.main()

    verbosity = diffusers.logging.get_verbosity()
    yield call
    diffusers.logging.set_verbosity(verbosity)


def test_dense_against_evenly_pruned(tmp_path, capsys, benchmark):
    dense, results = save(tmp_path / "dense", BLOCKS), tmp_path / "out" / "results.json"
    settings = ["--batch", 2, "--steps", 2, "--repeats", 3, "--results", results]
    assert benchmark(dense, "--ratio", 0.5, *settings) == 0
    found = json.loads(results.read_text())
    sizes, batch = found["sizes"], found["batches"]["2"]
    assert 0 not in found["removed"] and 5 not in found["removed"] and len(found["removed"]) == 3
    assert (sizes["dense"]["blocks"], sizes["pruned"]["blocks"]) == (6, 3)

    multiplied = TOKENS * (4 * WIDTH**2 + 2 * TOKENS * WIDTH + 8 * WIDTH**2)  # projections, attention, MLP
    multiplied += TIME * WIDTH + WIDTH**2 + 6 * WIDTH**2  # the block's own embedder and modulation
    assert sizes["dense"]["flops"] - sizes["pruned"]["flops"] == 3 * 2 * multiplied
    gone = sizes["dense"]["parameters"] - sizes["pruned"]["parameters"]
    assert gone % 3 == 0 and gone > 3 * 12 * WIDTH**2
    assert sizes["dense"]["bytes_on_disk"] - sizes["pruned"]["bytes_on_disk"] == pytest.approx(4 * gone, rel=0.1)

    pairs = [a / b for a, b in zip(batch["seconds"]["dense"], batch["seconds"]["pruned"], strict=True)]
    assert batch["speed_up"]["pairs"] == pairs and len(pairs) == 3 and min(pairs) > 0
    assert batch["speed_up"]["median"] == statistics.median(pairs)
    assert all(peak > 4 * sizes[name]["parameters"] for name, peak in batch["peak_memory_bytes"].items())
    assert {"device", "versions", "seed", "steps", "dtype"} <= found.keys()
    said = capsys.readouterr().out
    assert "| blocks | 6 | 3 | 2.00x |" in said and "batch 2: images/s" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "either a pruned pipeline or --ratio"),
        (["dense", "dense", "--ratio", 0.5], "either a pruned pipeline or --ratio"),
        (["dense", "large"], "another kind of model or image size"),
        (["dense", "--ratio", 0.9], "only 4 may go"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(tmp_path, monkeypatch, capsys, benchmark, arguments, message):
    save(tmp_path / "dense", BLOCKS), save(tmp_path / "large", 1, size=16)
    monkeypatch.chdir(tmp_path)
    assert benchmark(*(f"./{part}" if part in ("dense", "large") else part for part in arguments)) == 2
    assert message in capsys.readouterr().err
