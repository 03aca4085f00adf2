"""What a run tells of its trained weights is what its rows say: stages, candidates, costs, phases, adapters, clips."""

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

from entrecipes.recipe.blocks import EntProgSection
from entrecipes.report.block_schedule_plots import (
    CLOSED,
    OPEN,
    TURNS,
    draw_block_schedule_plots,
    plot_costs,
    plot_efficiency,
    plot_schedule,
    plot_turns,
)
from entrecipes.report.blocks import BlockRun, ranges
from entrecipes.report.card import write_card
from entrecipes.report.plots import save_grid, save_moving
from entrecipes.report.report import write_report
from entrecipes.report.run_folder import RunFolder
from entrecipes.training.loop import train
from entrecipes.training.publish import publish
from entrecipes.training.run import Run

MIB = 2**20
BATCH = 50


def stage(number: int, opened: list[int], cost: float, **facts: Any) -> dict[str, Any]:
    """A row of a model of four equal blocks, 12 block passes a step in full."""
    m, what = len(opened), f"stage {number + 1} of 2: said <so>"
    row = {"kind": "event", "what": what, "stage": number, "open": opened, "m": m, "blocks": 4, "floor": min(opened)}
    return row | {"predicted_cost": cost, "predicted_speed_up": 12 / cost} | facts


def costs(images: int, trained: int, saved: float, gradient: float = 1, optimizer: float = 2) -> dict[str, Any]:
    sizes = {"saved_bytes": saved * MIB, "gradient_bytes": gradient * MIB, "optimizer_bytes": optimizer * MIB}
    return {"kind": "costs", "images": images, "trained_parameters": trained, **sizes}


def logged(images: int, seconds: float) -> dict[str, Any]:
    return {"kind": "train", "images": images, "loss": 0.5, "images_per_second": 25.0, "seconds": seconds}


# Candidates 1 and 2 take turns 1, 2, 2, 1 (4 steps in all) from 2 s of scoring and 1 s of measuring on; the first earns
# 0.3 and 0.05 in 1 s, the other 0.1 and 0.15 in 3 s. All four blocks follow at 500 images.
RANKING = {"order": [3, 1, 0, 2], "score": "cei", "scores": [0.25, 0.5, -0.125, 1.5], "scoring_seconds": 2.0}
TRIED = [
    {"m": 1, "predicted": 5.0, "drop": 0.35, "steps": 2, "seconds": 1.0, "losses": [0.7, 0.4], "ce": 0.035},
    {"m": 2, "predicted": 9.0, "drop": 0.25, "steps": 2, "seconds": 3.0, "losses": [0.6, 0.45], "ce": 0.0139},
]
ROWS = [
    {"kind": "start", "images": 0, "world_size": 1},
    stage(0, [1, 3], 9.0, images=0, seconds=3.0, compares=[1, 2], loss=1.0, measuring_seconds=1.0, **RANKING),
    costs(50, 100, 2),
    costs(100, 200, 6),
    stage(0, [3], 5.0, images=200, seconds=9.0, candidates=TRIED, clock="predicted", loss=1.0, measuring_seconds=1.5),
    costs(250, 100, 2),
    logged(400, 11.0),
    stage(1, [0, 1, 2, 3], 12.0, images=500, seconds=12.0),
    costs(550, 400, 10, 4, 8),
    logged(1000, 32.0),
]
SECTION = EntProgSection(stages=2).model_dump()


