"""Measured scores against closed forms, and against every block skipped afresh with everything computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

from entrecipes.blocks.measuring import Draw, measure_blocks
from entrecipes.blocks.scores import SCORES, BlockScores
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError

LOG_SIGMA = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
SCALE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


class Gain(nn.Module):
    """A residual block: 1 + gain times what it is given."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.gain * hidden_states
        return hidden_states


class Gains(nn.Module):
    """The product of its blocks' gains: without one of them everything is smaller by that factor."""

    def __init__(self, *gains: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Gain, gains))
        self.config = {"num_layers": len(gains)}

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(model: nn.Module, draws: list[Draw], **keys) -> BlockScores:
    keys = {"log_sigma": LOG_SIGMA, "x0_error_scale": SCALE, "gate_pivot": 0.2} | keys
    return measure_blocks(BlockStack(model), iter(draws), **keys)


def test_gains_have_closed_forms() -> None:
    gains = [0.5, -0.2, 0.1]
    model, factors = Gains(*gains), 1 + torch.tensor(gains, dtype=torch.float64)
    pairs = [(noise(level, 6, 2, 2), noise(10 + level, 6, 2, 2)) for level in range(3)]
    draws = [Draw(level, partial(lambda x, y: (model(x), y), *pair)) for level, pair in enumerate(pairs)]
    scores = measure(model, draws)

    for name in ("cei", "cei_timestep", "cei_sample"):
        assert scores.score(name).tolist() == pytest.approx((-factors.log()).tolist()), name
        assert scores.score(name.replace("cei", "ced")).tolist() == pytest.approx(factors.log().abs().tolist()), name
    assert scores.score("bi").tolist() == pytest.approx([0, 0, 0], abs=1e-9), "a gain turns nothing"
    assert scores.score("magnitude").tolist() == pytest.approx([0.5, 0.2, 0.1])

    total, loss, rate, taylor = factors.prod(), [], [], torch.zeros(3, dtype=torch.float64)
    for (x, y), sigma, scale in zip(pairs, LOG_SIGMA.exp(), SCALE, strict=True):
        full = (total * x - y).square().mean()
        rise = torch.stack([(total / f * x - y).square().mean() - full for f in factors])
        loss.append(rise)
        rate.append(sigma**3 / (sigma**3 + 0.2**3) * 4 * scale * rise / sigma**2)
        taylor += 6 * (2 * (total * x - y) * x * total).mean() / factors
    assert scores.score("loss_rise").tolist() == pytest.approx(torch.stack(loss).mean(0).tolist())
    nats = (rate[0] + rate[1]) / 2 + (rate[1] + rate[2]) / 2
    assert scores.score("information").tolist() == pytest.approx(nats.tolist())
    gains = torch.tensor(gains, dtype=torch.float64)
    assert scores.score("taylor").tolist() == pytest.approx((gains * taylor).abs().tolist())


def draws_of(model: nn.Module, inputs: dict, batches: int = 2) -> list[Draw]:
    """Two batches a level, with other inputs each, in float64 through a model with any conditions."""

    def call(level: int, seed: int) -> tuple[Tensor, Tensor]:
        x = inputs["hidden_states"]
        given = inputs | {"hidden_states": x + LOG_SIGMA[level].exp() * noise(seed, *x.shape)}
        prediction = model(**given, return_dict=False)[0]
        return prediction, noise(100 + seed, *prediction.shape)

    return [Draw(level, partial(call, level, 10 * level + seed)) for level in range(3) for seed in range(batches)]


def doubled(family: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, inputs = build(family)
    convert = lambda value: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value  # noqa: E731
    return model.double().eval(), {key: convert(value) for key, value in inputs.items()}


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
def test_every_score_computed_anew(family: str) -> None:
    model, inputs = doubled(family)
    draws, stack = draws_of(model, inputs), BlockStack(model)
    scores = measure(model, draws)
    anew: dict[str, list[Tensor]] = {name: [] for name in SCORES if name not in ("information", "taylor", "magnitude")}
    for index in range(len(stack)):
        for name, values in naively(stack, index, draws).items():
            anew[name].append(values)
    for name, rows in anew.items():
        expected = torch.stack(rows)
        if name in ("cei", "ced"):  # pooled over levels: not the mean of what there is by level
            assert scores.score(name).tolist() == pytest.approx(expected.tolist(), rel=1e-9), name
            continue
        assert scores.by_level(name).flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-9), name
        assert scores.score(name).tolist() == pytest.approx(expected.mean(1).tolist(), rel=1e-9), name


@torch.no_grad()
def shift_of_the_mean(difference: Tensor) -> Tensor:
    """Root of an unbiased estimate of the squared mean, over elements: their mean's own variance is taken off."""
    variance = difference.var(0) / len(difference)
    return (difference.mean(0).square() - variance).mean().clamp(min=0).sqrt()


