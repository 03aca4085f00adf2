"""Criteria: the atoms that matter rank first, levels count as they should, and the model is left as it was."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import ModelMixin
from tiny_slim import network, one, predict
from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.experts.criteria import rankings, scores, shares
from entrecipes.experts.units import Units

KINDS = ("widths", "heads", "feed_forward")
CRITERIA = ("magnitude", "taylor", "diff_pruning")
NAMES = ("scale_shift", "geglu")


def loss_of(model: ModelMixin, scale: float = 1.0):
    return lambda: scale * predict(model).square().mean()


@cache
def units_of(name: str, kinds: tuple[str, ...]) -> Units:
    return Units.of(network(name), kinds, one)


def measured(name: str, kinds: tuple[str, ...] = KINDS) -> tuple[ModelMixin, Units]:
    return network(name), units_of(name, kinds)


def weaken(model: ModelMixin, unit, atom: int) -> None:
    """Make everything that leads to one atom and away from it nearly zero."""
    module, size = model.get_submodule(unit.path), unit.size
    if unit.kind == "widths":
        into, out, halves = [module.conv1, module.time_emb_proj, module.norm2], module.conv2, [1, 2, 1]
    elif unit.kind == "heads":
        into, out, halves = [module.to_q, module.to_k, module.to_v], module.to_out[0], [1, 1, 1]
    else:
        into, out, halves = [module.net[0].proj], module.net[2], [2]
    with torch.no_grad():
        for layer, count in zip(into, halves, strict=True):
            for half in range(count):
                start = half * unit.atoms * size + atom * size
                layer.weight[start : start + size] *= 1e-3
                layer.bias[start : start + size] *= 1e-3
        out.weight[:, atom * size : (atom + 1) * size] *= 1e-3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NAMES)
def test_a_weak_atom_of_every_unit_ranks_last(name, criterion):
    model, units = measured(name)
    weak = [i % unit.atoms for i, unit in enumerate(units.units)]
    for unit, atom in zip(units.units, weak, strict=True):
        weaken(model, unit, atom)
    order = rankings(scores(units, model, criterion, [loss_of(model)]))
    assert [ranks[-1].item() for ranks in order] == weak
    assert all(
        sorted(ranks.tolist()) == list(range(unit.atoms)) for ranks, unit in zip(order, units.units, strict=True)
    )


def test_magnitude_is_the_sum_over_matrices_in_and_out():
    model, units = measured("scale_shift")
    place = next(i for i, unit in enumerate(units.units) if unit.path == "mid_block.resnets.0")
    unit, resnet = units.units[place], model.mid_block.resnets[0]
    size, channels = unit.size, resnet.conv1.out_channels
    rows = slice(size, 2 * size)
    time = resnet.time_emb_proj.weight
    expected = sum(
        part.abs().sum()
        for part in (resnet.conv1.weight[rows], resnet.conv2.weight[:, rows], time[rows], time[channels:][rows])
    )
    assert scores(units, model, "magnitude")[place][1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_taylor_is_the_first_order_change_of_the_loss():
    """Sum of w g over an atom is the loss's derivative as the atom is scaled; the score is the sum of |w g|."""
    model, units = measured("geglu", ("heads",))
    found = scores(units, model, "taylor", [loss_of(model), loss_of(model, 2.0)])
    attention = model.transformer_blocks[1].attn1
    loss_of(model, 3.0)().backward()
    expected = torch.zeros(4, dtype=torch.float64)
    for weight, dim in (
        [(getattr(attention, f"to_{key}").weight, 0) for key in "qkv"]
        + [(attention.to_out[0].weight, 1)]
        + [(getattr(attention, f"to_{key}").bias, 0) for key in "qkv"]
    ):
        worth = (weight * weight.grad).detach().abs().double().movedim(dim, 0)
        expected += worth.reshape(4, -1).sum(1)
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=0)


def test_diff_pruning_stops_at_the_first_level_of_small_loss():
    model, units = measured("geglu")
    called: list[float] = []

    def level(scale: float):
        def loss() -> Tensor:
            called.append(scale)
            return loss_of(model, scale)()

        return loss

    levels = [level(scale) for scale in (0.5, 1.0, 0.06, 0.04, 1.0)]
    found = scores(units, model, "diff_pruning", levels, threshold=0.05)
    assert called == [0.5, 1.0, 0.06, 0.04]
    expected = scores(units, model, "taylor", levels[:3])
    for one_unit, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one_unit, other)
    whole = scores(units, model, "taylor", levels)
    assert not torch.allclose(found[0], whole[0], rtol=0.1)


@pytest.mark.parametrize("criterion", [*CRITERIA, "random"])
def test_the_model_is_left_as_it_was(criterion):
    model, units = measured("scale_shift")
    model.train()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    first, second = (scores(units, model, criterion, [loss_of(model)], seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "no dropout"
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(values.dtype == torch.float64 for values in first)


def test_random_goes_by_its_seed():
    model, units = measured("geglu")
    orders = [torch.cat(rankings(scores(units, model, "random", seed=seed))) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert shares(scores(units, model, "random")) == pytest.approx([1 / len(units.units)] * len(units.units))


def test_shares_sum_to_one_and_a_block_has_all_that_is_in_it():
    model, units = measured("geglu", (*KINDS, "blocks"))
    found = shares(scores(units, model, "taylor", [loss_of(model)]))
    assert sum(found) == pytest.approx(1) and min(found) > 0
    for i, unit in enumerate(units.units):
        if unit.kind == "blocks":
            inside = sum(share for share, other in zip(found, units.units, strict=True) if other.parent == i)
            assert found[i] == pytest.approx(inside, rel=1e-6)
    _, alone = measured("scale_shift", ("blocks",))
    assert min(shares(scores(alone, network("scale_shift"), "magnitude"))) > 0


def test_a_diverged_base_and_missing_losses_are_named():
    model, units = measured("geglu")
    with pytest.raises(UserError, match=r"no loss to take gradients of"):
        scores(units, model, "taylor")
    torch.nn.init.constant_(model.transformer_blocks[2].ff.net[2].weight, float("nan"))
    with pytest.raises(UserError, match=r"magnitude of transformer_blocks.2.ff is not finite"):
        scores(units, model, "magnitude")
