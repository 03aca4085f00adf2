"""Groups of noise levels: borders, budgets, boundaries and nats, against closed forms and known edges."""

from __future__ import annotations

import itertools
import math

import diffusers
import pytest
import torch
from pydantic import ValidationError

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.evaluation.heldout import HeldOutBundle
from entrecipes.experts.grouping import boundaries, calls, group_nats, make_groups, row_nats
from entrecipes.information.nats import gate
from entrecipes.information.profile import Profile
from entrecipes.recipe.evaluation import HeldOut
from entrecipes.recipe.experts import TdcSection

SCHEDULERS = {
    "linear-1000": diffusers.DDPMScheduler(),
    "cosine-1000": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "cosine-4000": diffusers.DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2"),
    "sd-1000": diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
PATHS = {name: GaussianPath.from_scheduler(scheduler) for name, scheduler in SCHEDULERS.items()}
VP = [name for name in PATHS if name.endswith("000")]
RULES = ["timestep", "snr", "information"]


def owners(groups, path) -> list[int]:
    """Of each whole timestep of a VP path, clean to noisy, the group whose range of log sigma holds it."""
    levels = path.log_sigma(torch.arange(path.last + 1)).tolist()
    top = path.log_sigma_max
    found = [
        [g.number for g in groups if g.log_sigma[0] <= x < g.log_sigma[1] or x == top == g.log_sigma[1]] for x in levels
    ]
    assert all(len(group) == 1 for group in found)
    return [group[0] for group in found]


def first_timesteps(groups, path) -> list[int]:
    """The first timestep of every group but the cleanest, clean to noisy."""
    of = owners(groups, path)
    return [t for t, (below, here) in enumerate(itertools.pairwise(of), 1) if below != here]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_groups_tile_the_path(name, by, count):
    path = PATHS[name]
    groups = make_groups(TdcSection(groups=count, by=by), path)
    assert [group.number for group in groups] == list(range(count))
    assert groups[0].log_sigma[1] == path.log_sigma_max and groups[-1].log_sigma[0] == path.log_sigma_min
    for noisier, cleaner in itertools.pairwise(groups):
        assert noisier.log_sigma[0] == cleaner.log_sigma[1]
    assert all(group.log_sigma[0] < group.log_sigma[1] and group.train == group.log_sigma for group in groups)
    assert sum(group.steps for group in groups) == pytest.approx(1)


@pytest.mark.parametrize("name", PATHS)
def test_equal_time_gives_equal_steps(name):
    groups = make_groups(TdcSection(groups=5), PATHS[name])
    assert [group.steps for group in groups] == pytest.approx([0.2] * 5, abs=1e-9)
    borders = torch.tensor([group.log_sigma[0] for group in groups[:-1]], dtype=torch.float64)
    assert PATHS[name].fraction(borders).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-9)


def test_equal_time_cuts_a_thousand_timesteps_evenly():
    groups = make_groups(TdcSection(groups=5), PATHS["linear-1000"])
    assert first_timesteps(groups, PATHS["linear-1000"]) == [200, 400, 600, 800]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear-1000", ([27, 259, 674], [15, 117, 441, 738])),
        ("cosine-4000", ([225, 1984, 3744], [132, 941, 3027, 3838])),
        ("cosine-1000", ([56, 496, 936], [33, 235, 756, 959])),
        ("sd-1000", ([21, 234, 681], [11, 103, 414, 757])),
    ],
)
def test_equal_snr_edges(name, expected):
    for edges in expected:
        groups = make_groups(TdcSection(groups=len(edges) + 1, by="snr"), PATHS[name])
        assert first_timesteps(groups, PATHS[name]) == edges


def test_equal_snr_is_cut_at_40_db():
    groups = make_groups(TdcSection(groups=4, by="snr"), PATHS["flow"])  # which reaches to 60 dB at both ends
    decibels = [-20 * group.log_sigma[0] / math.log(10) for group in groups[:-1]]
    assert decibels == pytest.approx([-20, 0, 20])


