"""Pruning inside real tiny runs: what goes when, exact resume over a stage, what is rebuilt, distillation."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import DIT, FLOW, UNET, state, tiny, tiny_recipe

from entrecipes.blocks.scores import SCORES
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError
from entrecipes.evaluation.scoring import Scoring
from entrecipes.recipe.prune import Draws
from entrecipes.recipe.schema import Recipe
from entrecipes.training.loop import step, train
from entrecipes.training.publish import publish
from entrecipes.training.resume import resume
from entrecipes.training.run import Run
from entrecipes.training.telling import begin

DEEP = {**DIT, "config": {**DIT["config"], "num_layers": 6}}
DRAWS = {"images": 8, "noise_levels": 4}
VOTE = {"samples": 3, "batches": 2, "batch_size": 4}


def pruned(prune: dict, **sections) -> Recipe:
    if prune["type"] not in ("none", "written"):
        prune = {"draws": DRAWS, **prune}
    if prune["type"] == "entpruner":
        prune = {"vote": VOTE, **prune}
    return tiny_recipe(DEEP, FLOW, prune=prune, **sections)


def perturbed(run: Run) -> Run:
    """A fresh DiT predicts 0 whatever is skipped (adaLN-Zero): random weights make every block do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return run


def trained(recipe: Recipe, folder=None, until: int | None = None) -> Run:
    run = Run(recipe, folder)
    if until:
        run.log.listener = lambda row: setattr(run, "stop_requested", row["images"] >= until)
    train(run)
    return run


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


LEARNED = {"type": "infonoise", "warmup": 32, "ramp": 32, "refresh_every": 32, "buffer": 100}
CASES = {
    "entpruner": {"type": "entpruner", "score": "ced", "stages": 3, "until": 0.7},
    "one block after another": {"type": "entpruner", "score": "information", "stages": 2, "rerank": "block"},
    "ranked once": {"type": "linear", "score": "loss_rise", "stages": 3, "until": 0.7, "rerank": "never"},
    "its own teacher": {"type": "linear", "score": "random", "stages": 2, "until": 0.6, "distill": {"weight": 0.5}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [48, 96])
def test_resume_over_a_stage_is_exact(tmp_path, case, stop):
    """With a learned noise schedule, whose draws weight the scores."""
    recipe = pruned(CASES[case], noise=LEARNED)
    whole = trained(recipe)
    part = trained(recipe, tmp_path, until=stop)
    assert part.images < 160
    rest = Run(recipe, tmp_path)
    resume(rest)
    assert rest.pruner.kept == part.pruner.kept
    train(rest)
    ours, theirs = state(whole), state(rest)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["remove"] for row in whole.pruner.stages] == [row["remove"] for row in rest.pruner.stages]
    assert len(whole.pruner.kept) == 3, "the target is always met"


def test_a_stage_rebuilds_what_depends_on_the_blocks():
    run = Run(pruned({"type": "linear", "score": "spread", "ratio": 0.34, "stages": 1, "until": 0.3}), None)
    begin(run)
    batches = run.batches()
    for _ in range(2):
        step(run, batches)
    dense = {id(p) for p in run.model.parameters()}
    moments = {p: run.optimizer.optimizer.state[p]["exp_avg"] for p in run.model.parameters()}
    average = {name: value.clone() for name, value in run.ema.state_dict().items()}
    step(run, batches)  # at whose end two blocks go
    left = list(run.model.parameters())
    assert len(run.model.transformer_blocks) == len(run.ema.model.transformer_blocks) == 4
    assert run.model.config.num_layers == run.ema.model.config.num_layers == 4
    assert {id(p) for p in left} < dense, "the survivors are the same parameters"
    assert set(run.optimizer.optimizer.state) == set(left), "no state of removed weights is kept"
    assert all(run.optimizer.optimizer.state[p]["exp_avg"] is moments[p] for p in left), "that of the others is"
    step(run, batches)
    assert not torch.equal(run.ema.state_dict()["pos_embed.proj.weight"], average["pos_embed.proj.weight"])
    grown = run.ema.model.transformer_blocks[-1].norm1.linear.weight
    assert torch.equal(grown, run.ema.state_dict()["transformer_blocks.3.norm1.linear.weight"])


