"""The zero-shot proxies against gradients known in closed form, and the vote against ranks counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.information.proxies import SINGULAR, Candidate, ntk_condition, vote, zico


def random(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(model: nn.Module, x: Tensor) -> list:
    """One scalar per sample: the sum over outputs."""
    return [lambda row=row: model(row).sum() for row in x]


def with_gradients(layers: list[nn.Module], gradients: Tensor) -> tuple[nn.Module, list]:
    """A model, and D losses whose gradient is gradients[d] in every layer's weight [D, numel]."""
    model = nn.ModuleList(layers)
    return model, [
        lambda g=g: sum((layer.weight * g.view_as(layer.weight)).sum() for layer in model) for g in gradients
    ]


def test_kernel_of_a_linear_model_is_the_gram_matrix_of_its_inputs():
    x = random(5, 9)
    model = nn.Linear(9, 3, dtype=torch.float64)  # its bias, whose kernel is constant, must not count
    expected = torch.linalg.cond(x @ x.T).item()
    assert expected > 2
    assert ntk_condition(model, outputs(model, x)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gib", [4.0, 0.0])  # all at once; each tensor in a pass of its own
def test_kernels_of_all_matrices_add_up(gib):
    x = random(6, 4)
    first, second = nn.Linear(4, 8, bias=False, dtype=torch.float64), nn.Linear(8, 1, dtype=torch.float64)
    model = nn.Sequential(first, second)
    # both kernels live in the four dimensions of x: six samples are too many
    assert ntk_condition(model, outputs(model, x), gib) == pytest.approx(1 / SINGULAR)
    x = x[:3]
    hidden = first(x).detach()
    expected = torch.linalg.cond(second.weight.detach().square().sum() * x @ x.T + hidden @ hidden.T).item()
    assert ntk_condition(model, outputs(model, x), gib) == pytest.approx(expected, rel=1e-9)
    second.requires_grad_(False)
    frozen = torch.linalg.cond(x @ x.T).item()
    assert frozen != pytest.approx(expected, rel=1e-3)
    assert ntk_condition(model, outputs(model, x), gib) == pytest.approx(frozen, rel=1e-9)


def test_a_small_difference_of_float32_gradients_counts():
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-5]])
    assert ntk_condition(model, outputs(model, x)) == pytest.approx(4e10, rel=1e-3)


@pytest.mark.parametrize("score", [ntk_condition, zico])
def test_every_pass_sees_the_same_random_numbers(score):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 6))
    calls = []

    def loss() -> Tensor:
        calls.append(torch.randn(()).item())
        return (model(torch.randn(4)) * torch.randn(6)).sum()

    passes = {}
    for count, floats in ((1, 20 + 30 + 36), (2, 50), (3, 0)):
        passes[count] = score(model, [loss] * 4, gib=4 * 4 * floats / 2**30)
        assert len(calls) == 4 * count and len(set(calls)) == 4
        calls.clear()
    assert math.isfinite(passes[1]) and passes[1] == passes[2] == passes[3]


def test_zico_by_hand():
    # mean |g| / std g: 2 / 1; no spread; 2 / 2 (signed); 0 everywhere
    gradients = torch.tensor([[1.0, 0.1, -1.0, 0.0], [3.0, 0.1, 3.0, 0.0]])
    model, losses = with_gradients([nn.Linear(4, 1)], gradients)
    assert zico(model, losses) == pytest.approx(math.log(1.5))
    assert zico(model, losses, reduction="sum") == pytest.approx(math.log(3))
    # three equal gradients of 0.1 have no spread, whatever the rounding
    model, losses = with_gradients([nn.Linear(2, 1)], torch.tensor([[0.1, 1.0], [0.1, 1.0], [0.1, 4.0]]))
    assert zico(model, losses) == pytest.approx(math.log(2 / math.sqrt(2)))


def test_zico_reads_linear_and_convolution_layers_with_spread():
    gradients = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    linear, convolution = nn.Linear(2, 1), nn.Conv2d(1, 2, 1)
    others = [nn.LayerNorm(2), nn.Embedding(1, 2), nn.Linear(2, 1).requires_grad_(False)]
    model, losses = with_gradients([linear, convolution, *others], gradients)
    unused = nn.ModuleList([model, nn.Linear(2, 1)])
    tied = nn.Linear(2, 1)
    tied.weight = linear.weight
    for whole in (model, unused, nn.ModuleList([model, tied])):
        assert zico(whole, losses, reduction="sum") == pytest.approx(2 * math.log(2))
        assert zico(whole, losses) == pytest.approx(math.log(2))


