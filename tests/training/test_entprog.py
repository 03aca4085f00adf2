"""Ent-Prog inside real tiny runs: what opens when, what is frozen, what is held, exact resume, snapshots."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import DIT, FLOW, state, tiny_recipe

from entrecipes.blocks.cost import weight_names
from entrecipes.errors import UserError
from entrecipes.evaluation.scoring import Scoring
from entrecipes.recipe.schema import Recipe
from entrecipes.training.loop import step, train
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.telling import begin

DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 6}}
DRAWS = {"images": 8, "noise_levels": 4}
LEARNED = {"type": "infonoise", "warmup": 32, "ramp": 32, "refresh_every": 32, "buffer": 100}
DECAYING = {"type": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}


def opening(blocks: dict, **sections) -> Recipe:
    keys = {"type": "entprog", "step": 0.17, **blocks}
    if keys.get("growth", "adaptive") == "adaptive":
        keys = {"holdout": DRAWS, **keys} if keys.get("mode") == "snapshot" else {"holdout": DRAWS, "burst": 2, **keys}
    if keys.get("order") not in ("random", "last_first", "first_first"):
        keys = {"draws": DRAWS, **keys}
    training = {"images": 384, "checkpoint_every": 384, **sections.pop("training", {})}
    return tiny_recipe(DEEP, FLOW, blocks=keys, training=training, **sections)


def started(recipe: Recipe, folder=None) -> Run:
    """A fresh DiT predicts 0 whatever is skipped (adaLN-Zero): random weights make every block do something."""
    run = Run(recipe, folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return run


def listened(run: Run, until: int | None = None) -> list[dict]:
    rows: list[dict] = []

    def listener(row: dict) -> None:
        rows.append(row)
        run.stop_requested |= until is not None and row["images"] >= until

    run.log.listener = listener
    return rows


def events(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kind"] == "event"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CASES = {
    "published": {"supernet": 0.5},
    "ours": {"order": "cost_aware", "inputs": "never", "largest": 0.67, "final": "search", "rerank": True},
    "snapshots": {"mode": "snapshot", "order": "loss_rise", "supernet": 0.75, "inputs": "never"},
    "linear": {"growth": "linear", "order": "random"},
}


@pytest.mark.parametrize(
    "case, stop",
    [("published", 16), ("published", 144), ("ours", 128), ("snapshots", 112), ("linear", 112)],
)
def test_resume_is_exact_also_in_the_middle_of_a_turn(tmp_path, case, stop):
    """With a learned noise schedule, whose draws weight scores and losses."""
    recipe = opening(CASES[case], noise=LEARNED)
    whole = started(recipe)
    rows = listened(whole)
    train(whole)
    part = started(recipe, tmp_path)
    before = listened(part, until=stop)
    train(part)
    assert part.images == stop
    rest = Run(recipe, tmp_path)
    after = listened(rest)
    resume(rest)
    comparison = rest.blocks.comparison
    if case != "linear":
        assert comparison is not None and rest.blocks.held > comparison.candidates[0].m
    train(rest)
    one, two = state(whole), state(rest)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    decided = [[(row["images"], row["open"], row["what"]) for row in events(part)] for part in (rows, before + after)]
    assert decided[0] == decided[1]


def test_adapters_open_by_blocks_and_resume_exactly(tmp_path):
    """LoRA on top, in snapshots: closed blocks' adapters do not move, and nothing else is kept or put aside."""
    started(opening({})).components.pipeline().save_pretrained(tmp_path / "base")
    values = opening(CASES["snapshots"] | {"order": "last_first", "largest": 0.67}).model_dump(exclude_unset=True)
    values["blocks"]["adapter"] = {"type": "lora", "rank": 2}
    recipe = Recipe.model_validate(values | {"pipeline": {"pretrained": str(tmp_path / "base")}})
    whole = Run(recipe, None)
    begun = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    train(whole)
    moved = {name for name, weight in whole.model.state_dict().items() if not torch.equal(weight, begun[name])}
    assert moved and all("lora_" in name and int(name.split(".")[1]) >= 2 for name in moved)
    part = Run(recipe, tmp_path)
    listened(part, until=48)
    train(part)
    rest = Run(recipe, tmp_path)
    resume(rest)
    assert rest.blocks.start["model"].keys() == {name for name in begun if "lora_" in name}
    train(rest)
    one, two = state(whole), state(rest)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("case", CASES)