def test_the_learning_rate_rises_again_after_a_removal():
    prune = {"type": "linear", "score": "random", "stages": 1, "until": 0.3, "rewarmup": 64}
    run = trained(pruned(prune, training={"log_every": 16, "images": 160}), until=None)
    assert run.pruner.rate(run.pruner.stages[0]["images"]) == pytest.approx(1 / 64)
    assert run.pruner.rate(run.pruner.stages[0]["images"] + 63) == 1.0
    assert Run(pruned({"type": "none"}), None).pruner.rate(0) == 1.0


def test_every_score_can_rank():
    for score in [*SCORES, "random", "spread"]:
        run = Run(pruned({"type": "one_shot", "score": score}), None)
        run.advance_blocks()
        assert len(run.pruner.kept) == 3 and {0, 5} <= set(run.pruner.kept), score


def measured(run: Run, gone: list[int], score: str) -> dict[int, float]:
    """The score of every block that is left, by its number in the dense model, measured as a user would."""
    scoring = Scoring.on_images(Draws(**DRAWS), run.components, run.data, run.device)
    values = scoring.measure(run.model, gone, gradients=score == "taylor").score(score, scoring.weights(run.noise))
    return dict(zip(run.pruner.kept, values.tolist(), strict=True))


@pytest.mark.parametrize("score", ["loss_rise", "information", "bi", "ced", "mean_shift", "taylor"])
def test_what_is_removed_scores_lowest_by_an_independent_measurement(score):
    run = perturbed(Run(pruned({"type": "one_shot", "score": score, "ratio": 0.34}), None))
    values = measured(run, [], score)
    assert len({round(value, 9) for value in values.values()}) == 6, "blocks must differ for the order to mean anything"
    run.advance_blocks()
    assert run.pruner.stages[0]["remove"] == sorted(range(1, 5), key=values.get)[:2]
    assert run.pruner.stages[0]["scores"] == {str(block): value for block, value in values.items()}


@pytest.mark.parametrize("rerank", ["stage", "block", "never"])
def test_rankings_are_made_anew_as_often_as_the_recipe_says(rerank):
    prune = {"type": "linear", "score": "output_distance", "stages": 2, "until": 0.6, "ratio": 0.66, "rerank": rerank}
    run = perturbed(Run(pruned(prune), None))
    first = measured(run, [], "output_distance")
    expected = sorted(range(1, 5), key=first.get)
    if rerank == "block":
        second = measured(run, [expected[0]], "output_distance")
        assert [second[block] for block in expected[2:]] != [first[block] for block in expected[2:]]
        expected[1:] = sorted(expected[1:], key=second.get)
    run.images = 48
    run.advance_blocks()
    assert run.pruner.stages[0]["remove"] == expected[:2]
    perturbed(run)
    again = measured(run, [], "output_distance")
    run.images = 96
    run.advance_blocks()
    values = first if rerank == "never" else again
    assert run.pruner.stages[1]["remove"][0] == min(expected[2:], key=values.get)


def test_the_vote_can_wait_and_the_last_stage_meets_the_target():
    vote = {**VOTE, "cost": 0.0, "ntk": 0.0, "zico": 0.0}  # all totals tie: the least removal wins every time
    run = trained(pruned({"type": "entpruner", "score": "random", "stages": 3, "until": 0.6, "vote": vote}))
    assert [len(row["remove"]) for row in run.pruner.stages] == [0, 0, 3]
    vote |= {"cost": 1.0}  # only cost counts: the most removal wins
    run = trained(pruned({"type": "entpruner", "score": "random", "stages": 3, "until": 0.6, "vote": vote}))
    assert [len(row["remove"]) for row in run.pruner.stages] == [2, 1]
    costs = [one["cost"] for one in run.pruner.stages[0]["vote"]["candidates"]]
    assert costs == sorted(costs, reverse=True) and costs[2] < costs[0]
    timed = pruned({"type": "entpruner", "score": "random", "stages": 2, "vote": {**VOTE, "measure": "seconds"}})
    assert len(trained(timed).pruner.kept) == 3


