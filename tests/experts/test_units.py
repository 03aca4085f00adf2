"""Units: their FLOPs add up to the counter's, any plan fits the budget, and what is not cut stays as it is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from tiny_slim import ALL, network, one, predict

from entrecipes.errors import UserError
from entrecipes.experts.units import Units, cut
from entrecipes.information.proxies import flops
from entrecipes.models.slim import SLIM, to_stock

KINDS = ("widths", "heads", "feed_forward", "blocks")
CASES = [(name, kinds) for name in ALL for kinds in (KINDS[:3], KINDS)]
TOLERANCE = 0.02


@cache
def units_of(name: str, kinds: tuple[str, ...]) -> Units:
    return Units.of(network(name), kinds, one)


def measured(name: str, kinds: tuple[str, ...]) -> tuple[ModelMixin, Units]:
    return network(name), units_of(name, kinds)


def any_order(units: Units, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(unit.atoms, generator=generator) for unit in units.units]


def random_plans(units: Units, count: int) -> list[tuple[int, ...]]:
    """Valid ones, most of them far from any that a projection gives."""
    rng, plans = np.random.default_rng(0), []
    for _ in range(count):
        kept = [int(rng.integers(unit.kind != "blocks", unit.atoms + 1)) for unit in units.units]
        if units.anchors and not any(kept[i] for i in units.anchors):
            kept[units.anchors[0]] = 1
        plans.append(tuple(kept))
    return plans


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_flops_are_those_of_the_counter(name, kinds):
    model, units = measured(name, kinds)
    assert units.base_flops == flops(lambda: one(model)) == units.flops([unit.atoms for unit in units.units])
    for kept in random_plans(units, 4):
        network = cut(model, units, kept, any_order(units))
        assert units.flops(kept) == flops(lambda network=network: one(network)), kept


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_any_shares_fit_any_reachable_budget(name, kinds):
    _, units = measured(name, kinds)
    rng = np.random.default_rng(0)
    for share in np.linspace(max(units.least / units.base_flops, 0.4), 1, 12):
        for shares in (np.full(len(units.units), 0.3), rng.choice([1, 0.75, 0.5, 0.25, 0], len(units.units))):
            kept = units.project(shares, share * units.base_flops, TOLERANCE)
            assert kept == units.project(shares, share * units.base_flops, TOLERANCE)
            assert abs(units.flops(kept) / (share * units.base_flops) - 1) <= TOLERANCE
            for unit, n in zip(units.units, kept, strict=True):
                gone = unit.kind == "blocks" or (unit.parent is not None and not kept[unit.parent])
                assert (0 if gone else 1) <= n <= unit.atoms


def test_the_least_network_can_be_cut_and_run():
    for name, kinds in CASES[1::2]:
        model, units = measured(name, kinds)
        kept = units.project(np.ones(len(units.units)), units.least, 1e-9)
        smallest = cut(model, units, kept, any_order(units))
        assert flops(lambda smallest=smallest: one(smallest)) == units.least
        assert predict(smallest).isfinite().all()
        assert all(units.flops(plan) >= units.least for plan in random_plans(units, 20))


def test_shares_decide_who_keeps_how_much():
    _, units = measured("plain", ("heads", "widths"))
    atoms = np.array([unit.atoms for unit in units.units])
    first = np.where(np.arange(len(atoms)) < len(atoms) / 2, 1.0, 0.25)
    target = 0.6 * units.base_flops
    kept = np.array(units.project(first, target, TOLERANCE)) / atoms
    turned = np.array(units.project(first[::-1], target, TOLERANCE)) / atoms
    assert kept[first == 1].mean() > 1.5 * kept[first < 1].mean()
    assert turned[first == 1].mean() < turned[first < 1].mean() / 1.5
    uniform = np.array(units.project(np.ones(len(atoms)), target, TOLERANCE))
    scaled = np.array(units.project(np.full(len(atoms), 0.4), target, TOLERANCE))
    assert (uniform == scaled).all() and np.ptp(uniform / atoms) <= 0.5


def test_blocks_of_small_shares_go_first():
    _, units = measured("gelu-approximate", KINDS)
    blocks = [i for i, unit in enumerate(units.units) if unit.kind == "blocks"]
    assert [units.units[i].path for i in blocks] == [f"transformer_blocks.{i}" for i in (1, 2, 3)], "0 is pinned"
    shares = np.ones(len(units.units))
    shares[blocks[1]] = 0.25
    kept = units.project(shares, 0.7 * units.base_flops, TOLERANCE)
    assert [kept[i] for i in blocks] == [1, 0, 1]
    assert not any(n for unit, n in zip(units.units, kept, strict=True) if unit.parent == blocks[1])
    even = units.project(np.ones(len(shares)), 0.7 * units.base_flops, TOLERANCE)
    assert [even[i] for i in blocks] == [1, 1, 1]


def test_at_least_one_resnet_stays():
    _, units = measured("plain", ("blocks",))
    shares = [0.0 if i in units.anchors else 1.0 for i in range(len(units.units))]
    kept = units.project(shares, units.least, 0.1)
    assert sum(kept[i] for i in units.anchors) == 1


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_what_is_not_cut_stays_equal(name, kinds):
    model, units = measured(name, kinds)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    full = [unit.atoms for unit in units.units]
    place = next(i for i, unit in enumerate(units.units) if unit.kind != "blocks")
    unit, kept = units.units[place], [*full[:place], full[place] - 1, *full[place + 1 :]]
    order = any_order(units)
    network = cut(model, units, kept, order)
    assert type(network) is SLIM[type(model)] and network.config.widths == {
        unit.path: (unit.atoms - 1) * (1 if unit.kind == "heads" else unit.size)
    }
    for key, value in network.state_dict().items():
        if not key.startswith(f"{unit.path}."):
            assert torch.equal(value, before[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in model.parameters()}
    whole = cut(model, units, full, order)
    assert type(whole) is type(model) and torch.equal(predict(whole), predict(model))


def test_kept_channels_are_the_best_in_their_old_order():
    model, units = measured("plain", ("widths",))
    place = next(i for i, unit in enumerate(units.units) if unit.path == "mid_block.resnets.1")
    kept = [unit.atoms for unit in units.units]
    kept[place], order = 2, any_order(units)
    order[place] = torch.tensor([3, 1, 0, 2])
    network = cut(model, units, kept, order)
    weight, full = (m.mid_block.resnets[1].conv1.weight for m in (network, model))
    assert torch.equal(weight, torch.cat([full[4:8], full[12:16]]))


def test_removed_transformer_blocks_leave_a_stock_model(tmp_path):
    model, units = measured("geglu", KINDS)
    kept = [int(unit.path.split(".")[1] != "2") * unit.atoms for unit in units.units]
    network = cut(model, units, kept, any_order(units))
    assert type(network) is type(model) and network.config.num_layers == 3
    network.save_pretrained(tmp_path)
    assert torch.equal(predict(type(model).from_pretrained(tmp_path)), predict(network))
    place = next(i for i, unit in enumerate(units.units) if unit.path == "transformer_blocks.3.ff")
    kept[place] = 1
    network = cut(model, units, kept, any_order(units))
    assert list(network.config.widths) == ["transformer_blocks.2.ff"], "blocks count anew"
    with torch.no_grad():
        torch.testing.assert_close(predict(to_stock(network)), predict(network), rtol=0, atol=1e-5)


def test_precision_and_mode_stay():
    model, units = measured("plain", ("widths",))
    model.to(torch.bfloat16).train()
    network = cut(model, units, [1] * len(units.units), any_order(units))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16} and network.training


def test_budgets_out_of_reach_are_refused_with_the_least():
    _, units = measured("plain", ("heads",))
    least = f"{units.least / units.base_flops:.1%}"
    with pytest.raises(UserError, match=rf"costs {least} of the base's FLOPs, more than the 50.0% asked for.*k"):
        units.project([1.0] * len(units.units), 0.5 * units.base_flops, TOLERANCE)
    _, units = measured("gelu-approximate", ("blocks",))
    with pytest.raises(
        UserError, match=r"nothing within 2.0% of 60.0% of the base's FLOPs was found; .*raise .*tolerance"
    ):
        units.project([1.0] * len(units.units), 0.6 * units.base_flops, TOLERANCE)


def test_other_models_and_missing_kinds_are_refused():
    other = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UserError, match="UNet2DModel and DiTTransformer2DModel can be made smaller, UNet2DCondition"):
        Units.of(other, KINDS, one)
    with pytest.raises(UserError, match="experts.search.units: feed_forward: this UNet2DModel has nothing of that"):
        Units.of(network("plain"), ("feed_forward",), one)