def naively(stack: BlockStack, index: int, draws: list[Draw]) -> dict[str, Tensor]:
    """One block's scores by level, from plain passes whose outputs are all kept."""
    full, without, targets, turned = [], [], [], []
    for level in range(3):
        calls = [draw.call for draw in draws if draw.level == level]
        inside: list[Tensor] = []
        for call in calls:
            with stack.recorded() as record:
                call()
            before, after = stack.hidden_states(index, record)
            inside.append(1 - nn.functional.cosine_similarity(before, after, dim=-1).mean(1))
        turned.append(torch.cat(inside).mean())
        full.append(torch.cat([call()[0] for call in calls]).flatten(1))
        targets.append(torch.cat([call()[1] for call in calls]).flatten(1))
        with stack.skipped(index):
            without.append(torch.cat([call()[0] for call in calls]).flatten(1))

    def levels(compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return torch.stack([compute(*level) for level in zip(without, full, targets, strict=True)])

    def spread(prediction: Tensor) -> Tensor:
        return prediction.std(correction=0).log()

    pooled = spread(torch.cat(without)) - spread(torch.cat(full))
    by_level = levels(lambda w, f, y: spread(w) - spread(f))
    by_sample = levels(lambda w, f, y: (w.std(1).log() - f.std(1).log()).mean())
    return {
        "loss_rise": levels(lambda w, f, y: (w - y).square().mean() - (f - y).square().mean()),
        "output_distance": levels(lambda w, f, y: (w - f).square().mean()),
        "mean_shift": levels(lambda w, f, y: shift_of_the_mean(w - f) / f.std(correction=0)),
        "bi": torch.stack(turned),
        "cei": pooled,
        "ced": pooled.abs(),
        "cei_timestep": by_level,
        "ced_timestep": by_level.abs(),
        "cei_sample": by_sample,
        "ced_sample": levels(lambda w, f, y: (w.std(1).log() - f.std(1).log()).abs().mean()),
    }


def test_taylor_is_autograd_over_all_draws() -> None:
    model, inputs = doubled("dit")
    draws, stack = draws_of(model, inputs), BlockStack(model)
    scores = measure(model, draws)
    losses = [draw.call() for draw in draws]
    sum((p - y).square().flatten(1).mean(1).sum() for p, y in losses).backward()
    for index in range(len(stack)):
        weights = [p for module in stack.modules(index) for p in module.parameters()]
        by_hand = sum((p * p.grad).abs().sum() for p in weights if p.grad is not None)
        assert scores.fixed["taylor"][index] == pytest.approx(by_hand.item(), rel=1e-6), "float32 losses"
    assert "taylor" not in measure(model, draws, gradients=False).names


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = doubled("dit")
    model.train()
    model.transformer_blocks[2].eval()
    frozen, kept = [p for block in model.transformer_blocks for p in block.parameters()][:2]
    frozen.requires_grad_(False)
    kept.grad = torch.ones_like(kept)

    def state() -> list:
        modes = [module.training for module in model.modules()]
        return [modes, [p.requires_grad for p in model.parameters()], list(model.state_dict())]

    before, weights = state(), {key: value.clone() for key, value in model.state_dict().items()}
    measure(model, draws_of(model, inputs))
    assert state() == before and all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    grads = [p for p in model.parameters() if p.grad is not None]
    assert len(grads) == 1 and grads[0] is kept and bool((kept.grad == 1).all())

    def fails() -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return draws_of(model, inputs)[0].call()

    with pytest.raises(RuntimeError, match="no memory"):
        measure(model, [Draw(0, fails)])
    assert state() == before


def test_blocks_that_are_gone_count_as_removed() -> None:
    model, inputs = doubled("dit")
    draws = draws_of(model, inputs)
    scores = measure(model, draws, gone=[2])
    BlockStack(model).remove([2])
    removed, left = measure(model, draws), [0, 1, 3]
    for name in SCORES:
        assert scores.score(name)[left].tolist() == pytest.approx(removed.score(name).tolist(), rel=1e-9), name
        assert math.isnan(scores.score(name)[2]), name
        assert scores.correlations()[name] == pytest.approx(removed.correlations()[name])
    assert scores.origin["passes"] == pytest.approx(12 * (1 + (3 + 2 + 0) / 4 + 3))


def test_what_cannot_be_scored_is_refused() -> None:
    model, inputs = doubled("dit")
    with pytest.raises(UserError, match="no draws were given"):
        measure(model, [])
    draws = draws_of(model, inputs)
    with pytest.raises(UserError, match="no draws of noise level 2"):
        measure(model, draws[:4])
    with pytest.raises(UserError, match="noise level 0 must come one after another"):
        measure(model, draws[::2] + draws[1::2])
    broken = draws_of(model, inputs)
    with torch.no_grad():
        model.transformer_blocks[3].ff.net[0].proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match="not finite"):
        measure(model, broken)
