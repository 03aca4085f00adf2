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
    run = Run(tiny_recipe(deep, FLOW, blocks=blocks, training={"images": 256}), None, rows.append)
    train(run)
    costs = [row for row in rows if row["kind"] == "costs"]
    events = [row for row in rows if row["kind"] == "event"]
    assert [row["m"] for row in events if "candidates" not in row][-1] == 4
    fewest, most = (pick(costs, key=lambda row: row["trained_parameters"]) for pick in (min, max))
    for key in ("saved_bytes", "gradient_bytes", "optimizer_bytes"):
        assert fewest[key] < most[key]
    assert most["gradient_bytes"] == 4 * most["trained_parameters"]
    chosen = next(row for row in events if "candidates" in row)
    assert [(c["steps"], len(c["losses"])) for c in chosen["candidates"]] == [(1, 2)] * 2, "the first turn warms up"
    assert all(row["seconds"] >= 0 for row in events)


def test_with_checkpointing_only_what_is_held_counts():
    """Checkpointing shows autograd the inputs of frozen blocks too, which nothing holds afterwards."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=16,
        ffn_dim=48,
        num_layers=4,
    ).train()
    inputs = torch.randn(1, 3, 2, 8, 8), torch.ones(1), torch.zeros(1, 1, 8)

    def saved(opened: range, checkpointed: bool) -> int:
        (model.enable_gradient_checkpointing if checkpointed else model.disable_gradient_checkpointing)()
        for name, weight in model.named_parameters():
            parts = name.split(".")
            weight.requires_grad_(parts[0] == "proj_out" or (parts[0] == "blocks" and int(parts[1]) in opened))
        costs = StepCosts(model)
        with costs.watch():
            model(*inputs, return_dict=False)[0].sum().backward()
        return costs.take(torch.optim.SGD([w for w in model.parameters() if w.requires_grad]))["saved_bytes"]

    head, hidden = saved(range(0), checkpointed=False), 2 * 16 * 24 * 4  # frames, tokens, channels, bytes
    assert saved(range(0), checkpointed=True) < 2 * hidden, "at no time are the inputs of two closed blocks held"
    last = saved(range(3, 4), checkpointed=True)
    assert head < last < saved(range(3, 4), checkpointed=False)
    assert last - head < 3 * hidden, "its input, and what the modulation of the block needs"
