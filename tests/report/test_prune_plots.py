"""A pruned run in its card, its report and its map: what is told is what the rows say; without rows nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from report_case import RUN, write_run
from tiny import DIT, FLOW, tiny_recipe

from entrecipes.report.card import write_card
from entrecipes.report.plots import BLUE, FAINT, ORANGE
from entrecipes.report.prune_plots import draw_prune_plots, plot_pruning
from entrecipes.report.pruning import PrunedRun, pruned
from entrecipes.report.report import write_report
from entrecipes.report.run_folder import RunFolder
from entrecipes.training.loop import train
from entrecipes.training.publish import publish
from entrecipes.training.resume import resume
from entrecipes.training.run import Run

VOTE = {
    "remove": [[], [2], [2, 4]],
    "candidates": [
        {"cost": 3.0e8, "kappa": 60.5, "zico": 0.4},
        {"cost": 2.5e8, "kappa": None, "zico": 0.5},
        {"cost": 2.0e8, "kappa": 31.25, "zico": 0.75},
    ],
    "ranks": [[3, 2, 3], [2, 3, 2], [1, 1, 1]],
    "totals": [5.5, 4.5, 2.0],
    "winner": 2,
}
SCORES = [{"0": 0.9, "1": 0.5, "2": 0.01, "3": 0.2, "4": 0.02, "5": -0.3}, {"0": 0.8, "1": -0.1, "3": 0.1, "5": 0.2}]
ROWS: list[dict[str, Any]] = [
    {"images": 4000, "stage": 1, "remove": [2, 4], "left": 4, "vote": VOTE, "seconds": 6.25},
    {"images": 8000, "stage": 2, "remove": [], "left": 4, "seconds": 2.0},
    {"images": 12000, "stage": 3, "remove": [1], "left": 3, "seconds": 1.5},
]
for row, scores in zip(ROWS, (SCORES[0], SCORES[1], SCORES[1]), strict=True):
    row |= {"score": "loss_rise", "scores": scores, "what": "removed <it>"}
WEIGHTS = {"cost": 1.0, "ntk": 0.5, "zico": 0.25, "measure": "flops"}
SECTION = {"type": "entpruner", "score": "loss_rise", "keep": [0, -1], "distill": None, "vote": WEIGHTS}
WRITTEN = {"images": 0, "stage": 1, "remove": [2, 3], "left": 4, "what": "removed blocks 2, 3; 4 of 6 are left"}


def prune(folder: Path, rows: list[dict[str, Any]], section: dict[str, Any]) -> PrunedRun:
    """Make the run one that pruned."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"prune": section}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"kind": "prune", **row}) + "\n" for row in rows))
    facts = {"blocks": {"before": 6, "after": 3}, "parameters": 1_000_000, "parameters_before": 2_000_000}
    write_run(folder, RUN | facts)
    return pruned(RunFolder(folder))


@pytest.fixture
def staged(run_folder: Path) -> PrunedRun:
    pinned = [{"index": index, "pinned": "the head reads <it>" if index == 0 else ""} for index in range(6)]
    (run_folder / "pruning.json").write_text(json.dumps({"blocks": pinned}))
    return prune(run_folder, ROWS, SECTION)


def test_rows_tell_what_went_and_what_is_left(staged: PrunedRun) -> None:
    told = dict(staged.rows())
    assert told["Blocks removed, in order"] == "3 of 6: 2, 4, 1"
    assert told["Blocks kept, by their numbers in the dense model"].startswith("0, 3, 5; ")
    assert told["Could not go"] == "0: the head reads <it>; 5: named in prune.keep"
    assert told["Parameters"] == "2,000,000 to 1,000,000 (-50.0%)"
    assert told["Scoring and voting"].startswith("9.75 s")
    assert "ZiCo (weight 0.25)" in told["Votes"] and "entpruner" in told["How"] and "arXiv" in told["How"]


def test_tables_give_each_block_its_score_and_rank_and_each_vote_its_winner(staged: PrunedRun) -> None:
    removals, votes = staged.tables()
    assert removals.rows == [
        ["1", "4,000", "2", "0.01", "2 of 6"],
        ["1", "4,000", "4", "0.02", "3 of 6"],
        ["2", "8,000", "none", "", ""],
        ["3", "12,000", "1", "-0.1", "1 of 4"],
    ]
    assert [row[1:] for row in votes.rows] == [
        ["none", "300 MFLOP (3)", "60.5 (2)", "0.4 (3)", "5.5", ""],
        ["2", "250 MFLOP (2)", "not finite (3)", "0.5 (2)", "4.5", ""],
        ["2, 4", "200 MFLOP (1)", "31.25 (1)", "0.75 (1)", "2", "won"],
    ]
    staged.section["vote"] = WEIGHTS | {"measure": "seconds"}
    staged.stages[0]["vote"]["candidates"][0] = {"cost": 0.125, "kappa": 1.0, "zico": 1.0}
    assert staged.tables()[1].rows[0][2] == "0.125 s (3)"


