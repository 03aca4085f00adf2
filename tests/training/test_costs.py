"""Memory of a training step, against what can be counted by hand."""

import torch
from tiny import DIT, FLOW, tiny_recipe
from torch import nn

from entrecipes.training.costs import StepCosts
from entrecipes.training.loop import train
from entrecipes.training.run import Run


class Chain(nn.Sequential):
    """Linear layers of width 8 with a ReLU after each."""

    def __init__(self, depth: int) -> None:
        super().__init__(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(depth)])


def cost(model: nn.Module, costs: StepCosts | None = None, rows: int = 5) -> dict | None:
    costs = costs or StepCosts(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    with costs.watch():
        model(torch.ones(rows, 8)).sum().backward()
    optimizer.step()
    row = costs.take(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return row


def test_the_bytes_are_those_of_the_layers_that_need_them():
    model, activation, weights = Chain(3), 5 * 8 * 4, 8 * 8 * 4 + 8 * 4
    full = cost(model)
    # each layer keeps its input (the first: x), each ReLU its output, which is the next layer's input
    assert full["saved_bytes"] == 4 * activation
    assert full["gradient_bytes"] == 3 * weights
    assert full["optimizer_bytes"] == 2 * 3 * weights + 6 * 4  # two moments, and a step count for each tensor
    assert full["trained_parameters"] == 3 * 72
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    last = cost(model)
    assert last["saved_bytes"] == 2 * activation and last["gradient_bytes"] == weights
    model.requires_grad_(True)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    lowest = cost(model)  # frozen layers above an open one keep their ReLUs' signs, but the last input is not needed
    assert last["saved_bytes"] < lowest["saved_bytes"] <= full["saved_bytes"]


def test_a_trained_set_is_measured_once_until_told_that_it_changed():
    model = Chain(2)
    costs = StepCosts(model)
    assert cost(model, costs) and cost(model, costs) is None
    model[0].requires_grad_(False)
    assert cost(model, costs)
    assert cost(model, costs) is None
    costs.begin()
    assert cost(model, costs)


def test_of_several_forward_passes_the_largest_counts():
    model = Chain(2)
    costs = StepCosts(model)
    for rows in (3, 5):
        with costs.watch():
            model(torch.ones(rows, 8)).sum().backward()
    row = costs.take(torch.optim.SGD(model.parameters()))
    assert row["saved_bytes"] == cost(model, rows=5)["saved_bytes"] and row["optimizer_bytes"] == 0


def test_what_steps_hold_is_logged_for_every_trained_set():
    rows = []
    deep = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
    small = {"draws": {"images": 4, "noise_levels": 4}, "holdout": {"images": 4, "noise_levels": 2}, "burst": 1}
    blocks = {"type": "entprog", "order": "last_first", "inputs": "never", "supernet": 0.5, "stages": 2, **small}
    run = Run(tiny_recipe(deep, FLOW, blocks=blocks, training={"images": 128}), None, rows.append)
    train(run)
    costs = [row for row in rows if row["kind"] == "costs"]
    events = [row for row in rows if row["kind"] == "event"]
    assert [row["m"] for row in events if "candidates" not in row][-1] == 4
    fewest, most = (pick(costs, key=lambda row: row["trained_parameters"]) for pick in (min, max))
    for key in ("saved_bytes", "gradient_bytes", "optimizer_bytes"):
        assert fewest[key] < most[key]
    assert most["gradient_bytes"] == 4 * most["trained_parameters"]
    chosen = next(row for row in events if "candidates" in row)
    assert [c["steps"] > 0 and len(c["losses"]) == c["steps"] for c in chosen["candidates"]] == [True, True]
    assert all(row["seconds"] >= 0 for row in events)