@pytest.mark.parametrize("measure", ["flops", "seconds"])
def test_voting_and_scoring_leave_no_trace(measure):
    """Between two steps a stage that removes nothing changes nothing."""
    still = {**VOTE, "measure": measure, "cost": 0.0, "ntk": 0.0, "zico": 0.0}
    quiet = pruned({"type": "entpruner", "score": "taylor", "stages": 2, "until": 0.99, "vote": still, "rewarmup": 0})
    plain, waiting = Run(pruned({"type": "none"}), None), Run(quiet, None)
    for run in (plain, waiting):
        begin(run)
        batches = run.batches()
        for _ in range(8):  # over the first stage, not the last
            step(run, batches)
    assert len(waiting.pruner.stages) == 1
    ours, theirs = state(plain), state(waiting)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_over_several_stages_meets_the_target():
    prune = {"type": "linear", "score": "random", "stages": 4, "until": 0.8}
    run = trained(pruned(prune, training={"images": 48, "batch_size": 24, "checkpoint_every": None}))
    assert [row["stage"] for row in run.pruner.stages] == [2, 4] and len(run.pruner.kept) == 3


def test_block_0_stays_where_training_sets_its_embedder_apart():
    """A converted DiT has one embedder in all blocks: block 0 may go before training, not during it."""
    late = {"type": "linear", "score": "random", "stages": 1, "keep": []}
    runs = [Run(pruned(prune), None) for prune in ({**late, "until": 0.3}, {"type": "none"})]
    assert "training sets" in runs[0].pruner.selection.protected[0]
    shared = runs[1].model.transformer_blocks[0].norm1.emb.state_dict()
    for block in runs[1].model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    stack = BlockStack(runs[1].model)
    assert not stack.blocks[0].pinned
    with torch.no_grad():
        runs[1].model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    with pytest.raises(UserError, match="block 0 can't be removed"):
        stack.remove([0])
    assert len(runs[1].model.transformer_blocks) == 6


def test_a_cap_spreads_the_removals():
    prune = {"type": "one_shot", "score": "magnitude", "ratio": 0.34, "keep": [], "cap": [2, 1]}
    run = Run(pruned(prune), None)
    run.advance_blocks()
    groups = [block // 2 for block in run.pruner.stages[0]["remove"]]
    assert len(groups) == len(set(groups)) == 2


def test_the_teacher_is_the_dense_model_and_pulls_towards_it():
    prune = {"type": "linear", "score": "random", "stages": 1, "until": 0.3, "distill": {"weight": 100.0}}
    runs = [trained(pruned(p)) for p in (prune, {**prune, "distill": None})]
    taught, alone = runs
    teacher = taught.pruner.teacher.denoiser.model
    assert len(teacher.transformer_blocks) == 6 and not any(p.requires_grad for p in teacher.parameters())
    assert len(taught.model.transformer_blocks) == 3
    x0 = torch.randn(16, 1, 8, 8)
    arguments = (x0, torch.randn_like(x0), torch.zeros(16), torch.arange(16) % 10)
    with torch.no_grad():
        target = taught.pruner.teacher.denoiser(*arguments)[0]
        gaps = [(run.denoiser(*arguments)[0] - target).square().mean() for run in runs]
    assert gaps[0] < gaps[1]
    assert taught.pruner.distillation(target, *arguments).abs().max() == 0


def test_a_teacher_from_a_folder(tmp_path):
    dense = Run(pruned({"type": "none"}), None)
    dense.components.pipeline(dense.model).save_pretrained(tmp_path / "dense")
    distill = {"teacher": str(tmp_path / "dense")}
    run = Run(pruned({"type": "written", "remove": [2], "distill": distill}), None)
    assert len(run.pruner.teacher.denoiser.model.transformer_blocks) == 6
    assert run.pruner.state_dict()["teacher"] == {}, "a checkpoint does not hold what lies elsewhere"
    for change, scheduler, message in (
        ({"sample_size": 4}, FLOW, "sample size 8, not 4"),
        ({"num_embeds_ada_norm": 12}, FLOW, "classes 1000, not 12"),
        ({}, {"class": "DDIMScheduler"}, "prediction type flow"),
    ):
        model = {**DEEP, "config": {**DEEP["config"], **change}}
        prune = {"type": "written", "remove": [2], "distill": distill}
        with pytest.raises(UserError, match=f"prune.distill.teacher.*{message}"):
            Run(tiny_recipe(model, scheduler, prune=prune), None)


def test_what_was_removed_is_published(tmp_path):
    recipe = pruned({"type": "entpruner", "score": "ced", "ratio": 0.34, "stages": 2})
    run = trained(recipe, tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    (tmp_path / "recipe.source.yaml").write_text("description: tiny\n")
    publish(run, "tiny")
    for folder in (tmp_path, tmp_path / "pipeline"):
        record = json.loads((folder / "pruning.json").read_text())
        assert record["kept"] == run.pruner.kept and len(record["removed"]) == 2
        gone = {block["index"]: block["removed_at"] for block in record["blocks"] if block["removed_at"] is not None}
        assert set(gone) == set(record["removed"])
        assert record["stages"][0]["vote"]["winner"] in (0, 1, 2)
    assert json.loads((tmp_path / "pipeline/transformer/config.json").read_text())["num_layers"] == 4
    assert not (tmp_path / "pipeline/transformer/pruning.json").exists()


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"type": "written", "remove": [1, 0]}, "prune.remove: block 0 can't be removed: .*embedder"),
        ({"type": "written", "remove": [9]}, "prune.remove: there is no block 9"),
        ({"type": "one_shot", "ratio": 0.9}, "prune.ratio: 0.9 would remove 5 of 6 blocks, but only 4 may go"),
        ({"type": "linear", "ratio": 0.5, "cap": [6, 2]}, "only 2 may go .*at most 2 of 6"),
        ({"type": "linear", "keep": [7]}, "prune.keep: there is no block 7"),
        ({"type": "one_shot", "scores": "nowhere.json"}, "nowhere.json: there is no such file"),
    ],
)
def test_what_can_not_be_done_is_said_before_training(prune, message):
    with pytest.raises(UserError, match=message):
        Run(pruned(prune), None)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="UNet2DModel.* block"):
        Run(Recipe.model_validate(tiny(UNET, prune={"type": "linear"})), None)