@pytest.mark.parametrize(
    ("name", "decibels"),
    [("linear-1000", [-33.9, -17.4, -5.1, 9.5]), ("cosine-4000", [-16.8, -3.7, 3.5, 15.6])],
)
def test_mean_snr_of_equal_time_groups(name, decibels):
    path = PATHS[name]
    of = torch.tensor(owners(make_groups(TdcSection(groups=4), path), path))
    snr = -20 * path.log_sigma(torch.arange(path.last + 1)) / math.log(10)
    assert [snr[of == number].mean().item() for number in range(4)] == pytest.approx(decibels, abs=0.05)


@pytest.mark.parametrize("name", PATHS)
def test_equal_information_of_gaussian_data(name):
    path, std = PATHS[name], 0.7
    groups = make_groups(TdcSection(groups=4, by="information"), path, data_std=std)

    def below(level: float) -> float:  # the integral of sd^2 / (sd^2 + sigma^2) over log sigma
        return level - 0.5 * math.log(std**2 + math.exp(2 * level))

    nats = [below(group.log_sigma[1]) - below(group.log_sigma[0]) for group in groups]
    # VP borders may have moved to leave whole timesteps: none of these is so narrow
    assert nats == pytest.approx([sum(nats) / 4] * 4, rel=1e-4)


def measured(path, levels: int = 48, shift: float = 0.0) -> Profile:
    """A profile with a hump, as a measurement on an even grid."""
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, levels, dtype=torch.float64)
    variance = torch.exp(2 * log_sigma)
    return Profile(log_sigma, variance / (1 + variance) * (0.1 + torch.exp(-((log_sigma - shift) ** 2))))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("pivot", [None, 0.15])
def test_nats_add_up_and_are_equal_by_information(name, pivot):
    path = PATHS[name]
    profile = measured(path)
    for by in RULES:
        groups = make_groups(TdcSection(groups=5, by=by), path, profile, pivot)
        nats = group_nats(groups, profile, 12, pivot)
        assert sum(nats) == pytest.approx(12 * profile.nats(pivot), rel=1e-12)
        assert all(part > 0 for part in nats)
        if by == "information":
            assert nats == pytest.approx([sum(nats) / 5] * 5, rel=1e-4)


def test_nats_inside_a_group_are_the_integral_over_it():
    path = PATHS["edm"]
    groups = make_groups(TdcSection(groups=3), path)
    variance = torch.exp(2 * (log_sigma := torch.linspace(path.log_sigma_min, path.log_sigma_max, 4001).double()))
    flat = Profile(log_sigma, variance)  # one nat per unit log sigma
    widths = [group.log_sigma[1] - group.log_sigma[0] for group in groups]
    assert group_nats(groups, flat) == pytest.approx(widths, rel=1e-6)
    fine = measured(path, 4001)
    for group, nats in zip(groups, group_nats(groups, fine, 1, 0.3), strict=True):
        levels = torch.linspace(*group.log_sigma, 3001, dtype=torch.float64)
        rate = fine.at(levels).rate * gate(levels, 0.3)
        assert nats == pytest.approx(torch.trapezoid(rate, levels).item(), rel=1e-5)


def test_nats_of_a_held_out_row_add_up_to_its_own():
    path = PATHS["linear-1000"]
    x0 = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    bundle = HeldOutBundle(HeldOut(noise_levels=9, gate_pivot=0.2), x0, None, path)
    row = bundle.measure(
        lambda x0, noise, log_sigma, _: 1 / (1 + torch.exp(-2 * log_sigma)) + 0 * x0[:, 0, 0, 0]
    ).to_row()
    for by in RULES:
        groups = make_groups(TdcSection(groups=4, by=by), path)
        assert sum(row_nats(groups, row)) == pytest.approx(row["nats"], rel=1e-6)
    profile = Profile(*(torch.tensor(row[key], dtype=torch.float64) for key in ("log_sigma", "x0_error")))
    assert row_nats(groups, row) == pytest.approx(group_nats(groups, profile, 1, 0.2))