def write(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> BlockRun:
    """Make the run one with these rows alone."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"training": {"batch_size": BATCH}} | sections))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(folder, RUN | {"parameters": 400, "trainable_parameters": 400, "metrics": []})
    return BlockRun(RunFolder(folder))


@pytest.fixture
def opened(run_folder: Path) -> BlockRun:
    return write(run_folder, ROWS, blocks=SECTION)


def test_each_span_has_its_blocks_its_own_seconds_and_its_heaviest_step(opened: BlockRun) -> None:
    stages, candidates = opened.tables()
    assert stages.rows == [
        # 4 s in 4 steps of candidates, 9 s with scoring and measuring; (5 + 9) / 2 of 12 passes
        ["1", "0 to 200", "1 or 2 of 4, in turns", "", "58%", "1", "6", "1", "2", "9"],
        ["1", "200 to 500", "1 of 4: 3", "3", "42%", "0.5", "2", "1", "2", "3"],
        ["2", "500 to 1,000", "4 of 4: 0-3", "0", "100%", "2", "10", "4", "8", "20"],
    ]
    assert candidates.rows == [
        ["1", "1", "2", "2", "0.35", "0.5", "0.035", "0.35", "chosen"],
        ["1", "2", "2", "2", "0.25", "1.5", "0.0139", "0.0833", ""],
    ]
    told = dict(opened.rows())
    assert told["Order"].startswith("the highest cei first: 3 (1.5), 1 (0.5), 0 (0.25), 2 (-0.125). ")
    assert told["Time in training steps"].startswith("32.0 s; 6% scoring; 28% comparing")
    assert "; 5% measuring" in told["Time in training steps"]
    assert told["The heaviest step held"].startswith("22 MiB besides the weights: 10 MiB of saved activations, 4 MiB")
    assert "predicted step cost" in told["Growth"] and "through all blocks" in told["Weights that blocks depend on"]
    assert opened.full.start == 500


def test_measurements_at_the_start_of_a_stage_are_no_steps_of_the_one_before(run_folder: Path) -> None:
    rerank = {"scoring_seconds": 4.0, "compares": [2, 4], "loss": 0.4, "measuring_seconds": 2.0}
    later = stage(1, [0, 1, 2, 3], 12.0, images=500, seconds=18.0, **rerank)
    run = write(run_folder, [*ROWS[:7], later], blocks=SECTION)
    assert [span.step_seconds for span in run.spans] == [1.0, 0.5]
    rows = [*ROWS[:7], later, logged(700, 28.0)]  # and while candidates take their turns
    run = write(run_folder, rows, blocks=SECTION)
    assert run.spans[-1].step_seconds is None and run.spans[-1].seconds == 16.0
    assert run.tables()[0].rows[-1][2] == "2 or 4 of 4, in turns" and len(run.tables()[1].rows) == 2
    (run_folder / "run.json").unlink()
    page = write_report(run_folder).read_text()
    assert 'id="blocks"' in page and (run_folder / "assets" / "block_schedule.png").is_file()


def test_pictures_draw_what_was_open_what_it_earned_and_what_it_cost(opened: BlockRun) -> None:
    blocks, loss = Figure().subplots(2, sharex=True)
    plot_schedule(blocks, loss, opened)
    bars = {
        (int(bar.get_y() + 0.5), bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in blocks.patches
    }
    assert bars == {(block, 0, 1000, CLOSED) for block in range(4)} | {
        (3, 0, 200, OPEN),
        (1, 0, 200, TURNS),
        (3, 200, 300, OPEN),
        *((block, 500, 500, OPEN) for block in range(4)),
    }
    drawn = {(x, y) for line in loss.lines if line.get_marker() == "o" for x, y in zip(*line.get_data(), strict=True)}
    assert drawn == {(0, 1.0), (50, 0.7), (100, 0.6), (150, 0.45), (200, 0.4)}

    axes = Figure().subplots()
    plot_efficiency(axes, opened, opened.compared)
    curve, chosen = axes.lines[:2]
    assert curve.get_data()[1] == pytest.approx([1, 0.25 / 18 / 0.035]) and chosen.get_data()[0] == [1]

    axes = Figure().subplots()
    plot_turns(axes, opened, opened.compared)
    turns = [line for line in axes.lines if line.get_marker() != "o"]
    assert [line.get_ydata()[1] for line in turns] == [0.7, 0.6, 0.45, 0.4]
    colours = [line.get_color() for line in turns]
    assert all(colours[0] == colours[3]) and all(colours[1] == colours[2]) and any(colours[0] != colours[1])

    memory, seconds = Figure().subplots(2, sharex=True)
    plot_costs(memory, seconds, opened)
    saved = memory.collections[0].get_paths()[0].vertices
    assert {(0, 6), (200, 6), (200, 2), (500, 2), (500, 10), (1000, 10)} <= {tuple(point) for point in saved}
    lines = {line.get_label(): line for line in memory.lines + seconds.lines}
    assert lines["all weights"].get_ydata()[0] == 22
    assert lines["mean of the steps"].get_ydata().tolist() == [1, 1, 0.5, 0.5, 2, 2]
    predicted = lines["predicted, scaled to fit"].get_ydata()
    assert predicted / predicted[-1] == pytest.approx(np.repeat([7 / 12, 5 / 12, 1], 2))


def test_snapshots_all_start_from_the_same_loss(run_folder: Path) -> None:
    run = write(run_folder, ROWS, blocks=SECTION | {"mode": "snapshot"})
    axes = Figure().subplots()
    plot_turns(axes, run, run.compared)
    assert {line.get_ydata()[0] for line in axes.lines if line.get_marker() != "o"} == {1.0}


def test_card_and_report_tell_a_schedule(run_folder: Path, opened: BlockRun) -> None:
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    assert "\n## Blocks\n" in card and "| 1 | 200 to 500 | 1 of 4: 3 | 3 | 42% | 0.5 | 2 | 1 | 2 | 3 |" in card
    assert 'href="#blocks">Blocks</a>' in report and "<td>1 or 2 of 4, in turns</td>" in report
    assert "said <so>" not in report and "heaviest step held" in report
    for name in ("block_schedule", "block_efficiency", "block_turns", "step_costs"):
        assert f"](assets/{name}.png)" in card
        with Image.open(run_folder / "pipeline" / "assets" / f"{name}.png") as image:
            assert image.width == 960 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_a_run_that_trained_everything_tells_what_a_step_held_and_no_more(run_folder: Path) -> None:
    write_card(run_folder), write_report(run_folder)
    for name in ("README.md", "report.html"):
        assert "heaviest step" not in (run_folder / name).read_text(), "nothing was measured"
    run = write(run_folder, [ROWS[0], costs(50, 400, 10), logged(1000, 32.0)], blocks={"type": "all"})
    assert run.title is None and not draw_block_schedule_plots(run.folder)
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    assert "| The heaviest step held | 13 MiB besides" in card and card.count("heaviest step") == 1
    assert report.count("heaviest step") == 1 and 'id="blocks"' not in report


def test_written_stages_phases_and_adapters_are_told(run_folder: Path) -> None:
    phases = [
        {"kind": "event", "images": at, "seconds": at / 50, "what": f"phase {i + 1} of 2: {said}", "phase": i}
        for i, (at, said) in enumerate([(0, "1 frame(s) of each clip"), (500, "whole clips")])
    ]
    measured = [costs(50, 400, 3), phases[1], costs(550, 400, 9), logged(1000, 40.0)]
    run = write(run_folder, [phases[0], *measured])
    assert run.title == "Phases" and list(draw_block_schedule_plots(run.folder)) == ["step_costs"]
    assert dict(run.rows())["Phases"] == "from 0: 1 frame(s) of each clip; from 500: whole clips"
    assert [row[:4] for row in run.tables()[0].rows] == [
        ["0 to 500", "1 frame(s) of each clip", "1", "3"],
        ["500 to 1,000", "whole clips", "3", "9"],
    ]

    what = {"kind": "event", "images": 0, "seconds": 0.0, "what": "stage 1 of 1: training up.*", "stage": 0}
    staged = {"type": "staged", "stages": [{"from_images": 0, "train": ["up.*"]}]}
    run = write(run_folder, [phases[0], what, *measured], blocks=staged)
    assert run.title == "Blocks" and run.tables()[0].rows[1][1] == "whole clips; training up.*"

    adapter = {"type": "all", "adapter": {"type": "lora", "rank": 4, "alpha": None, "merge": False}}
    (run_folder / "adapter").mkdir()
    (run_folder / "adapter" / "weights.safetensors").write_bytes(bytes(MIB))
    write(run_folder, [costs(50, 40, 3), logged(1000, 40.0)], blocks=adapter)
    write_run(run_folder, RUN | {"parameters": 400, "trainable_parameters": 40})
    run = BlockRun(RunFolder(run_folder))
    told = dict(run.rows())["Adapter"]
    assert run.title == "Adapter" and not run.tables()
    assert told.startswith("lora (rank 4, merge False); trains 40 of 400 weights (10.0%); ")
    assert told.endswith("adapter/weights.safetensors has 1 MiB")


def test_a_share_of_the_blocks_from_the_start_is_told(run_folder: Path) -> None:
    """The resolved recipe leaves out the keys of comparisons, which never happen."""
    keys = {"type": "entprog", "order": "cost_aware", "score": "information", "growth": "none", "inputs": "never"}
    row = {"what": "stage 1 of 1: trains 2 of 4 blocks", "stage": 0, "open": [2, 3], "m": 2, "blocks": 4, "floor": 2}
    row |= {"predicted_cost": 8.0, "predicted_speed_up": 1.5, "predicted_activations": 0.5, "order": [3, 2, 1, 0]}
    row |= {"score": "information", "scores": [1.0, 2.0, 3.0, 4.0], "scoring_seconds": 0.1}
    begun = {"kind": "event", "images": 0, "seconds": 0.0, **row}
    run = write(run_folder, [begun, costs(50, 40, 3), logged(1000, 40.0)], blocks=keys)
    assert dict(run.rows())["Growth"].startswith("none: ")


def test_clips_move_in_card_and_report(run_folder: Path) -> None:
    assert "Film strips" not in write_card(run_folder).read_text() + write_report(run_folder).read_text()
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"type": "digits"', '"type": "clips"'))
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 32), dtype=np.uint8)
    save_grid(frames, run_folder / "samples" / "final.png", columns=1)
    save_moving(frames, run_folder / "samples" / "final.gif")
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    for text in ("Film strips: the pose maps", "A clip a row: reference image, pose map"):
        assert card.count(text) == 1 and report.count(text) == 1
    assert 'src="data:image/gif;base64,' in report and "](assets/samples.gif)" in card
    with Image.open(run_folder / "pipeline" / "assets" / "samples.gif") as image:
        assert image.n_frames == 3


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 4, 5]) == "0-2, 4, 5, 7" and ranges([]) == ""


def test_a_real_run_accounts_for_all_its_images_and_seconds(tmp_path: Path) -> None:
    draws = {"images": 8, "noise_levels": 4}
    section = {"type": "entprog", "mode": "snapshot", "inputs": "never", "order": "cost_aware", "supernet": 0.5}
    section |= {"stages": 2, "final": "search", "draws": draws, "holdout": draws, "rerank": True}
    deep = {**DIT, "config": {**DIT["config"], "num_layers": 4}}
    recipe = tiny_recipe(deep, FLOW, blocks=section, evaluation={"every": None}, training={"images": 192})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    (tmp_path / "recipe.source.yaml").write_text("description: tiny\n")
    run = Run(recipe, tmp_path)
    train(run)
    publish(run, "tiny")
    AcceleratorState._reset_state(reset_partial_state=True)

    told = BlockRun(RunFolder(tmp_path))
    assert told.spans[0].start == 0 and told.spans[-1].end == 192
    assert all(one.end == two.start for one, two in zip(told.spans, told.spans[1:], strict=False))
    last = told.folder.metrics("train", "event")[-1]["seconds"]
    assert sum(span.seconds for span in told.spans) == pytest.approx(last)
    assert [bool(span.compared) for span in told.spans] == [True, False] * (len(told.spans) // 2)
    assert all(span.costs and 0 < span.step_seconds * span.steps < span.seconds * 1.001 for span in told.spans)
    found = [len(turns.turns) == len(turns.candidates) > 1 for turns in told.compared]
    assert found and all(found), "a snapshot has one turn a candidate"
    assert "## Blocks" in (tmp_path / "pipeline" / "README.md").read_text()
