"""What a TDC run costs: the published accounting, the budget that is never exceeded, and what is told."""

from __future__ import annotations

import diffusers
import pytest

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.experts.costs import base_images, expected_costs, lines, spend
from entrecipes.experts.grouping import make_groups
from entrecipes.recipe.experts import TdcSection

PATH = GaussianPath.from_scheduler(diffusers.DDPMScheduler())
FLOW = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
F = 1_234_567


def test_published_accounting():
    section = TdcSection(spend="images")
    costs = expected_costs(section, make_groups(section, PATH), F, 100_000, search_flops=3 * F * 1000, batch_size=50)
    assert costs.base_images == 50_000 and costs.images == (10_000,) * 5
    assert costs.budget == 3 * F * 100_000
    # rho + (1 - rho) m + search, and m in sampling, with rho = 0.5 and m = 0.8
    assert costs.total / costs.budget == pytest.approx(0.5 + 0.5 * 0.8 + 0.01)
    assert costs.ratio == pytest.approx(0.8)
    assert costs.to_row()["training_flops"]["total"] == costs.total
    assert costs.to_row()["sampling_flops"] == {"base": F, "experts": costs.expert_step, "ratio": costs.ratio}


@pytest.mark.parametrize("by", ["timestep", "information"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.77])
@pytest.mark.parametrize("search", [0, 3 * F * 12_345])
def test_equal_flops_are_used_up_and_never_exceeded(by, share, search):
    section = TdcSection(by=by, base_share=share)
    groups = make_groups(section, PATH, pivot=0.15)
    flops = [round(group.ratio * F * 0.99) for group in groups]
    images, batch = 200_000, 64
    spent = spend(section, groups, F, flops, images, search, batch)
    base = base_images(section, images, batch)
    assert base % batch == 0 and share * images - batch < base <= share * images
    assert all(count % batch == 0 for count in spent)
    total = 3 * F * base + search + sum(3 * count * cost for count, cost in zip(spent, flops, strict=True))
    assert 3 * F * images - 5 * 3 * batch * F < total <= 3 * F * images
    left = 3 * F * (images - base) - search
    for group, count, cost in zip(groups, spent, flops, strict=True):
        assert left * group.steps - 3 * cost * batch < 3 * count * cost <= left * group.steps * (1 + 1e-9)
    costs = expected_costs(section, groups, F, images, search, flops_of_networks=flops, batch_size=batch)
    assert costs.total == total and costs.images == tuple(spent)


def test_experts_without_pruning_see_the_same_images_either_way():
    section = TdcSection(k=1)
    groups = make_groups(section, PATH)
    assert spend(section, groups, F, [F] * 5, 100_000, 0, 100) == [10_000] * 5
    assert expected_costs(section, groups, F, 100_000, batch_size=100).total == 3 * F * 100_000


def test_a_search_that_eats_the_budget_is_named():
    section = TdcSection()
    groups = make_groups(section, PATH)
    flops = [group.ratio * F for group in groups]
    with pytest.raises(UserError, match=r"experts\.search: .*lower search\.rounds"):
        spend(section, groups, F, flops, 10_000, 3 * F * 5100, 64)
    with pytest.raises(UserError, match="less than one batch of 64"):
        spend(section, groups, F, flops, 10_000, 3 * F * 4900, 64)
    with pytest.raises(UserError, match="expert 0 less than one batch"):
        spend(TdcSection(spend="images"), groups, F, flops, 500, 0, 64)


def test_sampling_costs_of_a_sampler_and_of_found_networks():
    section = TdcSection(groups=2, k=0.5)
    groups = make_groups(section, PATH)
    costs = expected_costs(section, groups, 100.0, 10_000, steps=[3, 1], flops_of_networks=[60, 90])
    assert costs.expert_step == pytest.approx((3 * 60 + 90) / 4) and costs.ratio == pytest.approx(0.675)


def test_what_is_told():
    section = TdcSection(groups=3, k=0.4)
    groups = make_groups(section, PATH)
    costs = expected_costs(section, groups, 2e6, 90_000, search_flops=5.4e9, batch_size=100)
    told = lines(groups, costs, PATH)
    assert len(told) == 5
    assert told[0].startswith("expert 0: sigma ") and "timesteps 666 to 999, 33.3% of the steps, 0.6 of" in told[0]
    assert "timesteps 333 to 665" in told[1] and "timesteps 0 to 332" in told[2]
    assert "1 of the base's FLOPs" in told[2]
    assert told[3].startswith("training: base 50.0% (45,000 images), search 1.0%, experts 48.9%, in all 99.9% of")
    assert told[4] == "sampling: 1.6e+06 FLOPs a step on average, 80.0% of the base's 2e+06"
    off = make_groups(section, FLOW)
    assert "timesteps 666.7 to 999, " in lines(off, expected_costs(section, off, 2e6, 9000), FLOW)[0]
