"""Orders of blocks, against brute force; the cost of a step, against counted operations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny import DIT
from tiny_video_models import wan
from torch.utils.flop_counter import FlopCounterMode

from entrecipes.blocks.cost import CostModel, cost_model, weight_names
from entrecipes.blocks.ordering import by_score, cost_aware, densest, density, without_scores
from entrecipes.blocks.outside import inputs_and_head
from entrecipes.blocks.stack import BlockStack


def dit(**config) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**{**DIT["config"], "num_layers": 6, **config})


def call(model: DiTTransformer2DModel) -> torch.Tensor:
    size = model.config.sample_size
    return model(torch.randn(2, 1, size, size), timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 2])).sample


# -- cost -------------------------------------------------------------------------------------------------------------


def test_the_step_cost_by_hand():
    costs = CostModel([1, 1, 1, 1])
    assert (costs.cost({0, 1, 2, 3}).total, costs.cost({0, 1, 2, 3}).speed_up) == (12, 1)
    last = costs.cost({3})
    assert (last.forward, last.inputs, last.weights, last.activations) == (4, 1, 1, 0.25)
    assert costs.cost({3}, below=True).inputs == 4 and costs.floor({3}, True) == 0
    assert costs.cost({1, 3}).total == 4 + 3 + 2 and costs.floor({1, 3}, False) == 1
    assert costs.cost(()).total == 4 and costs.cost(()).activations == 0, "the head alone"
    uneven = CostModel([1, 3], trained=[1, 0])
    assert uneven.cost({1}).inputs == 1.5 and uneven.cost({0, 1}).weights == pytest.approx(0.5)


@pytest.mark.parametrize("opened", [(0, 1, 2, 3, 4, 5), (5,), (2, 4), (0,), (3, 4, 5)])
def test_predicted_costs_are_the_operations_that_torch_counts(opened):
    """A linear layer's forward pass, input gradient and weight gradient take the same number of operations. Counted
    are the feed-forward layers, whose share of the weights is that of the operations."""
    model = dit(attention_head_dim=16)
    stack = BlockStack(model)

    def operations(trained: tuple[int, ...]) -> float:
        for name, weight in model.named_parameters():
            weight.requires_grad_(any(name.startswith(f"transformer_blocks.{i}.") for i in trained))
        with FlopCounterMode(display=False, depth=None) as counter:
            call(model).sum().backward()
        counts = counter.get_flop_counts()
        return sum(sum(of.values()) for module, of in counts.items() if module.endswith(".ff"))

    costs = cost_model(stack)
    full = operations(tuple(range(6)))
    predicted = costs.cost(opened)
    # the lowest block's own input gradient is not needed by its first layer, one of the two
    saved = 0.5 / 3 / 6 if set(opened) != set(range(6)) else 0
    assert operations(opened) / full == pytest.approx(1 / predicted.speed_up, abs=saved + 0.02)


def test_only_eligible_weights_cost_weight_gradients():
    stack = BlockStack(dit())
    biases = {name for names in weight_names(stack) for name in names if name.endswith("bias")}
    full, few = cost_model(stack), cost_model(stack, biases)
    assert few.weights == full.weights and sum(few.trained) < 0.1 * sum(full.trained)


# -- what stands outside the blocks -----------------------------------------------------------------------------------


def test_inputs_come_before_the_blocks_and_the_head_after():
    model = dit()
    flags = [weight.requires_grad for weight in model.parameters()]
    inputs, head = inputs_and_head(BlockStack(model), lambda: call(model))
    assert {name.split(".")[0] for name in inputs} == {"pos_embed"}
    assert {name.split(".")[0] for name in head} == {"proj_out_1", "proj_out_2"}
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters())


def test_an_embedder_that_blocks_and_head_read_is_an_input():
    model, options = wan()
    inputs, head = inputs_and_head(BlockStack(model), lambda: model(**options))
    assert any(name.startswith("condition_embedder.time_embedder") for name in inputs)
    assert "scale_shift_table" in head and any(name.startswith("proj_out") for name in head)
    assert not any(name.startswith("blocks.") for name in inputs | head)


# -- orders -----------------------------------------------------------------------------------------------------------


def test_scores_rank_signed_and_open_blocks_stay_in_front():
    assert by_score([0.1, -3.0, 2.0, 0.1]) == [2, 0, 3, 1]
    assert by_score([0.1, -3.0, 2.0, 0.1], opened=[1, 3]) == [1, 3, 2, 0]


def test_baselines():
    assert without_scores("last_first", 3, 0) == [2, 1, 0] and without_scores("first_first", 3, 0) == [0, 1, 2]
    orders = [without_scores("random", 12, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(12))


@pytest.mark.parametrize("seed", range(12))
def test_each_bundle_is_the_densest_of_all_sets(seed):
    """Uneven blocks, some scores negative, gradients ending at the floor or not."""
    rng = random.Random(seed)
    count = 7
    costs = CostModel([rng.randint(1, 5) for _ in range(count)])
    below = seed % 4 == 3
    gains = [max(rng.gauss(0.5, 1), 1e-3) for _ in range(count)]
    opened: list[int] = []
    while len(opened) < count:
        closed = [block for block in range(count) if block not in opened]
        subsets = [set(c) for n in range(1, len(closed) + 1) for c in itertools.combinations(closed, n)]
        best = max(density(subset, gains, costs, below, opened) for subset in subsets)
        found = densest(gains, costs, below, opened)
        assert density(found, gains, costs, below, opened) == pytest.approx(best)
        opened += found


def test_a_floor_is_paid_for_together_with_the_blocks_above_it():
    costs = CostModel([1] * 6)
    # alone, block 3 is worth 3 / (3 + 1) and block 4 is worth 3 / (2 + 1); together 6 / (3 + 2)
    order = cost_aware([0.01, 0.01, 0.01, 3, 3, 0.01], costs)
    assert order[:2] == [4, 3], "the denser one first, should only one be opened"
    assert order[-1] == 0, "nothing is worth so many input gradients"
    # a high score below is worth its way down, and what lies between is cheap then
    assert cost_aware([9, 0.5, 0.4, 0.3, 0.2, 0.1], costs) == [0, 1, 2, 3, 4, 5]
    assert by_score([0.5, 0.1, 0.4, 0.3, 0.2, 0.45])[0] == 0
    assert cost_aware([0.5, 0.1, 0.4, 0.3, 0.2, 0.45], costs)[0] == 5
    assert cost_aware([-1, 0, -2], CostModel([1, 1, 1])) == [2, 1, 0], "worthless blocks: the cheapest first"


def test_where_gradients_flow_through_all_blocks_anyway_the_score_alone_counts():
    scores = [0.5, 0.1, 0.4, 0.3, 0.2, 0.45]
    assert cost_aware(scores, CostModel([2] * 6), below=True) == by_score(scores)


def test_open_blocks_stay_in_front_of_the_cost_aware_order():
    order = cost_aware([0.5, 0.1, 0.4, 0.3, 0.2, 0.45], CostModel([1] * 6), opened=[1, 4])
    assert order[:2] == [1, 4] and order[2] == 5, "above the floor, the best score"