def test_the_map_draws_each_life_and_each_score(staged: PrunedRun) -> None:
    lives, scores = Figure().subplots(1, 2, sharey=True)
    plot_pruning(lives, scores, staged)
    bars = [(bar.get_width(), to_hex(bar.get_facecolor())) for bar in lives.patches]
    assert bars == [(40_000, FAINT), (12_000, ORANGE), (4000, ORANGE), (40_000, BLUE), (4000, ORANGE), (40_000, FAINT)]
    drawn = scores.collections[0].get_array().reshape(6, 3)
    assert drawn[:, 0].tolist() == pytest.approx([0.9, 0.5, 0.01, 0.2, 0.02, -0.3])
    assert np.ma.getmaskarray(drawn)[2].tolist() == [False, True, True], "gone after the first stage"
    stages = [line.get_xdata()[0] for line in lives.lines if line.get_linestyle() == "--"]
    assert stages == [4000, 8000, 12_000]
    crosses = [set(zip(*line.get_data(), strict=True)) for axes in (lives, scores) for line in axes.lines[:1]]
    assert crosses == [{(4000, 2), (4000, 4), (12_000, 1)}, {(0, 2), (0, 4), (2, 1)}]


def test_card_and_report_tell_a_pruning(run_folder: Path) -> None:
    write_card(run_folder), write_report(run_folder)
    assert not draw_prune_plots(RunFolder(run_folder))
    for name in ("README.md", "report.html"):
        assert "runing" not in (run_folder / name).read_text(), "there was none"

    prune(run_folder, ROWS, SECTION)
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    assert "\n## Pruning\n\n![" in card and "](assets/block_map.png)" in card
    assert "| Blocks removed, in order | 3 of 6: 2, 4, 1 |" in card and "| 1 | 4,000 | 2 | 0.01 | 2 of 6 |" in card
    assert "| 1 | 2, 4 | 200 MFLOP (1) | 31.25 (1) | 0.75 (1) | 2 | won |" in card
    assert 'id="pruning"' in report and 'href="#pruning"' in report and "<td>200 MFLOP (1)</td>" in report
    for folder in (run_folder, run_folder / "pipeline"):
        with Image.open(folder / "assets" / "block_map.png") as image:
            assert image.width == 960 and len(np.unique(np.asarray(image.convert("L")))) > 20

    (run_folder / "run.json").unlink()  # while the run goes on
    assert "2,000,000" not in write_report(run_folder).read_text()


def test_blocks_that_the_recipe_names_have_no_scores(run_folder: Path) -> None:
    run = prune(run_folder, [WRITTEN], {"type": "written", "remove": [2, 3], "distill": {"teacher": None, "weight": 2}})
    assert [row[2] for row in run.tables()[0].rows] == ["2", "3"] and len(run.tables()) == 1
    told = dict(run.rows())
    assert told["Learned from the dense model"] == "as it was before the first removal, weight 2"
    assert not {"Scoring and voting", "Ranked by", "Could not go", "Votes"} & set(told)
    with Image.open(draw_prune_plots(RunFolder(run_folder))["block_map"]) as image:
        assert image.width == 960


def test_a_real_run_that_was_resumed_knows_its_dense_model(tmp_path: Path) -> None:
    section = {
        "type": "entpruner",
        "score": "ced",
        "stages": 2,
        "until": 0.6,
        "draws": {"images": 8, "noise_levels": 4},
    }
    section["vote"] = {"samples": 3, "batches": 2, "batch_size": 4}
    deep = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
    recipe = tiny_recipe(deep, FLOW, prune=section, evaluation={"every": None})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    (tmp_path / "recipe.source.yaml").write_text("description: tiny\n")
    first = Run(recipe, tmp_path)
    parameters = sum(p.numel() for p in first.model.parameters())
    first.log.listener = lambda row: setattr(first, "stop_requested", row["images"] >= 96)
    train(first)
    assert len(first.model.transformer_blocks) == 2, "the run below starts from a checkpoint that is pruned"
    rest = Run(recipe, tmp_path)
    resume(rest)
    train(rest)
    publish(rest, "tiny")
    AcceleratorState._reset_state(reset_partial_state=True)

    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["blocks"] == {"before": 4, "after": 2} and facts["parameters_before"] == parameters
    told = dict(pruned(RunFolder(tmp_path)).rows())
    assert told["Parameters"].startswith(f"{parameters:,} to {facts['parameters']:,} (-")
    assert "embedder" in told["Could not go"] and "3: named in prune.keep" in told["Could not go"]
    assert "### The votes" in (tmp_path / "pipeline" / "README.md").read_text()
