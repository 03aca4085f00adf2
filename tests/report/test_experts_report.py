"""A run with experts in its card, its report and its pictures: what is told is what plan, memory and rows say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from experts_case import BASE_EXCESS, BORDERS, EXPERT_EXCESS, KEPT, RATIOS, make_experts, plan, trials
from matplotlib.figure import Figure
from PIL import Image
from report_case import gaussian_row

from entrecipes import ExpertsPipeline, SlimUNet2DModel, TimestepExperts
from entrecipes.errors import UserError
from entrecipes.models.slim import to_stock
from entrecipes.report.card import write_card
from entrecipes.report.experts import experts
from entrecipes.report.experts_loading import ways_to_load
from entrecipes.report.experts_plots import (
    SEARCHES,
    draw_expert_plots,
    plot_costs,
    plot_groups,
    plot_plans,
    plot_search,
    short_path,
)
from entrecipes.report.report import write_report
from entrecipes.report.run_folder import RunFolder

PICTURES = {"expert_groups", "expert_plans", "expert_search", "expert_costs"}


@pytest.fixture
def trained(run_folder: Path) -> Path:
    return make_experts(run_folder)


def test_rows_tell_budgets_search_and_costs(trained: Path) -> None:
    told = dict(experts(RunFolder(trained)).rows())
    assert "arXiv 2312.13307" in told["How"] and told["Groups"].startswith("3 of equal information")
    assert told["Budgets"].startswith("50.0%, 75.0%, 100.0% of the base's 1 GFLOP")
    assert told["Search"].startswith("evolution: ") and "3 rounds of 2 plans" in told["Search"]
    assert told["Measured"] == "18 plans (15 by evolution, 3 by uniform) in 27.0 s"
    assert told["Training FLOPs"].startswith(
        "96 GFLOP, 96.0% of the budget of 100 GFLOP: base 60 GFLOP, search 6 GFLOP"
    )
    assert told["Training FLOPs"].endswith("counted as 3 forward passes")
    assert (
        told["Sampling FLOPs"].startswith("775 MFLOP a call")
        and "77.5% of the base's 1 GFLOP" in told["Sampling FLOPs"]
    )
    steps = "DDIMScheduler, 20 steps: 20 calls, 4 by expert 0, 9 by expert 1, 7 by expert 2"
    assert told["Where samples come from"] == steps, "timesteps 950 to 800, 750 to 350 and 300 to 0"


def test_tables_give_each_group_its_network_and_what_became_of_it(trained: Path) -> None:
    groups, found, costs = experts(RunFolder(trained)).tables()
    assert groups.rows[0] == [
        "0", "1.00 to 4.00", "from 800", "25.0%", "50.0%", "495 MFLOP (49.5%)", "500,000", "10,000",
    ]  # fmt: skip
    assert [row[2] for row in groups.rows] == ["from 800", "from 312.5, below 800", "below 312.5"]
    assert found.rows[1][:6] == ["1", "6", "0.4", "0.5", "0.45", "-10.0%"]
    change = (1 + EXPERT_EXCESS) / (1 + BASE_EXCESS) - 1
    assert all(row[8].endswith(f"({change:+.1%})") for row in found.rows)
    for column, excess in ((6, BASE_EXCESS), (7, EXPERT_EXCESS)):
        whole = gaussian_row(0, excess)["nats"]
        assert sum(float(row[column]) for row in found.rows) == pytest.approx(whole, rel=1e-3)
    assert [row[2] for row in costs.rows] == ["60.0%", "6.0%", "30.0%", "96.0%", "100.0%"]


def test_while_it_goes_on_an_expert_is_told_by_its_own_run(run_folder: Path) -> None:
    make_experts(run_folder, finished=False)
    run = experts(RunFolder(run_folder))
    assert run.nats(0)[0] > 0 and run.nats(0)[1] is None
    row = gaussian_row(5000, EXPERT_EXCESS)
    levels = np.linspace(BORDERS[2], BORDERS[1], 32)  # a member is measured inside its group only
    cut = {key: np.interp(levels, row["log_sigma"], row[key]).tolist() for key in ("rate", "gate")}
    row |= {"log_sigma": levels.tolist(), **cut}
    (run_folder / "experts" / "1").mkdir(parents=True)
    (run_folder / "experts" / "1" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run = experts(RunFolder(run_folder))
    assert run.nats(1)[1] / run.nats(1)[0] == pytest.approx((1 + EXPERT_EXCESS) / (1 + BASE_EXCESS), rel=0.03)
    assert run.nats(2)[1] is None and "Where samples come from" not in dict(run.rows())
    assert 'id="experts"' in write_report(run_folder).read_text()


def test_a_base_from_another_folder_is_read_there(trained: Path) -> None:
    before = experts(RunFolder(trained)).nats(0)
    elsewhere = trained.parent / "base-of-another"
    (trained / "base").rename(elsewhere)
    assert experts(RunFolder(trained)).nats(0)[0] is None
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    recipe["experts"]["base"] = str(elsewhere)
    (trained / "recipe.yaml").write_text(json.dumps(recipe))
    assert experts(RunFolder(trained)).nats(0) == before


def test_pictures_draw_the_groups_the_plans_and_the_search(trained: Path) -> None:
    run = experts(RunFolder(trained))
    above, below = Figure().subplots(2, 1, sharex=True)
    plot_groups(above, below, run)
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0.99 * ratio for ratio in RATIOS])
    ends = [(bar.get_x() + bar.get_width(), bar.get_x()) for bar in below.patches]
    assert ends == [pytest.approx(pair) for pair in zip(BORDERS, BORDERS[1:], strict=False)]
    lines = above.lines[:1] + [line for line in above.lines[1:] if len(line.get_xdata()) > 2]
    base, *members = lines
    assert base.get_ydata().max() > max(line.get_ydata().max() for line in members) and len(members) == 3

    axes = Figure().subplots()
    plot_plans(axes, run)
    atoms = np.array([8, 4, 8])
    assert axes.collections[0].get_array().reshape(3, 3).T.tolist() == (np.array(KEPT) / atoms).tolist()
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "down 0 resnet 0",
        "mid attention 0",
        "up 1 resnet 0",
    ]

    every = Figure().subplots(3, 1)
    plot_search(*every, run)
    rewards = [trial["reward"] for trial in trials() if trial["group"] == 1]
    assert every[1].lines[0].get_ydata().tolist() == pytest.approx(np.maximum.accumulate(rewards).tolist())

    axes = Figure().subplots()
    plot_costs(axes, run)
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[:3] == pytest.approx([0.6, 0.06, 0.3])
    weights = np.array([4, 9, 7]) * RATIOS
    assert widths[3:] == pytest.approx(0.775 * weights / weights.sum())
    assert short_path({"path": "transformer_blocks.11", "kind": "blocks"}) == "block 11: all"


def test_a_hundred_groups_and_units_are_still_drawn(trained: Path) -> None:
    group = plan()["groups"][2] | {"kept": [8] * 100}
    borders = np.linspace(4, -5, 101)
    many = [
        group | {"number": index, "log_sigma": [low, high]}
        for index, (high, low) in enumerate(zip(borders, borders[1:], strict=False))
    ]
    units = [{"path": f"down_blocks.{index}.resnets.0", "kind": "widths", "atoms": 8} for index in range(100)]
    big = plan() | {"groups": many, "units": units, "boundaries": list(range(99, 0, -1))}
    (trained / "search" / "plan.json").write_text(json.dumps(big))
    rows = [trials()[0] | {"group": index} for index in range(100)]
    (trained / "search" / "memory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (trained / "run.json").unlink()
    for path in draw_expert_plots(RunFolder(trained)).values():
        with Image.open(path) as image:
            assert image.width == 960 and image.height < 250 * (SEARCHES + 2)


def test_card_and_report_tell_the_experts(run_folder: Path) -> None:
    write_card(run_folder), write_report(run_folder)
    assert not draw_expert_plots(RunFolder(run_folder)) and experts(RunFolder(run_folder)) is None
    for name in ("README.md", "report.html"):
        assert "Experts" not in (run_folder / name).read_text(), "there were none"

    make_experts(run_folder)
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    assert "\n## Experts\n" in card and all(f"](assets/{name}.png)" in card for name in PICTURES)
    assert "| 0 | 1.00 to 4.00 | from 800 | 25.0% | 50.0% | 495 MFLOP (49.5%) | 500,000 | 10,000 |" in card
    assert "| in all | 96 GFLOP | 96.0% |" in card and "None" not in card.split("## Experts")[1].split("\n## ")[0]
    assert "from entrecipes import ExpertsPipeline" in card and "pipeline_tag: unconditional-image-generation" in card
    assert 'id="experts"' in report and 'href="#experts"' in report and "<td>495 MFLOP (49.5%)</td>" in report
    for folder in (run_folder, run_folder / "pipeline"):
        for name in PICTURES:
            with Image.open(folder / "assets" / f"{name}.png") as image:
                assert image.width == 960 and len(np.unique(np.asarray(image.convert("L")))) > 20


def save_experts(folder: Path) -> None:
    """A pipeline of two experts, one of them narrower, and both as stock models."""
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=10,
    )  # fmt: skip
    narrow = SlimUNet2DModel(**net.config, widths={"down_blocks.0.resnets.0": 4})
    ExpertsPipeline(TimestepExperts([narrow, net], [500.0]), DDIMScheduler()).save_pretrained(folder / "pipeline")
    for number, expert in enumerate((to_stock(narrow), net)):
        expert.save_pretrained(folder / "stock" / f"expert_{number}")


def test_every_snippet_of_the_card_runs(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_experts(run_folder)
    save_experts(run_folder)
    monkeypatch.chdir(run_folder.parents[1])
    routed, bare, alone, stock = re.findall("```python\n(.*?)```", write_card(run_folder).read_text(), re.DOTALL)
    exec(routed.replace("num_inference_steps=20", "num_inference_steps=2"), {})
    with Image.open("samples.png") as image:
        assert image.size == (640, 64) and np.asarray(image).std() > 0
    classes = []
    for code in (alone, stock):
        exec(code, names := {})
        classes.append(type(names["expert"]).__name__)
    assert classes == ["SlimUNet2DModel", "UNet2DModel"]

    bare += "image = pipeline([3], num_inference_steps=2).images[0]\nimage.save('bare.png')\n"
    code = f"import sys\nsys.modules['entrecipes'] = None\n{bare}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and Path("bare.png").is_file(), done.stderr

    ways = dict(ways_to_load(run_folder / "pipeline", run_folder / "none", "someone/experts", "none"))
    assert len(ways) == 2, "there is no folder of stock models"
    assert 'subfolder="denoiser/expert_0"' in ways["One expert alone:"]
    assert all('"someone/experts"' in code for code in ways.values())


def test_a_torn_memory_is_read_and_a_damaged_file_is_named(trained: Path) -> None:
    memory, path = trained / "search" / "memory.jsonl", trained / "search" / "plan.json"
    memory.write_text(memory.read_text() + '{"group": 2, "rou')
    assert len(experts(RunFolder(trained)).trials) == 18
    memory.write_text("{broken\n" + memory.read_text())
    with pytest.raises(UserError, match=r"memory\.jsonl:1: no JSON"):
        write_report(trained)
    path.write_text(json.dumps({"groups": []}))
    with pytest.raises(UserError, match=r"plan\.json: "):
        write_report(trained)
