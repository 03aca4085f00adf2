"""What a TDC run is made of: the recipes of its parts, the cost told beforehand, the plan on disk."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import DIT, FLOW, UNET, tiny_recipe

from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.experts.grouping import make_groups
from entrecipes.experts.tdc import PLAN, Member, base_recipe, member_recipe, read_plan, search_flops
from entrecipes.noise.fixed import Uniform
from entrecipes.recipe.experts import MemberSection
from entrecipes.recipe.noise import UniformNoise

VP = {"class": "DDIMScheduler", "config": {}}
PATH = GaussianPath.from_scheduler(DDIMScheduler())


def recipe(**changes):
    sections = {
        "experts": {"type": "tdc", "groups": 2, "base_share": 0.25},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3, "schedule": {"decay": "cosine", "decay_start": 100}},
        "training": {"images": 1600},
        "evaluation": {"metrics": ["kid"], "samples": 8},
    }
    return tiny_recipe(UNET, VP, **(sections | changes))


def test_the_base_is_the_same_recipe_for_its_share():
    base = base_recipe(recipe(), Path("there"))
    assert base.experts.type == "none" and base.evaluation.metrics == ()
    assert base.training.images == 400 and base.training.output == "there"
    assert base.optimizer.schedule.decay_start == 25
    assert base.pipeline == recipe().pipeline and base.training.seed == recipe().training.seed


def test_an_expert_starts_anew_within_its_group():
    experts = {"type": "tdc", "groups": 2, "overlap": 0.5, "warmup": None}
    learned = {"type": "infonoise", "warmup": 160, "refresh_every": 320}
    whole = recipe(experts=experts, noise=learned)
    groups = make_groups(whole.experts, PATH)
    member = member_recipe(whole, groups[1], 800, Path("start"), Path("there"))
    assert member.pipeline.pretrained == "start"
    assert member.experts.log_sigma == groups[1].train and groups[1].train[1] > groups[1].log_sigma[1]
    assert member.optimizer.learning_rate == 5e-4 and member.optimizer.schedule.warmup == 40
    assert member.optimizer.schedule.decay_start == 50
    assert (member.noise.warmup, member.noise.refresh_every, member.noise.ramp) == (80, 160, None)
    seeds = {member_recipe(whole, group, 800, Path("s"), Path("t")).training.seed for group in groups}
    assert len(seeds | {whole.training.seed}) == 3


def test_one_decay_runs_over_both():
    whole = recipe(experts={"type": "tdc", "groups": 2, "base_share": 0.25, "decay": "joint"})
    member = member_recipe(whole, make_groups(whole.experts, PATH)[0], 800, Path("s"), Path("t"))
    assert base_recipe(whole, Path("b")).optimizer.schedule.span == (0, 0.25)
    assert member.optimizer.schedule.span == (0.25, 1)


def test_what_a_part_can_not_be_is_said():
    whole = recipe(noise={"type": "infonoise", "warmup": 1599})
    with pytest.raises(UserError, match="recipe of the base would be wrong: noise.warmup"):
        base_recipe(whole.model_copy(update={"training": whole.training.model_copy(update={"images": 32})}), Path("b"))


def test_a_member_draws_the_density_of_its_range():
    member = Member(MemberSection(log_sigma=(-1.0, 0.5)))
    whole, part = Uniform(UniformNoise(), PATH), Uniform(UniformNoise(), member.limited(PATH))
    levels = torch.linspace(-0.9, 0.4, 5, dtype=torch.float64)
    share = whole.cdf(torch.tensor([0.5])) - whole.cdf(torch.tensor([-1.0]))
    torch.testing.assert_close(part.density(levels), whole.density(levels) / share, rtol=1e-5, atol=0)
    drawn = part.sample(1000, torch.Generator().manual_seed(0))[0]
    assert -1 <= drawn.min() < -0.99 and 0.49 < drawn.max() <= 0.5
    with pytest.raises(UserError, match="leave nothing"):
        PATH.within(100, 200)


def test_times_of_a_part_are_those_of_the_whole():
    for scheduler in (VP, FLOW):
        built = tiny_recipe(DIT, scheduler).pipeline.build.scheduler
        path = GaussianPath.from_scheduler(getattr(diffusers, built.class_name)(**built.config))
        cut, levels = path.within(-1, 1), torch.linspace(-1, 1, 9, dtype=torch.float64)
        assert torch.equal(cut.timestep(levels), path.timestep(levels))
        assert torch.equal(cut.fraction(levels), path.fraction(levels))


def test_the_search_is_told_at_its_most():
    whole = recipe()
    groups = make_groups(whole.experts, PATH)
    more = recipe(experts={"type": "tdc", "groups": 2, "search": {"rounds": 20}})
    once = recipe(experts={"type": "tdc", "groups": 2, "search": {"proposer": {"type": "uniform"}}})
    costs = [search_flops(one, groups, 1.0) for one in (once, whole, more)]
    assert costs[0] < costs[1] < costs[2]
    draws, profile, step = 64 * 8, 8 * 4, 3 * 20 * 32
    assert costs[0] == profile + 2 * draws + 3 * draws + 0.75 * (step + draws)


@pytest.mark.parametrize(("text", "said"), [(None, "missing"), ("{", "damaged"), ('{"groups": []}', "damaged")])
def test_a_plan_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "search").mkdir()
    if text is not None:
        (tmp_path / PLAN).write_text(text)
    with pytest.raises(UserError, match=f"plan.json: {said}"):
        read_plan(tmp_path)


def test_a_plan_reads_back(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / PLAN).write_text(json.dumps({"groups": [], "boundaries": [], "costs": {}}))
    assert read_plan(tmp_path)["groups"] == []
