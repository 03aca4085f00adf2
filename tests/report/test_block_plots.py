"""The report of block scores: every number, rank and removal in its tables, and a picture that shows every block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from entrecipes.blocks.scores import BlockScores
from entrecipes.blocks.selection import Selection
from entrecipes.blocks.stack import Block
from entrecipes.report.block_plots import COLUMNS, PANELS, height_of, plot_blocks
from entrecipes.report.block_report import BlockReport
from entrecipes.report.plots import BLUE, FAINT, ORANGE, draw

LEVELS = 8


def report(blocks: int, *, single: int = 0, strength: float = 1.0, gradients: bool = True, **changes) -> BlockReport:
    """Blocks of random worth, the first one much more; the last `single` of them in a list of their own."""
    generator = torch.Generator().manual_seed(0)

    def table(low: float = -0.2) -> torch.Tensor:
        worth = 0.5 + torch.rand(blocks, 1, generator=generator, dtype=torch.float64)
        worth[0] *= 20
        noise = low + torch.rand(blocks, LEVELS, generator=generator, dtype=torch.float64)
        return strength * worth * noise * 0.05

    flat = torch.ones(LEVELS, dtype=torch.float64)
    full = {"mean": 0 * flat, "square": flat, "loss": flat, "x0_error": flat}
    skipped = {"mean": table() * 0, "square": 1 + table().clamp(min=-0.9), "loss": 1 + table(), "x0_error": 1 + table()}
    skipped |= {name: table(0) for name in ("output_distance", "mean_shift", "bi", "abs_log_spread")}
    paths = [f"transformer_blocks.{i}" for i in range(blocks - single)]
    paths += [f"single_transformer_blocks.{i}" for i in range(single)]
    fixed = {"magnitude": table()[:, 0]} | ({"taylor": table(0)[:, 0]} if gradients else {})
    scores = BlockScores(
        paths=tuple(paths),
        log_sigma=torch.linspace(-4, 4, LEVELS, dtype=torch.float64),
        dimensions=100,
        full=full,
        skipped=skipped | {"log_spread": table()},
        fixed=fixed,
        gate_pivot=0.2,
        origin={
            "model": "some/model",
            "data": "digits",
            "images": 64,
            "noise_levels": LEVELS,
            "passes": 1234,
            "seconds": 2.0,
        },
    )
    stack = [Block(i, (path,), "the head reads it" if i == 0 else "") for i, path in enumerate(paths)]
    facts = {"class": "SomeTransformer", "path": "flow", "prediction_type": "flow_prediction", "samples": "images"}
    given = {
        "facts": facts,
        "weights": flat / LEVELS,
        "weights_note": "uniform",
        "selection": Selection(stack, keep=(-1,)),
        "count": blocks // 2,
        "score": "ced",
    }
    return BlockReport(scores, **given | changes)


def picture(path: Path, drawn: BlockReport) -> np.ndarray:
    draw(path, plot_blocks, drawn, panels=PANELS, columns=COLUMNS, height=height_of(drawn))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def bars(pixels: np.ndarray, colour: str) -> int:
    """Runs of a colour down the first column of bars, at the left end of each bar."""
    inside = (np.abs(pixels - 255 * np.array(to_rgb(colour))) < 3).all(-1)
    below = inside[pixels.shape[0] // 2 : -80, :350]
    # five in a row: the line under the bars is thinner
    rows = np.lib.stride_tricks.sliding_window_view(below.sum(1) > 8, 5).all(-1)
    return int((rows[1:] & ~rows[:-1]).sum())


def test_each_block_has_a_bar_in_its_colour(tmp_path: Path) -> None:
    drawn = report(12)
    pixels = picture(tmp_path / "scores.png", drawn)
    assert pixels.shape[1] == 960
    assert [bars(pixels, colour) for colour in (ORANGE, FAINT, BLUE)] == [6, 2, 4]


@pytest.mark.parametrize(
    "drawn",
    [report(3), report(57, single=38), report(6, strength=0), report(6, strength=-1)],
    ids=["few", "many", "worthless", "harmful"],
)
def test_few_many_worthless_and_harmful_blocks_are_drawn(tmp_path: Path, drawn: BlockReport) -> None:
    pixels = picture(tmp_path / "scores.png", drawn)
    assert pixels.shape[1] == 960 and 600 < pixels.shape[0] < 3500
    assert len(np.unique(pixels)) > 50


def test_the_tables_hold_every_score_with_its_rank() -> None:
    found = report(12, single=8, gradients=False)
    text, page = found.to_text(), found.to_markdown("scores.png")
    assert "0 to 3 are transformer_blocks, 4 to 11 are single_transformer_blocks" in text
    assert "0: the head reads it; 11: named in keep" in text and "taylor" not in text
    for name, values in found.values.items():
        order = sorted(values, reverse=True)
        for value in values:
            assert f"{value:.3g} {f'({order.index(value) + 1})':>4}" in text, name
        assert f"`{name}`" in page
    lost, spread, removals = found.tables()
    assert [row[0] for row in lost.rows] == ["0*", *map(str, range(1, 11)), "11*"]
    assert len({len(cell) for cell in next(zip(*(row[1:] for row in spread.rows), strict=True))}) == 1, "aligned"
    for name, rho, removes in removals.rows:
        assert removes == " ".join(map(str, sorted(found.removes(name)))) and len(removes.split()) == 6
        assert float(rho) == pytest.approx(found.scores.correlations()[name], abs=0.005)


def test_warnings_are_shown_where_there_are_any() -> None:
    found = report(12)
    against = report(12, score="magnitude")
    assert set(found.warnings()) <= set(found.to_text().replace("warning: ", "").splitlines())
    assert against.warnings() and all(f"- {warning}" in against.to_markdown("x.png") for warning in against.warnings())
    assert "warning" not in report(12, score="loss_rise").to_text()


def test_the_json_is_strict_and_reads_back(tmp_path: Path) -> None:
    found = report(6, strength=0)  # all blocks alike: no rank correlation
    (tmp_path / "scores.json").write_text(json.dumps(found.to_json(), allow_nan=False))
    assert json.loads((tmp_path / "scores.json").read_text())["correlations"]["ced"] is None
    assert BlockScores.from_json(tmp_path / "scores.json").to_json() == found.scores.to_json()
    assert {row[1] for row in found.tables()[2].rows} == {"-"}
