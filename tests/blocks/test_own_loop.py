"""Pruning in one's own loop: tried, taken back, made so; and the example of docs/pruning.md as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from tiny import DIT

from entrecipes import apply_pruning, score_blocks
from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/pruning.md").read_text()


@pytest.fixture
def pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**DIT["config"], "num_layers": 6}).eval()
    pipeline = DiTPipeline(transformer=model, scheduler=DDIMScheduler(), vae=build_pixel_vae(1, 8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def output(pipeline: DiTPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return pipeline.transformer(x, timestep=torch.tensor([10.0, 500.0]), class_labels=torch.tensor([1, 2])).sample


def test_tried_and_undone_and_committed(pipeline, tmp_path):
    before, keys = output(pipeline), list(pipeline.transformer.state_dict())
    trial = apply_pruning(pipeline, [3, 1])
    assert trial.removed == [1, 3] and list(pipeline.transformer.state_dict()) == keys
    skipped = output(pipeline)
    assert not torch.equal(skipped, before)
    trial.undo()
    trial.undo()
    assert torch.equal(output(pipeline), before)
    with apply_pruning(pipeline, [3, 1]) as trial:
        assert torch.equal(output(pipeline), skipped)
    assert torch.equal(output(pipeline), before)
    apply_pruning(pipeline.transformer, [3, 1]).commit()
    assert torch.equal(output(pipeline), skipped) and pipeline.transformer.config.num_layers == 4
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(output(DiTPipeline.from_pretrained(tmp_path)), skipped)


def test_the_lowest_scores_go(pipeline):
    scores = score_blocks(pipeline, torch.randn(4, 1, 8, 8), torch.arange(4), noise_levels=4)
    values = scores.score("bi")
    trial = apply_pruning(pipeline, scores=scores, score="bi", ratio=0.34)
    assert trial.removed == sorted(sorted(range(1, 5), key=lambda block: values[block])[:2])
    trial.undo()
    with apply_pruning(pipeline, scores=scores, score="bi", ratio=0.34, keep=[*range(4)]) as trial:
        assert trial.removed == [4, 5]


def test_scores_of_other_weights_are_refused(pipeline):
    scores = score_blocks(pipeline, torch.randn(4, 1, 8, 8), torch.arange(4), noise_levels=4)
    with torch.no_grad():
        pipeline.transformer.proj_out_2.weight.add_(1)
    with pytest.raises(UserError, match="other weights.*trained_since"):
        apply_pruning(pipeline, scores=scores)
    apply_pruning(pipeline, scores=scores, trained_since=True).undo()


def test_a_second_pruning_waits_for_the_first(pipeline):
    before = output(pipeline)
    first = apply_pruning(pipeline, [1, 3])
    with pytest.raises(UserError, match="skipped already"):
        apply_pruning(pipeline, [1, 4])
    first.undo()
    apply_pruning(pipeline, [1, 4]).undo()
    assert torch.equal(output(pipeline), before)


def test_mistakes_change_nothing(pipeline):
    before = output(pipeline)
    scores = score_blocks(pipeline, torch.randn(4, 1, 8, 8), torch.arange(4), noise_levels=4)
    for arguments, options, message in (
        ([], {}, "exactly one"),
        ([[1]], {"scores": scores}, "exactly one"),
        ([[0]], {}, "block 0 can't be removed"),
        ([[7]], {}, "no block 7"),
        ([], {"scores": scores, "ratio": 0.9}, "ratio: 0.9"),
        ([], {"scores": scores, "score": "cde"}, "cde"),
    ):
        with pytest.raises(UserError, match=message):
            apply_pruning(pipeline, *arguments, **options)
    assert torch.equal(output(pipeline), before)
    apply_pruning(pipeline, [2]).commit()
    with pytest.raises(UserError, match="6 other blocks than the model's 5"):
        apply_pruning(pipeline, scores=scores)
    with pytest.raises(UserError, match="UNet2DModel"):
        apply_pruning(UNet2DModel(8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                                  up_block_types=("UpBlock2D",) * 2, norm_num_groups=4), [1])  # fmt: skip
    with pytest.raises(UserError, match="AutoencoderKL"):
        apply_pruning(AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)), [1])


def test_the_pages_example_runs(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("my-dit")
    torch.save([torch.randn(8, 1, 8, 8), torch.arange(8)], "some-of-my-data.pt")
    code = PAGE.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert DiTPipeline.from_pretrained("my-smaller-dit").transformer.config.num_layers == 3
    assert "tensor(" in capsys.readouterr().out
