"""What a profile recommends, on profiles that are known in closed form."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.information.profile import Histogram, Profile
from entrecipes.noise.base import RunFacts
from entrecipes.noise.recommendation import (
    Recommendation,
    draws_of,
    moments,
    recommend,
    sampling_scheduler,
    sampling_steps,
    weighted,
)
from entrecipes.recipe.base import build, choice
from entrecipes.recipe.pipeline import Objective as ObjectiveSection


def edm(sigma_min: float = 0.002) -> GaussianPath:
    return GaussianPath.from_scheduler(diffusers.EDMEulerScheduler(sigma_min=sigma_min))


def gaussian(path: GaussianPath, std: float = 0.5, levels: int = 64) -> Profile:
    """The best denoiser's error on normal data: its rate falls from 1 to 0 around sigma = std."""
    log_sigma = torch.linspace(path.log_sigma_min, path.log_sigma_max, levels, dtype=torch.float64)
    return Profile(log_sigma, 1 / (std**-2 + torch.exp(-2 * log_sigma)))


def recommended(path: GaussianPath, **facts: float) -> Recommendation:
    return recommend(gaussian(path), path, RunFacts(**facts))


def section(name: str, **keys: float):
    return choice("noise", name).section(**keys)


def test_a_log_normal_is_found_again() -> None:
    path = edm()
    sampler = build("noise", section("log_normal", mean=-1.0, std=0.7), path=path)
    edges = torch.linspace(path.log_sigma_min, path.log_sigma_max, 257, dtype=torch.float64)
    assert moments(Histogram(edges, sampler.cdf(edges))) == pytest.approx((-1.0, 0.7), abs=1e-3)


def test_the_window_holds_nine_tenths_and_the_recommendation_goes_there() -> None:
    path = edm()
    found = recommended(path)
    assert (found.kind, found.pivot_rule, found.section.pivot) == ("continuous", "usual", 0.15)
    shares = found.shares(found.informative)
    assert shares == pytest.approx({"outside": 0.1, "below": 0.05, "above": 0.05}, abs=1e-9)
    low, high = found.window
    base = 1 - (high - low) / (path.log_sigma_max - path.log_sigma_min)
    assert found.shares(found.draws)["outside"] == pytest.approx(0.98 * 0.1 + 0.02 * base, abs=1e-9)
    assert (found.log_normal.mean, found.log_normal.std) == pytest.approx(moments(found.informative), abs=0.006)


def test_discrete_data_gets_the_pinned_pivot() -> None:
    found = recommended(edm(), data_std=1.0, distinct_values=2)
    assert (found.kind, found.pivot_rule, found.pivot) == ("discrete", "usual", 0.2)
    assert found.section.model_dump(exclude_unset=True) == {"data": "discrete"}


def test_shares_of_a_schedule_are_those_of_its_distribution() -> None:
    path = edm()
    found = recommended(path)
    low, high = found.window
    draws, note = draws_of(section("log_normal"), path, [], found)
    normal = torch.distributions.Normal(-1.2, 1.2)
    below, above = normal.cdf(torch.tensor(low)).item(), 1 - normal.cdf(torch.tensor(high)).item()
    assert not note
    assert found.shares(draws) == pytest.approx({"outside": below + above, "below": below, "above": above}, abs=2e-3)


def test_weights_move_the_effective_draws() -> None:
    """Log-uniform draws times 1 / sigma^2: the share below sigma is that of an exponential."""
    path = edm()
    found = recommended(path)
    uniform, _ = draws_of(section("log_uniform"), path, [], found)
    weight = Objective(ObjectiveSection(weighting="p2", p2_gamma=0), path).weight  # snr = sigma^-2
    effective = weighted(uniform, weight(uniform.centres))
    expected = 1 - math.exp(-2 * (math.log(0.01) - path.log_sigma_min))
    assert effective.cdf(torch.tensor([math.log(0.01)])).item() == pytest.approx(expected, abs=2e-3)


def test_learned_schedules_are_told_by_their_rows_or_by_the_profile() -> None:
    path = edm()
    found = recommended(path)
    row = {"images": 1000, "log_sigma": [-2.0, -1.0, 0.0, 1.0], "density": [0.0, 0.75, 0.25, 0.0]}
    draws, note = draws_of(section("infonoise"), path, [{"images": 500}, row], found)
    assert note == "as the run had learned it by 1,000 images"
    assert draws.cdf(torch.tensor([-1.5, -0.5, 0.5])).tolist() == pytest.approx([0, 0.75, 1], abs=0.03)
    draws, note = draws_of(section("infonoise"), path, [], found)
    assert draws is found.draws and note
    uniform, _ = draws_of(section("uniform"), path, [], found)
    assert draws_of(section("loss_aware"), path, [], found)[0].cumulative.equal(uniform.cumulative)


@pytest.mark.parametrize(
    "scheduler, key",
    [
        (diffusers.DDIMScheduler(), None),
        (diffusers.EulerDiscreteScheduler(), "sigmas"),
        (diffusers.EDMEulerScheduler(), None),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sigmas"),
    ],
)
def test_sampling_grids_fall_from_end_to_end_and_stock_schedulers_take_them(scheduler, key: str | None) -> None:
    path = GaussianPath.from_scheduler(scheduler)
    profile = gaussian(path)
    found = recommend(profile, path, RunFacts())
    steps = sampling_steps(sampling_scheduler(scheduler, profile, found, 0.5), scheduler, 10)
    ends = torch.tensor([path.log_sigma_max, path.log_sigma_min], dtype=torch.float64)
    ends = path.coefficients(ends)[1] if path.name == "flow" else ends.exp()
    assert [steps["sigmas"][0], steps["sigmas"][-1]] == pytest.approx(ends.tolist())
    assert len(steps["sigmas"]) == 10 and sorted(steps["sigmas"], reverse=True) == steps["sigmas"]
    told = steps["set_timesteps"]
    assert (list(told) if told else [None]) == [key]
    if told:
        scheduler.set_timesteps(**told)
        assert scheduler.sigmas[:10].tolist() == pytest.approx(steps["sigmas"], rel=2e-3)