def test_a_row_of_one_expert_has_nats_in_its_own_group_only():
    path = PATHS["linear-1000"]
    groups = make_groups(TdcSection(groups=3), path)
    profile = measured(path.within(*groups[1].train))
    assert group_nats(groups, profile) == pytest.approx([0, profile.nats(), 0])


# -- budgets ----------------------------------------------------------------------------------------------------------


def mean(groups) -> float:
    """Expected FLOPs of a sampling step over the base's."""
    return sum(group.steps * group.ratio for group in groups)


@pytest.mark.parametrize(("count", "k"), [(5, 0.5), (3, 0.4)])
def test_published_budgets_of_four_fifths(count, k):
    groups = make_groups(TdcSection(groups=count, k=k), PATHS["linear-1000"])
    assert mean(groups) == pytest.approx(0.8, abs=1e-12)


def test_budgets_rise_towards_the_big_end():
    path = PATHS["linear-1000"]
    ratios = [group.ratio for group in make_groups(TdcSection(), path)]
    assert ratios == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    turned = [group.ratio for group in make_groups(TdcSection(big_end="high_noise"), path)]
    assert turned == pytest.approx(ratios[::-1])
    assert {group.ratio for group in make_groups(TdcSection(k=1), path)} == {1.0}
    given = make_groups(TdcSection(groups=2, ratios=(0.3, 0.9)), path)
    assert [group.ratio for group in given] == [0.3, 0.9]


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("big_end", ["low_noise", "high_noise"])
@pytest.mark.parametrize("wanted", [0.9, 1.0])
def test_a_mean_is_met_whatever_the_borders(by, big_end, wanted):
    path = PATHS["edm" if by == "information" else "linear-1000"]  # by information, one VP group has most of the steps
    groups = make_groups(TdcSection(groups=4, by=by, mean=wanted, big_end=big_end), path)
    assert mean(groups) == pytest.approx(wanted, abs=1e-12)
    assert all(0 < group.ratio <= 1 for group in groups)


def test_a_mean_gives_the_k_of_the_formula():
    groups = make_groups(TdcSection(groups=4, mean=0.8), PATHS["linear-1000"])
    k = (groups[0].ratio - 0.25) / 0.75
    assert k == pytest.approx(0.467, abs=5e-4)


def test_a_mean_out_of_reach_names_the_range():
    with pytest.raises(UserError, match=r"experts\.mean: 0\.5 .* more than 0\.6, up to 1"):
        make_groups(TdcSection(groups=5, mean=0.5), PATHS["linear-1000"])
    with pytest.raises(UserError, match="more groups"):
        make_groups(TdcSection(groups=1, mean=0.8), PATHS["linear-1000"])
    with pytest.raises(ValidationError):
        TdcSection(mean=1.2)


# -- overlap and boundaries -------------------------------------------------------------------------------------------


def test_overlap_widens_inner_borders_only():
    path = PATHS["edm"]
    groups = make_groups(TdcSection(groups=3, overlap=0.25), path)
    for group in groups:
        low, high = group.log_sigma
        reach = 0.25 * (high - low)
        assert group.train[0] == pytest.approx(max(low - reach, path.log_sigma_min))
        assert group.train[1] == pytest.approx(min(high + reach, path.log_sigma_max))
    assert groups[0].train[1] == path.log_sigma_max and groups[-1].train[0] == path.log_sigma_min


@pytest.mark.parametrize("name", VP)
@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 27, 100])
def test_every_whole_timestep_goes_to_the_group_of_its_noise_level(name, by, count):
    path = PATHS[name]
    groups = make_groups(TdcSection(groups=count, by=by), path, pivot=0.15)
    borders = boundaries(groups, path)
    assert borders == sorted(borders, reverse=True) and len(borders) == count - 1
    of = owners(groups, path)
    assert set(of) == set(range(count))
    assert of == [sum(t < border for border in borders) for t in range(path.last + 1)]
    assert calls(borders, torch.arange(path.last + 1)) == [of.count(number) for number in range(count)]
    assert all(path.within(*group.train) for group in groups)  # wide enough to train on


