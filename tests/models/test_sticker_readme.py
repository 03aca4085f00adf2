"""The sampling and the loop of docs/samples.md, as they stand there with a shorter run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from doc_blocks import smaller
from tiny_dfgn import tiny_dfgn
from tiny_text import save_tiny_text

from entrecipes import StickerPipeline
from entrecipes.data.text import TextEncoders
from entrecipes.recipe.pipeline import TextEncoder

ROOT = Path(__file__).parents[2]
SAMPLING, LOOP = (part.split("```")[0] for part in (ROOT / "docs/samples.md").read_text().split("```python\n")[1:])


@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = TextEncoders.load([TextEncoder(id=str(save_tiny_text(tmp_path / "bert")), tokens=5)])
    pipeline = StickerPipeline(tiny_dfgn(), DDIMScheduler(), **text.components())
    pipeline.save_pretrained("outputs/stickers/scratch-rdtf/pipeline")
    names: dict[str, object] = {}
    exec(SAMPLING, names)
    assert len(names["frames"]) == 8 and (tmp_path / "heart.gif").stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
def test_the_loop_trains_with_masks_and_curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clips, lengths = 2 * torch.rand(6, 3, 8, 8, 8) - 1, torch.tensor([8, 8, 8, 8, 5, 1])
    torch.save((clips, lengths, torch.randn(6, 4, 12)), "my-stickers.pt")
    names: dict[str, object] = {}
    exec(smaller(LOOP), names)
    facts = names["curriculum"].facts()
    assert sum(facts["odds"].values()) == pytest.approx(1, abs=1e-3) and len(facts["nats"]) == 6
    assert all(torch.isfinite(weight).all() for weight in names["model"].parameters())
