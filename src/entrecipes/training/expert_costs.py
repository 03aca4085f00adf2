"""What a TDC recipe will cost, and what it has cost, with its own sampler."""

from __future__ import annotations

from collections.abc import Sequence

from entrecipes.diffusion.pipelines import Components, load_components
from entrecipes.errors import UserError
from entrecipes.experts.costs import Costs, expected_costs, lines
from entrecipes.experts.grouping import Group, boundaries, calls, make_groups
from entrecipes.experts.tdc import search_flops
from entrecipes.experts.units import Units
from entrecipes.recipe.schema import Recipe


def expected(recipe: Recipe) -> list[str]:
    """Groups, budgets and costs in words, as far as they are known before the base is trained.

    Raises:
        UserError: For budgets that the units of the model can't meet, or a search that leaves nothing to train with.
    """
    components, section = load_components(recipe.pipeline, recipe.training.seed), recipe.experts
    units = Units.of(components.model, section.search.units, components.family.one_pass)
    groups = make_groups(section, components.path, None, recipe.evaluation.held_out.gate_pivot)
    for group in groups:
        if group.ratio < 1:
            units.project([group.ratio] * len(units.units), group.ratio * units.base_flops, section.search.tolerance)
    searched = search_flops(recipe, groups, units.base_flops)
    guessed = "the groups are those of Gaussian data; the base will show those of this data"
    try:
        costs = costs_of(recipe, components, groups, units.base_flops, searched)
    except UserError as error:
        if section.by != "information":
            raise
        return [f"{guessed}: {error}"]
    return [guessed] * (section.by == "information") + lines(groups, costs, components.path)


def costs_of(
    recipe: Recipe,
    components: Components,
    groups: Sequence[Group],
    base_flops: float,
    searched: float,
    networks: Sequence[float] | None = None,
) -> Costs:
    """What the run costs with the recipe's own sampler; `networks` are the experts' FLOPs, when they are found."""
    scheduler = type(components.scheduler).from_config(components.scheduler.config)
    scheduler.set_timesteps(recipe.evaluation.steps)
    steps = calls(boundaries(groups, components.path), scheduler.timesteps)
    training = recipe.training
    return expected_costs(
        recipe.experts, groups, base_flops, training.images, searched, steps, networks, training.batch_size
    )