def test_depth_counts_in_the_published_sum_only():
    gradients = random(4, 6).float()
    scores = {}
    for depth in (1, 3):
        model, losses = with_gradients([nn.Linear(3, 2) for _ in range(depth)], gradients)
        scores[depth] = zico(model, losses), zico(model, losses, reduction="sum")
    assert scores[3][0] == pytest.approx(scores[1][0])
    assert scores[3][1] == pytest.approx(3 * scores[1][1]) and scores[1][1] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_says_nothing_is_the_worst(value):
    model = nn.Linear(3, 1)
    losses = [lambda s=s: s * model.weight.sum() for s in (1.0, 2.0)]
    assert ntk_condition(model, losses) == pytest.approx(1 / SINGULAR)  # twice the same direction
    bad = [losses[0], lambda: value * model.weight.sum()] if value else [lambda: 0.0 * model.weight.sum()] * 2
    assert ntk_condition(model, bad * 8) == math.inf
    assert zico(model, bad) == -math.inf
    good = nn.Linear(3, 1)
    both = nn.ModuleList([model, good])
    mixed = [lambda s=s, b=b: b() + s * good.weight.sum() for s, b in zip((1.0, 2.0), bad, strict=True)]
    assert zico(both, mixed) == (-math.inf if value else pytest.approx(math.log(3)))


@pytest.mark.parametrize("score", [ntk_condition, zico])
def test_the_model_is_left_as_found(score):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    model[3].eval()
    model[0].weight.grad = torch.ones(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    losses = [lambda: model(torch.randn(5, 4)).square().mean()] * 3
    with torch.no_grad():
        assert math.isfinite(score(model, losses))
        assert not torch.is_grad_enabled()
    broken = [*losses, lambda: model(torch.randn(5, 7)).sum()]
    with pytest.raises(RuntimeError):
        score(model, broken)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))
    assert all(weight.grad is None for name, weight in model.named_parameters() if name != "0.weight")


def test_what_cannot_be_scored_is_refused():
    model = nn.Linear(3, 1)
    losses = [lambda: model.weight.sum()] * 2
    with pytest.raises(UserError, match="1 samples have no condition number"):
        ntk_condition(model, losses[:1])
    with pytest.raises(UserError, match="1 batches have no spread; pass the losses of 4"):
        zico(model, losses[:1])
    with pytest.raises(UserError, match="no reduction 'max'"):
        zico(model, losses, reduction="max")
    model.requires_grad_(False)
    for score in (ntk_condition, zico):
        with pytest.raises(UserError, match="no trainable weights"):
            score(model, losses)
    with pytest.raises(UserError, match="at least one candidate"):
        vote([])


def test_vote_by_hand():
    result = vote([Candidate(3.0, 10.0, 2.0), Candidate(1.0, 20.0, 1.0), Candidate(2.0, 5.0, 3.0)])
    assert result.ranks == ((3, 2, 2), (1, 3, 3), (2, 1, 1))
    assert result.totals == (5.0, 4.0, 3.0) and result.winner == 2
    only_time = vote(result.candidates, weights=(1.0, 0.0, 0.0))
    assert only_time.totals == (3.0, 1.0, 2.0) and only_time.winner == 1


def test_ties_share_the_better_rank_and_the_first_of_equals_wins():
    close = vote([Candidate(1.0, 1e9 * (1 + 1e-8), -2.0), Candidate(2.0, 1e9, -2.0), Candidate(3.0, 2e9, -2.1)])
    assert close.ranks == ((1, 1, 1), (2, 1, 1), (3, 3, 3))
    against_time = vote([Candidate(3.0, 1.0, 3.0), Candidate(2.0, 2.0, 2.0), Candidate(1.0, 3.0, 1.0)])
    assert against_time.totals == (4.0, 4.0, 4.0) and against_time.winner == 0


def test_a_number_that_is_not_finite_ranks_last_and_is_null_in_json():
    result = vote([Candidate(1.0, math.nan, math.inf), Candidate(1.0, math.inf, -math.inf), Candidate(1.0, 9.0, -5.0)])
    assert result.ranks == ((1, 2, 2), (1, 2, 2), (1, 1, 1)) and result.winner == 2
    row = json.loads(json.dumps(result.to_row(), allow_nan=False))
    assert row["candidates"][0] == {"cost": 1.0, "kappa": None, "zico": None}
    assert row["ranks"][2] == [1, 1, 1] and row["totals"] == [3.0, 3.0, 2.0] and row["winner"] == 2