def test_stages_grow_and_hold_what_is_open(case):
    blocks = CASES[case] | ({"burst": 1} if case in ("published", "ours") else {})
    run = started(opening(blocks, training={"images": 768}))
    begin(run)
    batches, blocks = run.batches(), run.blocks
    names = weight_names(blocks.stack)
    opened: list[tuple[int, set[int]]] = []
    while run.images < 768:
        held = {i for i in range(6) if any(run.model.get_parameter(n).requires_grad for n in names[i])}
        if blocks.comparison:
            assert held == set(blocks.order[: blocks.comparison.current.m]) <= set(blocks.order[: blocks.held])
        else:
            assert held == set(blocks.order[: blocks.m])
            opened.append((blocks.stage, held))
        assert run.model.proj_out_2.weight.requires_grad
        assert run.model.pos_embed.proj.weight.requires_grad == (CASES[case].get("inputs", "always") == "always")
        listed = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
        outside = {n for block in blocks.order[blocks.held :] for n in names[block]}
        assert not any(id(run.model.get_parameter(n)) in listed for n in outside), "no optimizer state when closed"
        step(run, batches)
    assert all(earlier <= later for (_, earlier), (_, later) in zip(opened, opened[1:], strict=False)), "nested"
    assert {stage for stage, _ in opened} == {0, 1, 2, 3}
    assert len(opened[-1][1]) == 6 if case != "ours" else len(opened[-1][1]) <= 4


def test_rows_say_what_was_found():
    run = started(opening(CASES["ours"], training={"images": 768}))
    rows = listened(run)
    train(run)
    json.dumps(rows, allow_nan=False)
    first, *_ = events(rows)
    assert sorted(first["order"]) == list(range(6)) and len(first["scores"]) == 6 and first["score"] == "information"
    choices = [row for row in events(rows) if "candidates" in row]
    assert choices
    for row in choices:
        best = max(row["candidates"], key=lambda candidate: candidate["ce"])
        assert row["m"] == best["m"] == len(row["open"])
        total = sum(candidate["drop"] for candidate in row["candidates"])
        last = [candidate["losses"][-1] for candidate in row["candidates"]]
        warm = row["candidates"][-1]["losses"][0]  # after everyone's first turn
        assert any(warm - total == pytest.approx(loss, rel=1e-6) for loss in last), "the last turn's loss"
        assert row["floor"] == min(row["open"]) and row["predicted_speed_up"] > 1
    assert run.blocks.measuring_seconds > 0


def test_closed_weights_do_not_move_by_one_bit_and_the_average_goes_on():
    """AdamW with weight decay and momentum; the closed ones among the held in turns."""
    recipe = opening({"order": "last_first", "inputs": "never", "supernet": 0.5, "burst": 3}, optimizer=DECAYING)
    run = started(recipe)
    begin(run)
    batches, blocks = run.batches(), run.blocks
    names, moved = weight_names(blocks.stack), set()
    for _ in range(12):
        before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
        average = {name: weight.clone() for name, weight in run.ema.model.named_parameters()}
        trained = {name for name, weight in run.model.named_parameters() if weight.requires_grad}
        states = {n: run.optimizer.state[run.model.get_parameter(n)] for n in before if n not in trained
                  and run.model.get_parameter(n) in run.optimizer.state}  # fmt: skip
        kept = {name: of["exp_avg"].clone() for name, of in states.items()}
        step(run, batches)
        share = 1 - run.ema.decay(run.images, 16)
        for name, weight in run.model.named_parameters():
            expected = average[name].lerp(weight.detach(), share)
            torch.testing.assert_close(run.ema.model.get_parameter(name).detach(), expected)
            same = torch.equal(weight, before[name])
            assert same or name in trained
            moved |= set() if same else {name}
        assert all(torch.equal(states[name]["exp_avg"], kept[name]) for name in kept), "held, and left alone"
    assert {name for name in moved if name.startswith("transformer_blocks")} <= {n for i in (3, 4, 5) for n in names[i]}
    assert not any(name.startswith("pos_embed") for name in moved)


