"""Comparisons of run folders whose answers are known exactly, and the words, tables and files made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from comparison_case import BUDGET, IMAGES, SECONDS_PER_IMAGE, comparison, falling, write_run
from PIL import Image
from test_report import Page

from entrecipes.errors import UserError
from entrecipes.report.comparison.arms import ArmRun, Spread
from entrecipes.report.comparison.comparison import Comparison
from entrecipes.report.comparison.curve import Curve, mean_curve, read_curve
from entrecipes.report.comparison.notes import notes, overfitting_seeds
from entrecipes.report.comparison.page import to_json, write_comparison
from entrecipes.report.comparison.tables import factors, headlines, tables
from entrecipes.report.run_folder import RunFolder


def curve(values: list[float], images: list[float] | None = None, higher: bool = False) -> Curve:
    images = images or [10.0 * 10**k for k in range(len(values))]
    return Curve(np.array(images), np.array(values), np.array(images) / 100, higher)


# -- one curve --------------------------------------------------------------------------------------------------------


def test_crossings_are_linear_over_log_images():
    falls = curve([9.0, 7.0, 3.0])  # at 10, 100, 1000 images
    assert falls.reach(8.0) == pytest.approx(10**1.5)
    assert falls.reach(6.0) == pytest.approx(10**2.25)
    assert falls.reach(7.0) == pytest.approx(100)
    assert falls.reach(3.0) == pytest.approx(1000)
    assert falls.reach(2.9) == math.inf and falls.seconds_at(math.inf) == math.inf
    assert falls.seconds_at(550) == pytest.approx(5.5) and falls.seconds_at(5) == pytest.approx(0.05)


def test_nothing_is_known_before_the_first_measurement():
    assert curve([9.0, 7.0]).reach(12.0) == 10


def test_the_first_crossing_counts_and_goes_on_from_the_best_so_far():
    dips = curve([9.0, 5.0, 8.0, 4.0])
    assert dips.final == 4.0 and dips.best == 4.0
    assert dips.reach(6.0) == pytest.approx(10**1.75), "later values above it take nothing away"
    assert dips.reach(4.5) == pytest.approx(10**3.5), "from the best so far, 5 at 1,000 images, to 4 at 10,000"
    rises = curve([9.0, 5.0, 8.0])
    assert (rises.final, rises.best, rises.best_index) == (8.0, 5.0, 1)


def test_curves_that_should_rise():
    rises = curve([0.1, 0.5, 0.3], higher=True)
    assert rises.best == 0.5 and rises.reach(0.3) == pytest.approx(10**1.5) and rises.reach(0.6) == math.inf


def test_a_mean_curve_is_over_the_images_that_all_measured():
    mean = mean_curve([curve([4.0, 2.0, 1.0]), curve([8.0, 3.0], [10.0, 1000.0])])
    assert mean.images.tolist() == [10, 1000] and mean.values.tolist() == [6, 2]
    assert mean_curve([curve([1.0], [5.0]), curve([1.0], [7.0])]) is None and mean_curve([]) is None


def test_curves_of_any_metric_are_read(tmp_path):
    folder = RunFolder(write_run(tmp_path / "a", 0, falling(5), falling(6), higher=lambda n: n / BUDGET).folder)
    nats = read_curve(folder, "heldout_nats")
    assert nats.images.tolist() == IMAGES, "the untrained model is left out"
    assert nats.seconds == pytest.approx(nats.images * SECONDS_PER_IMAGE), "between log lines the clock is linear"
    assert read_curve(folder, "train_nats").final == pytest.approx(falling(6)(BUDGET))
    assert read_curve(folder, "precision_x_10").higher_is_better
    assert read_curve(folder, "loss").final == 1 / BUDGET
    with pytest.raises(UserError, match="no 'heldout_nat' was measured; did you mean 'heldout_nats'"):
        read_curve(folder, "heldout_nat")


# -- arms over seeds --------------------------------------------------------------------------------------------------


def arms(folder: Path, **slopes: list[float]) -> dict[str, dict[int, ArmRun]]:
    return {
        name: {seed: write_run(folder / name / str(seed), seed, falling(slope)) for seed, slope in enumerate(each)}
        for name, each in slopes.items()
    }


def test_speedups_are_exact(tmp_path):
    """Base s, arm t: the arm reaches 100 - s ln N at N^(s/t), so that the speed-up is N^(1 - s/t)."""
    compared = comparison(arms(tmp_path, base=[5.0, 6.0, 4.0], fast=[6.0, 6.6, 5.0], slow=[4.0, 5.0, 3.9]))
    wanted = {0: BUDGET ** (1 - 5 / 6), 1: BUDGET ** (1 - 6 / 6.6), 2: BUDGET ** (1 - 4 / 5)}
    assert compared.targets == pytest.approx({0: falling(5)(BUDGET), 1: falling(6)(BUDGET), 2: falling(4)(BUDGET)})
    assert compared.images_to_target("base").by_seed == pytest.approx({0: BUDGET, 1: BUDGET, 2: BUDGET})
    for unit in ("images", "seconds"):
        speedup = compared.speedup("fast", unit)
        assert speedup.by_seed == pytest.approx(wanted)
        assert (speedup.low, speedup.median, speedup.high) == pytest.approx((wanted[1], wanted[0], wanted[2]))
    assert compared.seconds_to_target("fast").by_seed[0] == pytest.approx(BUDGET ** (5 / 6) * SECONDS_PER_IMAGE)
    assert compared.budget_ratio("fast").by_seed == pytest.approx(wanted)
    assert set(compared.speedup("slow").by_seed.values()) == {-math.inf}
    assert compared.reverse("slow").by_seed[0] == pytest.approx(BUDGET ** (1 - 4 / 5))
    mean = BUDGET ** (1 - 5 / np.mean([6.0, 6.6, 5.0]))  # the mean of logarithmic curves is one with the mean slope
    assert compared.mean_speedup("fast") == pytest.approx(mean)
    assert compared.mean_speedup("slow") == -math.inf
    gaps = compared.paired(compared.final("fast"), compared.final("base")).by_seed
    assert gaps == pytest.approx({seed: -d * math.log(BUDGET) for seed, d in {0: 1.0, 1: 0.6, 2: 1.0}.items()})


def test_an_arm_that_costs_more_time_gains_less_of_it(tmp_path):
    runs = arms(tmp_path, base=[5.0])
    runs["fast"] = {0: write_run(tmp_path / "fast", 0, falling(6), seconds_per_image=2 * SECONDS_PER_IMAGE)}
    compared = comparison(runs)
    assert compared.speedup("fast", "seconds").median == pytest.approx(compared.speedup("fast").median / 2)


def test_a_noisy_tail_favours_nobody(tmp_path):
    """The baseline was as good long before its end: its own first crossing counts, not its whole budget."""
    flat = {seed: write_run(tmp_path / f"flat-{seed}", seed, lambda n: max(falling(5)(n), 50.0)) for seed in (0, 1)}
    compared = comparison({"base": flat, "same": flat})
    assert compared.speedup("same").by_seed == {0: 1.0, 1: 1.0}
    reached = next(images for images in IMAGES if images > math.exp((100 - 50) / 5))
    assert compared.images_to_target("base").median == pytest.approx(reached) and reached < BUDGET
    assert compared.budget_ratio("base").median == pytest.approx(BUDGET / reached)


def test_failed_runs_count_as_not_reached_and_missing_ones_not_at_all(tmp_path):
    runs = arms(tmp_path, base=[5.0, 5.0, 5.0], fast=[6.0])
    runs["fast"][1] = ArmRun(1, tmp_path, "failed", "the loss became nan")
    runs["fast"][2] = ArmRun(2, tmp_path, "missing")
    compared = comparison(runs)
    speedup = compared.speedup("fast")
    assert list(speedup.by_seed) == [0, 1] and speedup.low == -math.inf == speedup.median
    assert factors(speedup).startswith("not reached")
    runs["fast"][2] = write_run(tmp_path / "third", 2, falling(6.5))
    speedup = comparison(runs).speedup("fast")
    assert speedup.median == pytest.approx(BUDGET ** (1 - 5 / 6)) and speedup.low == -math.inf
    assert factors(speedup) == f"{BUDGET ** (1 / 6):.2f}x (not reached to {BUDGET ** (1 - 5 / 6.5):.2f})"
    said = notes(comparison(runs))
    assert said[0].startswith("fast, seed 1, failed") and said[0].endswith("the loss became nan")
    assert compared.final("fast").by_seed.keys() == {0}


def test_without_the_baseline_of_a_seed_there_is_no_target(tmp_path):
    runs = arms(tmp_path, base=[5.0, 5.0], fast=[6.0, 6.0])
    runs["base"][1] = ArmRun(1, tmp_path, "failed", "no space left")
    compared = comparison(runs)
    assert compared.speedup("fast").by_seed.keys() == {0} == compared.reverse("fast").by_seed.keys()
    runs["base"][0] = ArmRun(0, tmp_path, "failed", "no space left")
    compared = comparison(runs)
    assert not compared.speedup("fast") and compared.mean_speedup("fast") is None and headlines(compared) == []
    assert "fast" in tables(compared)[0].to_text()


def test_a_fixed_target(tmp_path):
    runs = arms(tmp_path, base=[5.0, 3.0], fast=[6.0, 4.0])
    target = falling(4)(BUDGET)
    compared = comparison(runs, fixed_target=target)
    assert compared.images_to_target("base").by_seed == pytest.approx({0: BUDGET ** (4 / 5), 1: math.inf})
    assert compared.speedup("fast").by_seed == pytest.approx({0: BUDGET ** (4 / 5 - 4 / 6)}), "seed 1 has no baseline"
    assert f"heldout_nats of {target:.4g}" in headlines(compared)[0]


def test_metrics_for_which_higher_is_better(tmp_path):
    runs = {
        "base": {0: write_run(tmp_path / "a", 0, falling(5), higher=lambda n: 0.05 * math.log(n))},
        "fast": {0: write_run(tmp_path / "b", 0, falling(5), higher=lambda n: 0.06 * math.log(n))},
    }
    compared = comparison(runs, metric="precision_x_10")
    assert compared.higher_is_better and compared.speedup("fast").median == pytest.approx(BUDGET ** (1 - 5 / 6))
    by_title = {table.title.split(" (")[0]: table for table in tables(compared)}
    assert by_title["precision_x_10"].rows[1][4] == "in 1 of 1"
    assert by_title["heldout_nats"].rows[1][3] == "in 0 of 1", "equal is not better"


# -- on equal terms ---------------------------------------------------------------------------------------------------


def line(images: float) -> float:
    """Falls as the images grow, so that reading between two measurements gives exactly this."""
    return 50 - images / 1000


def shown(compared: Comparison, title: str) -> dict[str, list[str]]:
    """The rows by arm of the only table with this in its title."""
    (table,) = [table for table in tables(compared) if title in table.title]
    return {row[0]: row[1:] for row in [["header", *table.header[1:]], *table.rows]}


def test_arms_of_unequal_images_are_read_at_the_most_that_all_have_seen(tmp_path):
    runs = {
        "short": {s: write_run(tmp_path / f"a{s}", s, lambda n, s=s: 60 + s, measured=[4000, 9000]) for s in (0, 1)},
        "long": {s: write_run(tmp_path / f"b{s}", s, line, higher=line, measured=[5000, 15_000]) for s in (0, 1)},
        "late": {0: write_run(tmp_path / "c", 0, line, higher=line, measured=[9500, 20_000])},
    }
    rows = shown(comparison(runs), "At equal images: after 9,000 images of each arm, linear")
    assert rows["header"] == ["heldout_nats (lower is better)"], "the other metric has one arm to be read"
    assert rows["short"] == ["60.5 (60 to 61)"] and rows["long"] == ["41"], "50 - 9, between 45 and 35"
    assert rows["late"] == ["-"], "nothing is known before the first measurement"
    assert not any("At equal seconds" in table.title for table in tables(comparison(runs)))
    runs["late"][0] = write_run(tmp_path / "d", 0, line, higher=line, measured=[8000, 20_000])
    both = comparison(runs)
    assert shown(both, "At equal images")["header"][1:] == ["precision_x_10 (higher is better)"]
    assert shown(both, "At equal images")["late"] == ["41", "41"]
    assert to_json(both)["equal"][0]["values"]["heldout_nats"]["long"]["by_seed"] == {"0": 41, "1": 41}


def test_arms_of_equal_images_are_read_at_the_seconds_of_the_fastest(tmp_path):
    runs = {
        "slow": {0: write_run(tmp_path / "a", 0, line, measured=[2000, 10_000], seconds_per_image=0.02)},
        "fast": {0: write_run(tmp_path / "b", 0, line, measured=[2000, 10_000], seconds_per_image=0.01)},
    }
    rows = shown(comparison(runs), "At equal seconds: after 100 s of training of each arm, linear")
    assert rows["slow"] == ["45"] and rows["fast"] == ["40"], "after 5,000 images, and at the end"
    runs["slow"][0] = write_run(tmp_path / "c", 0, line, measured=[10_000], seconds_per_image=0.02)
    assert not any("At equal" in table.title for table in tables(comparison(runs))), "one arm alone can be read"


def test_the_costs_name_what_was_trained(tmp_path):
    runs = arms(tmp_path, base=[5.0])
    runs["lora"] = {0: write_run(tmp_path / "lora", 0, falling(5), trainable_parameters=4321)}
    rows = shown(comparison(runs), "The whole run")
    assert rows["header"][3:5] == ["trainable parameters", "parameters"]
    assert rows["base"][3:5] == ["1,234,567"] * 2 and rows["lora"][3:5] == ["4321", "1,234,567"]


# -- what is said -----------------------------------------------------------------------------------------------------


def test_overfitting_is_told_from_a_rising_training_error(tmp_path):
    def rising(images: float) -> float:
        return falling(5)(images) + 10 * max(0, images / BUDGET - 0.5)

    runs = {
        "base": {0: write_run(tmp_path / "a", 0, falling(5))},
        "overfit": {0: write_run(tmp_path / "b", 0, rising, train=falling(6))},
        "diverging": {0: write_run(tmp_path / "c", 0, rising, train=rising)},
    }
    compared = comparison(runs)
    assert [overfitting_seeds(compared, arm) for arm in runs] == [[], [0], []]
    assert any(sentence.startswith("overfit overfits in 1 of 1 seeds") for sentence in notes(compared))


def test_what_is_not_comparable_is_noted(tmp_path):
    runs = arms(tmp_path, base=[5.0], other=[60.0])
    other = runs["other"][0].folder / "metrics.jsonl"
    other.write_text(other.read_text().replace("[-3, 3]", "[-4, 3]"))
    run = json.loads((runs["other"][0].folder / "run.json").read_text())
    run |= {"device": "another processor", "versions": run["versions"] | {"torch": "1.0"}}
    (runs["other"][0].folder / "run.json").write_text(json.dumps(run))
    said = "\n".join(notes(comparison(runs, unequal=("training.images",))))
    for part in (
        "NOT AN EQUAL COMPARISON (--unequal): the arms differ in training.images",
        "other: 2 levels from log sigma -4 to 3",
        "other is past the target at its first measurement in 1 of 1 seeds",
        "another processor, up to 1 run at a time",
        "compare images, not seconds",
        "different versions of torch",
    ):
        assert part in said, part


def test_headlines(tmp_path):
    compared = comparison(arms(tmp_path, base=[5.0, 5.0], fast=[6.0, 6.5], slow=[4.0, 4.5]))
    fast, slow = headlines(compared)
    assert (
        fast.startswith("fast reaches base's final heldout_nats (42.44) with 10.53")
        and "x fewer images (6.81 to 14.25)" in fast
    )
    assert fast.endswith("of training (median of 2 seeds)")
    assert slow.startswith("slow does not reach base's final heldout_nats (42.44) (0 of 2 seeds do); base is as good")


# -- what is left -----------------------------------------------------------------------------------------------------


def test_everything_is_written(tmp_path):
    runs = arms(tmp_path / "runs", base=[5.0, 5.2], fast=[6.0, 6.5], slow=[4.0, 4.5])
    compared = comparison(runs, command="entrecipes compare a b --arm 'c <d>'")
    paths = write_comparison(compared, tmp_path / "out")
    drawn = {"speedup", "quality_images", "quality_seconds", "difference", "train_held_out"}
    assert paths.keys() == {"json", "md", "html"} | drawn
    page = Page(paths["html"])
    assert len(page.images) == len(drawn) and all(
        source.startswith("data:image/png") for source in page.images.values()
    )
    assert {"result", "notes", "curves", "arms", "method"} <= page.ids
    assert "a <case>" in page.text and "c <d>" in page.text and headlines(compared)[0] in page.text
    assert "noise.type: log_normal -> uniform" in page.text
    text = paths["md"].read_text()
    for link in (f"]({name}.png)" for name in drawn):
        assert link in text
    for name in drawn:
        with Image.open(paths[name]) as image:
            assert image.width == 960 and len(np.unique(np.asarray(image.convert("L")))) > 20
    record = json.loads(paths["json"].read_text())
    fast = record["arms"]["fast"]
    assert fast["speedup_images"]["by_seed"]["0"] == pytest.approx(BUDGET ** (1 / 6), rel=1e-4)
    assert record["arms"]["slow"]["speedup_images"]["median"] is None, "not reached"
    assert fast["runs"]["1"]["heldout_nats"][-1] == pytest.approx(falling(6.5)(BUDGET), rel=1e-5)
    assert paths["json"].stat().st_size < 20_000 and "NaN" not in paths["json"].read_text()


def test_tables_are_tables_in_markdown(tmp_path):
    compared = comparison(arms(tmp_path, base=[5.0], fast=[6.0]))
    for table in tables(compared):
        lines = table.to_markdown().splitlines()
        assert len({line.count(" | ") for line in lines}) == 1 and lines[1].startswith("| --- |")
        widths = {len(line) for line in table.to_text().splitlines()[1:]}
        assert max(widths) < 150


def test_a_single_arm_gives_its_numbers_with_their_spread(tmp_path):
    compared = comparison(arms(tmp_path, base=[5.0, 6.0]))
    (table,) = tables(compared)
    low, high = sorted(falling(slope)(BUDGET) for slope in (5.0, 6.0))
    row = next(row for row in table.rows if row[0] == "heldout_nats")
    assert row == ["heldout_nats", f"{(low + high) / 2:.4g}", f"{low:.4g} to {high:.4g}"]
    assert headlines(compared) == []
    assert write_comparison(compared, tmp_path / "out").keys() == {
        "json", "md", "html", "quality_images", "quality_seconds", "train_held_out",
    }  # fmt: skip


def test_many_arms_and_single_points_are_drawn(tmp_path):
    many = {f"an arm with a rather long name {k}": [4 + k / 10] for k in range(13)}
    write_comparison(comparison(arms(tmp_path / "many", **many)), tmp_path / "out")
    runs = arms(tmp_path / "few", base=[5.0], fast=[6.0])
    for name in runs:
        path = runs[name][0].folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["images"] in (0, BUDGET)))
    compared = comparison(runs)
    assert write_comparison(compared, tmp_path / "out").keys() == {"json", "md", "html", "speedup"}
    assert any("the coarsest curve has 1 point:" in sentence for sentence in notes(compared))


def test_a_damaged_run_is_named(tmp_path):
    runs = arms(tmp_path, base=[5.0])
    (runs["base"][0].folder / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(UserError, match="metrics.jsonl:1"):
        to_json(comparison(runs))


def test_the_spread_of_nothing_is_false():
    assert not Spread({}) and factors(Spread({})) == "-"
