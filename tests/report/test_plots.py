"""Sample grids pixel by pixel; curves that are drawn from any number of records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from entrecipes.report import plots
from entrecipes.report.run_folder import RunFolder


def test_grid_places_enlarged_images_row_by_row() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 3) * 10
    grid = np.asarray(plots.sample_grid(images, columns=3, scale=4, gap=2))
    assert grid.shape == (2 * (2 * 4 + 2) + 2, 3 * (3 * 4 + 2) + 2)
    for index in range(5):
        top, left = 2 + index // 3 * 10, 2 + index % 3 * 14
        assert (grid[top : top + 8, left : left + 12] == index * 10).all()
    assert (grid[12:20, 30:42] == 255).all(), "the place of the missing sixth image is white"
    assert (grid[:2] == 255).all() and (grid[:, :2] == 255).all() and (grid[10:12] == 255).all()


def test_grid_keeps_colours_and_fine_structure(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    path = plots.save_grid(image, tmp_path / "new" / "grid.png", columns=8)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (56, 56, 3), "8 pixels are enlarged six-fold, with 4 pixels around"
    assert (grid[4:52:6, 4:52:6] == image[0].transpose(1, 2, 0)).all()
    assert (grid[9:52:6, 9:52:6] == image[0].transpose(1, 2, 0)).all()


def test_large_images_are_not_enlarged() -> None:
    assert plots.sample_grid(np.zeros((1, 3, 64, 64), np.uint8), columns=1).size == (72, 72)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 3, 4, 4)), np.zeros((0, 3, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)]
)
def test_grid_refuses_what_is_no_image_batch(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        plots.sample_grid(images, columns=1)


def test_smoothing_neither_lags_nor_moves_the_ends() -> None:
    line = np.linspace(5, 1, 100)
    assert np.allclose(plots.smooth(line), line)
    noisy = line + np.random.default_rng(0).normal(0, 0.1, 100)
    assert np.abs(plots.smooth(noisy) - line)[5:-5].std() < 0.6 * 0.1
    assert plots.smooth(np.array([1.0, math.nan, 3.0]))[[0, 2]].tolist() == [1, 3]


def test_every_curve_is_drawn_at_phone_legible_size(run_folder: Path) -> None:
    drawn = plots.draw_plots(RunFolder(run_folder))
    assert list(drawn) == ["loss", "held_out_nats", "noise_levels", "throughput"]
    for path in drawn.values():
        with Image.open(path) as image:
            assert image.size == (960, 640)
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_noise_level_curves_hold_the_nats(run_folder: Path) -> None:
    records = RunFolder(run_folder).metrics("held_out")
    axes = Figure().subplots()
    plots.noise_levels(axes, records)
    curves = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert list(curves) == ["0 images", "12k images", "28k images", "40k images", "without the gate"]
    area = np.trapezoid(curves["40k images"][:, 1], curves["40k images"][:, 0])
    assert area == pytest.approx(records[-1]["nats"])


def test_without_held_out_images_the_curve_says_so(run_folder: Path) -> None:
    records = [record | {"split": "train"} for record in RunFolder(run_folder).metrics("held_out")]
    axes = Figure().subplots()
    plots.held_out_curve(axes, records)
    assert [line.get_label() for line in axes.get_lines()] == ["training images"]


def test_single_and_missing_values_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "images": 64, "loss": NaN, "images_per_second": null}\n'
        '{"kind": "held_out", "images": 0, "nats": 3.0, "log_sigma": [-1, 0], "rate": [3, 2], "gate": [1, 1]}\n'
    )
    with np.errstate(all="raise"):
        assert len(plots.draw_plots(RunFolder(tmp_path))) == 4