def test_no_graph_is_kept_below_the_lowest_open_block():
    run = started(opening({"growth": "none", "largest": 0.34, "order": "last_first", "inputs": "never"}))
    begin(run)
    outputs = []
    for block in run.model.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output.requires_grad))
    step(run, run.batches())
    assert outputs[:6] == [False] * 4 + [True] * 2
    assert run.blocks.advance(384) == [] and run.blocks.held == 2


def test_snapshots_start_from_the_same_weights_and_the_best_are_kept():
    run = started(opening({"mode": "snapshot", "order": "last_first", "supernet": 0.75}, optimizer=DECAYING))
    seen = []
    restore = run.blocks.subject.restore

    def watched(snapshot: dict) -> None:
        seen.append(state(run))
        restore(snapshot)
        seen.append(state(run))

    object.__setattr__(run.blocks.subject, "restore", watched)
    begin(run)
    start, batches = state(run), run.batches()
    while run.blocks.comparison:
        found = run.blocks.comparison
        step(run, batches)
    (_, again, last, kept) = seen
    assert all(torch.equal(start[key], again[key]) for key in start), "weights, average and moments, bit for bit"
    first = seen[0]
    best = first if found.best("predicted").m == found.candidates[0].m else last
    assert kept.keys() == best.keys() and all(torch.equal(kept[key], best[key]) for key in best)
    assert any(not torch.equal(first[key], last[key]) for key in first if key in last)


def test_the_loss_is_that_of_training():
    run = started(opening({}))
    scoring = Scoring.on_images(run.recipe.blocks.holdout, run.components, run.data, run.device, split="held_out")
    weights = scoring.weights(run.noise)
    random_state = torch.get_rng_state()
    loss = scoring.loss(run.model, run.objective, weights)
    assert loss == scoring.loss(run.model, run.objective, weights) and run.model.training
    assert torch.equal(random_state, torch.get_rng_state())
    expected = 0.0
    run.model.eval()
    for level, batch in scoring.bundle.batches(3):
        with torch.no_grad():
            losses = run.objective(*run.denoiser(*batch), batch[2])[0]
        expected += float(weights[level]) * losses.double().sum().item() / len(scoring.bundle.x0)
    assert loss == pytest.approx(expected, rel=1e-5)
    held_out = run.data.space.encode(run.data.held_out.tensor)
    for x0 in scoring.bundle.x0:
        assert any(torch.equal(x0, other) for other in held_out), "held-out images"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="held_out above 0"):
        Run(opening({}, data={"held_out": 0}), None)
    unet = tiny_recipe(blocks={"type": "entprog", "growth": "none", "order": "last_first"})
    with pytest.raises(UserError, match="blocks: UNet2DModel"):
        Run(unet, None)


PHASES = {"type": "phases", "phases": [{"frames": 1}]}
BAD = {
    "a single stage": ({"stages": 1}, {}, "leaves nothing to grow"),
    "an unknown order": ({"order": "cei2"}, {}, "order"),
    "pruning": ({}, {"prune": {"type": "one_shot"}}, "has put in order"),
    "phases": ({"mode": "snapshot"}, {"curriculum": PHASES}, "can't go back over a phase"),
}


@pytest.mark.parametrize("case", BAD)
def test_sections_that_make_no_sense(case):
    keys, sections, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tiny_recipe(DEEP, FLOW, blocks={"type": "entprog", **keys}, **sections)
