"""A learned noise schedule in pictures: what is drawn holds the rows' numbers; without rows there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from matplotlib.figure import Figure
from PIL import Image

from entrecipes.diffusion.path import GaussianPath
from entrecipes.noise.base import RunFacts
from entrecipes.noise.infonoise import InfoNoise
from entrecipes.recipe.noise import InfoNoiseSection
from entrecipes.report import noise_plots
from entrecipes.report.card import write_card
from entrecipes.report.report import write_report
from entrecipes.report.run_folder import RunFolder

NAMES = ["noise_density", "noise_profile", "noise_convergence"]


def noise_rows(images: int = 2000, **keys: float) -> list[dict]:
    """What InfoNoise logs while it sees the errors of the best denoiser of Gaussian data of deviation 0.5."""
    section = InfoNoiseSection(warmup=500, ramp=500, refresh_every=250, bins=32, **keys)
    path = GaussianPath.from_scheduler(EDMEulerScheduler())
    sampler, generator = InfoNoise(section, path, facts=RunFacts(images=images)), torch.Generator().manual_seed(0)
    rows = []
    for seen in range(50, images + 1, 50):
        log_sigma, _ = sampler.sample(50, generator)
        sampler.record(log_sigma, 0.25 / (1 + 0.25 * torch.exp(-2 * log_sigma)))
        if row := sampler.refresh(seen):
            rows.append({"kind": "noise", "images": seen, **row})
    return rows


def add(folder: Path, rows: list[dict]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_the_map_shows_base_then_mixture_then_learned() -> None:
    rows = noise_rows()
    assert [row["images"] for row in rows[:3]] == [500, 750, 1000] and [row["ramped"] for row in rows[:3]] == [
        0,
        0.5,
        1,
    ]
    axes = Figure().subplots()
    noise_plots.density_over_training(axes, rows)
    drawn = axes.collections[0].get_array().reshape(32, len(rows) + 1)
    base, learned = np.array(rows[0]["base_density"]), [np.array(row["density"]) for row in rows]
    assert np.allclose(drawn[:, 0], base) and np.allclose(drawn[:, 1], base), "the warm-up, and a ramp that begins"
    assert np.allclose(drawn[:, 2], (base + learned[1]) / 2) and np.allclose(drawn[:, 3], learned[2])
    medians = next(line for line in axes.get_lines() if line.get_label() == "median of the draws")
    assert medians.get_ydata().tolist() == [row["quantiles"][2] for row in rows]


def test_the_gated_rate_is_the_rows_error_over_sigma_squared() -> None:
    rows = noise_rows(pivot=0.2)
    top, bottom = Figure().subplots(2)
    noise_plots.learned_profile(top, bottom, rows, gate_order=3)
    curves = {line.get_label(): line.get_xydata() for line in (*top.get_lines(), *bottom.get_lines())}
    sigma, gated = curves["gated rate"].T
    assert gated == pytest.approx(np.array(rows[-1]["x0_error"]) * sigma / (sigma**3 + 0.2**3), rel=1e-6)
    assert curves["learned"][:, 1] == pytest.approx(rows[-1]["density"])
    assert set(curves) >= {"without the gate", "pivot 0.2", "base of the warm-up"}


def test_report_and_card_tell_a_learned_schedule(run_folder: Path) -> None:
    write_card(run_folder), write_report(run_folder)
    assert not noise_plots.draw_noise_plots(RunFolder(run_folder))
    for name in ("README.md", "report.html"):
        assert "InfoNoise" not in (run_folder / name).read_text(), "none was learned"

    add(run_folder, noise_rows())
    card, report = write_card(run_folder).read_text(), write_report(run_folder).read_text()
    last = noise_rows()[-1]
    low, high = last["quantiles"][0], last["quantiles"][-1]
    said = f"After 2,000 images, 90 % of the draws lie between sigma {low:.3g} and {high:.3g}"
    assert said in card and said in report and f"below the pivot, {last['pivot']:.3g}." in card
    assert "assets/noise_density.png" in card and 'id="noise-schedule"' in report and 'href="#noise-schedule"' in report
    assert report.count("<img") == write_and_count(run_folder) + 3
    for name in NAMES:
        with Image.open(run_folder / "assets" / f"{name}.png") as image:
            assert image.size == (960, 840) and len(np.unique(np.asarray(image.convert("L")))) > 20


def write_and_count(folder: Path) -> int:
    """Pictures of the report without the noise rows."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if '"noise"' not in line))
    return write_report(folder).read_text().count("<img")


@pytest.mark.parametrize("rows", [noise_rows(500), noise_rows(gate_order=0)], ids=["one row", "no gate"])
def test_short_and_ungated_schedules_are_drawn(tmp_path: Path, rows: list[dict]) -> None:
    add(tmp_path, [{key: value for key, value in row.items() if key != "base_density"} for row in rows])
    assert list(noise_plots.draw_noise_plots(RunFolder(tmp_path))) == NAMES
    assert "90 % of the draws" in write_report(tmp_path).read_text()
