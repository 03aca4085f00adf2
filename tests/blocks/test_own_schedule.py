"""Opening blocks in one's own loop, taken off again; and the example of docs/blocks.md as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from doc_blocks import smaller
from peft import LoraConfig, inject_adapter_in_model
from tiny import DIT

from entrecipes import apply_block_schedule, score_blocks
from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/blocks.md").read_text()
IMAGES, BATCH = 96, 4


@pytest.fixture
def pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**DIT["config"], "num_layers": 6}).train()
    pipeline = DiTPipeline(transformer=model, scheduler=DDIMScheduler(), vae=build_pixel_vae(1, 8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def loss(pipeline: DiTPipeline, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    labels = torch.full((BATCH,), 3)
    torch.manual_seed(seed)  # the model drops labels
    return (pipeline.transformer(x, timestep=torch.full((BATCH,), 9), class_labels=labels).sample - x).square().mean()


def trained(pipeline: DiTPipeline, schedule, optimizer, start: int = 0, end: int = IMAGES) -> None:
    for seen in range(start, end, BATCH):
        schedule.step(seen, optimizer)
        loss(pipeline, seed=seen + 1).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_opens_in_stages_and_leaves_no_trace(pipeline):
    model = pipeline.transformer
    model.pos_embed.proj.bias.requires_grad_(False)
    flags = [weight.requires_grad for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    opened = []
    with apply_block_schedule(
        pipeline, IMAGES, loss=lambda: loss(pipeline, 0), order="last_first", inputs="never", step=0.17, burst=1
    ) as schedule:
        for seen in range(0, IMAGES, BATCH):
            rows = schedule.step(seen, optimizer)
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            loss(pipeline, seed=seen + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
            blocks = {int(name.split(".")[1]) for name in moved if name.startswith("transformer_blocks.")}
            assert blocks == set(schedule.open) and "pos_embed.proj.weight" not in moved
            opened.append(schedule.open)
            if rows and "candidates" in rows[-1]:
                closed = [
                    w for i in range(6) if i not in schedule.open for w in model.transformer_blocks[i].parameters()
                ]
                assert not any(weight in optimizer.state for weight in closed)
    assert opened[0] == [5] and opened[-1] == list(range(6)) and len(schedule.rows) == 7
    assert [weight.requires_grad for weight in model.parameters()] == flags


def test_given_scores_rank(pipeline):
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    scores = score_blocks(pipeline, torch.randn(4, 1, 8, 8), torch.arange(4), noise_levels=4, gradients=False)
    with apply_block_schedule(
        pipeline.transformer, IMAGES, loss=lambda: loss(pipeline, 0), scores=scores, order="bi", growth="linear"
    ) as schedule:
        (row,) = schedule.step(0)
    best = scores.score("bi").argsort(descending=True)[:2].tolist()
    assert row["order"][:2] == best and row["open"] == sorted(best)
    assert row["floor"] == 0, "the embedders are trained"


def test_it_goes_on_from_its_state(pipeline):
    model = pipeline.transformer
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"loss": lambda: loss(pipeline, 0), "order": "first_first", "burst": 2, "supernet": 0.9}
    results = []
    for stop in (IMAGES, 12):  # in one piece; or anew in the middle of a turn
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with apply_block_schedule(pipeline, IMAGES, **options) as schedule:
            trained(pipeline, schedule, optimizer, end=stop)
        if stop < IMAGES:
            with apply_block_schedule(pipeline, IMAGES, **options) as rest:
                rest.load_state_dict(schedule.state_dict())
                trained(pipeline, rest, optimizer, start=stop)
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)


def test_with_lora_the_adapters_of_open_blocks_alone_are_trained(pipeline):
    model = pipeline.transformer
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), model)
    with apply_block_schedule(
        pipeline, IMAGES, loss=lambda: loss(pipeline, 0), order="last_first", growth="none", largest=0.34
    ) as schedule:
        (row,) = schedule.step(0)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {int(name.split(".")[1]) for name in trainable} == set(range(6)), "taken off again"
    assert row["open"] == [4, 5] and row["floor"] == 4, "nothing before the blocks is trained"
    assert row["predicted_speed_up"] == pytest.approx(12 / 8, rel=0.05), "next to no weight gradients: 2 L to L + 2"


MISTAKES = {
    "no scores": ({}, "needs `scores`"),
    "a typing error": ({"ordr": "cei"}, "no option 'ordr'; did you mean 'order'"),
    "the trainer's": ({"mode": "snapshot"}, "no option 'mode'"),
    "a bad value": ({"largest": 2}, "largest: Input should be less than or equal to 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(pipeline, case):
    options, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        apply_block_schedule(pipeline, IMAGES, loss=lambda: loss(pipeline, 0), **options)


def test_the_pages_example_runs(pipeline, monkeypatch, capsys):
    monkeypatch.setattr(torch, "load", lambda path: (torch.randn(80, 1, 8, 8), torch.arange(80) % 10))
    monkeypatch.setattr(DiTPipeline, "from_pretrained", lambda path: pipeline)
    code = PAGE.split("```python\n")[1].split("```")[0]
    exec(smaller(code), {"__name__": "page"})
    said = capsys.readouterr().out
    assert "stage 1 of 4: " in said and "stage 4 of 4: trains 6 of 6 blocks [0, 1, 2, 3, 4, 5]" in said
    assert all(weight.requires_grad for weight in pipeline.transformer.parameters())