def test_as_many_groups_as_timesteps_and_no_more():
    path = GaussianPath.from_scheduler(diffusers.DDPMScheduler(num_train_timesteps=10, beta_end=0.5))
    for by in RULES:
        groups = make_groups(TdcSection(groups=10, by=by), path)
        assert calls(boundaries(groups, path), list(range(10))) == [1] * 10
    with pytest.raises(UserError, match="11 groups for 10 timesteps"):
        make_groups(TdcSection(groups=11), path)


def test_information_in_one_place_still_leaves_each_group_a_timestep():
    path = PATHS["linear-1000"]
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, 257, dtype=torch.float64)
    for level in (path.log_sigma_min, 0.0, path.log_sigma_max):
        peak = Profile(log_sigma, 1e-30 + torch.exp(-((log_sigma - level) ** 2) / 1e-4))
        groups = make_groups(TdcSection(groups=50, by="information"), path, peak)
        assert min(calls(boundaries(groups, path), torch.arange(1000))) >= 1


def test_a_profile_without_information_is_refused():
    path = PATHS["flow"]
    for error in (0.0, math.nan, math.inf):
        profile = Profile(measured(path).log_sigma, torch.full((48,), error, dtype=torch.float64))
        with pytest.raises(UserError, match="use by: timestep"):
            make_groups(TdcSection(groups=3, by="information"), path, profile)


def test_groups_beyond_the_range_of_a_shifted_flow_are_refused():
    path = GaussianPath.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=100.0))
    with pytest.raises(UserError, match=r"experts\.groups: 50 groups by timestep"):
        make_groups(TdcSection(groups=50), path)


def test_a_sampler_at_the_border_calls_the_noisier_expert():
    # VP: timestep 333 = 999 / 3 is a border; the table's own time
    borders = boundaries(make_groups(TdcSection(groups=3), PATHS["linear-1000"]), PATHS["linear-1000"])
    assert borders == [666.0, 333.0]
    assert calls(borders, [999, 666, 665.5, 333, 332, 0]) == [2, 2, 2]
    # EDM and flow: a sampler's step falls on the border, in float32
    for count, steps in itertools.product((2, 3, 4, 5, 7), (1, 5)):
        scheduler = diffusers.EDMEulerScheduler()
        scheduler.set_timesteps(count * steps + 1)  # from one end of the ramp to the other
        edm = boundaries(make_groups(TdcSection(groups=count), PATHS["edm"]), PATHS["edm"])
        assert calls(edm, scheduler.timesteps) == [steps + 1] + [steps] * (count - 1)
        times = torch.arange(count * steps, 0, -1, dtype=torch.float32) / (count * steps)
        flow = boundaries(make_groups(TdcSection(groups=count), PATHS["flow"]), PATHS["flow"])
        assert calls(flow, times * 1000) == [steps + 1] * 1 + [steps] * (count - 2) + [steps - 1]
        shifted = boundaries(make_groups(TdcSection(groups=count), PATHS["shifted"]), PATHS["shifted"])
        bent = 3 * times / (1 + 2 * times)
        assert calls(shifted, bent * 1000) == [steps + 1] * 1 + [steps] * (count - 2) + [steps - 1]


def test_calls_of_short_and_long_runs():
    groups = make_groups(TdcSection(), PATHS["linear-1000"])
    borders = boundaries(groups, PATHS["linear-1000"])
    for steps, expected in ((1, None), (50, [10] * 5), (1000, [200] * 5)):
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(steps)
        counted = calls(borders, scheduler.timesteps)
        assert sum(counted) == steps and (expected is None or counted == expected)
    heun = diffusers.HeunDiscreteScheduler()
    heun.set_timesteps(10)  # two calls a step, but for the last
    assert sum(calls(borders, heun.timesteps)) == 19
    assert calls([], [3.0, 2.0]) == [2]