def test_scores_of_another_model_or_data_set_are_refused(tmp_path):
    recipe = pruned({"type": "one_shot"})
    run = Run(recipe, None)
    scoring = Scoring.on_images(recipe.prune.draws, run.components, run.data, run.device)
    scores = scoring.measure(run.model, gradients=False)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores.to_json()))
    given = {"type": "one_shot", "scores": str(path)}
    fits = perturbed(Run(pruned(given), None))  # after the file was checked, so that a measurement would differ
    fits.advance_blocks()
    said = scores.score("loss_rise", scoring.weights(run.noise)).tolist()
    assert fits.pruner.stages[0]["scores"] == {str(block): value for block, value in enumerate(said)}
    with pytest.raises(UserError, match="another model"):
        Run(pruned(given, training={"seed": 5}), None)
    with pytest.raises(UserError, match="another data set"):
        Run(pruned(given, data={"type": "digits", "max_images": 100}), None)
    more = Run(pruned({**given, "draws": {"images": 6, "noise_levels": 6, "seed": 1}}), None)
    more.advance_blocks()
    assert more.pruner.kept == fits.pruner.kept, "of the same data set, however it is drawn from"
    for change, message in (
        ({"draws": {**DRAWS, "gate_pivot": 3.0}, "score": "information"}, "gate's pivot at 0.2, not 3.0"),
        ({"score": "taylor"}, "without taylor of every block"),
    ):
        with pytest.raises(UserError, match=message):
            Run(pruned(given | change), None)
    values = scores.to_json()
    values["origin"]["gone"] = [2]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="without loss_rise of every block"):
        Run(pruned(given), None)


def test_a_pruned_model_saves_loads_and_prunes_again(tmp_path):
    run = trained(pruned({"type": "written", "remove": [1, 3]}))
    run.components.pipeline((run.ema or run).model).save_pretrained(tmp_path / "pruned")
    section = {"pretrained": str(tmp_path / "pruned")}
    again = tiny(prune={"type": "one_shot", "ratio": 0.25, "draws": DRAWS})
    again["pipeline"] = section
    second = Run(Recipe.model_validate(again), None)
    second.advance_blocks()
    assert len(BlockStack(second.model)) == 3
