"""What is made of measured tables: weights, integrals, ranks, warnings, and the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_models import build

from entrecipes.blocks.scores import SCORES, BlockScores, model_fingerprint, spearman
from entrecipes.errors import UserError

LOG_SIGMA = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def scores(**changes) -> BlockScores:
    """Three blocks at three levels; the prediction's mean is 1 at the first level and 0 at the others."""
    means = table([1, 0, 0], [1, 0, 0], [1, 0, 0])
    same = table([0.1] * 3, [0.2] * 3, [0.3] * 3)
    given = BlockScores(
        paths=("blocks.0", "blocks.1", "blocks.2"),
        log_sigma=LOG_SIGMA,
        dimensions=4,
        full={
            "mean": means[0],
            "square": table([2, 1, 1])[0],
            "loss": table([1, 2, 3])[0],
            "x0_error": table([1] * 3)[0],
        },
        skipped={
            "mean": means,
            "square": table([3, 4, 1], [2, 1, 1], [1.5, 0.25, 1]),
            "loss": table([2, 2, 3], [1, 2, 9], [1.5, 2.5, 3.5]),
            "x0_error": table([2, 1, 1], [1, 1, 5], [1, 2, 1]),
            **{name: same for name in ("output_distance", "mean_shift", "bi", "log_spread", "abs_log_spread")},
        },
        fixed={"magnitude": table([1, 2, 3])[0], "taylor": table([3, 1, 2])[0]},
        gate_pivot=0.5,
        origin={"model": "mine", "model_fingerprint": "m", "data": "digits", "data_fingerprint": "d"},
    )
    return replace(given, **changes)


def test_weights_are_shares_of_the_draws() -> None:
    found, weights = scores(), torch.tensor([2.0, 1.0, 1.0])
    assert found.score("loss_rise").tolist() == pytest.approx([1 / 3, 2, 0.5])
    assert found.score("loss_rise", weights).tolist() == pytest.approx([0.5, 1.5, 0.5])
    assert found.score("bi", weights).tolist() == pytest.approx([0.1, 0.2, 0.3])
    for name in ("information", "magnitude", "taylor"):
        assert torch.equal(found.score(name, weights), found.score(name)), name


def test_pooled_spread_is_of_all_draws_at_once() -> None:
    found, weights = scores(), torch.tensor([0.5, 0.25, 0.25])
    # of the full model E[x^2] = 1.5 and E[x] = 0.5; without the blocks E[x^2] = 2.75, 1.5 and 1.0625
    variances = [2.75 - 0.25, 1.5 - 0.25, 1.0625 - 0.25]
    pooled = [0.5 * math.log(variance / 1.25) for variance in variances]
    assert found.score("cei", weights).tolist() == pytest.approx(pooled)
    assert found.score("ced", weights).tolist() == pytest.approx([abs(value) for value in pooled]) and pooled[2] < 0
    by_level = [[0.5 * math.log(2), math.log(2), 0], [0, 0, 0], [-0.5 * math.log(2), -math.log(2), 0]]
    assert found.by_level("cei_timestep").tolist() == [pytest.approx(row) for row in by_level]
    half = 0.5 * math.log(2)
    assert found.score("cei_timestep", weights).tolist() == pytest.approx([half, 0, -half])
    assert found.score("ced_timestep", weights).tolist() == pytest.approx([half, 0, half])


def test_ced_by_level_does_not_cancel() -> None:
    rows = scores().skipped | {"square": table([3, 1, 0.5], [2, 1, 1], [2, 1, 1])}
    found = scores(skipped=rows)
    assert found.score("cei_timestep")[0] == pytest.approx(0) and found.score("ced_timestep")[0] > 0.2


@pytest.mark.parametrize("pivot", [0.5, None])
def test_information_is_the_gated_integral(pivot: float | None) -> None:
    sigma = [math.exp(level) for level in (-1, 0, 1)]
    gates = [1.0] * 3 if pivot is None else [s**3 / (s**3 + pivot**3) for s in sigma]
    rises = [[1, 0, 0], [0, 0, 4], [0, 1, 0]]
    rates = [[4 * g * r / s**2 for g, r, s in zip(gates, row, sigma, strict=True)] for row in rises]
    found = scores(gate_pivot=pivot)
    assert found.by_level("information").tolist() == [pytest.approx(row) for row in rates]
    assert found.score("information").tolist() == pytest.approx([(a + b) / 2 + (b + c) / 2 for a, b, c in rates])


def test_names() -> None:
    assert scores().names == list(SCORES)
    without = scores(fixed={"magnitude": table([1, 2, 3])[0]})
    assert "taylor" not in without.names and "taylor" not in without.correlations()
    with pytest.raises(UserError, match="taylor was not measured here"):
        without.score("taylor")
    with pytest.raises(UserError, match="did you mean 'loss_rise'"):
        scores().score("loss_rises")
    with pytest.raises(UserError, match="magnitude has no noise levels"):
        scores().by_level("magnitude")


def test_rank_correlations() -> None:
    found = scores().correlations()
    assert found["loss_rise"] == 1 and found["bi"] == pytest.approx(0.5)
    assert found["taylor"] == pytest.approx(-1) and scores().correlations("taylor")["loss_rise"] == pytest.approx(-1)
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0))), "a constant has no ranks"
    gone = torch.tensor([1, math.nan, 2, 3])
    assert spearman(gone, torch.tensor([1.0, 9, 4, 5])) == pytest.approx(1)


def test_what_speaks_against_removing_blocks() -> None:
    found = scores()
    (warning,) = found.warnings("taylor", [0, 1])
    assert "taylor would remove block 1, whose loss rise (2)" in warning
    assert found.warnings("taylor", [0, 2]) == []
    assert found.warnings("taylor", [0, 2], weights=torch.tensor([0.0, 1.0, 1.0])) == []
    (by_weight,) = found.warnings("taylor", [0, 2], weights=torch.tensor([1.0, 0.0, 0.0]))
    assert "block 0" in by_weight
    harmless = scores(skipped=found.skipped | {"loss": table([1, 2, 3], [1, 2, 3], [1, 2, 3])})
    assert harmless.warnings("taylor", [0, 1, 2]) == []
    gone = scores(skipped=found.skipped | {"loss": table([2, 2, 3], [math.nan] * 3, [1.5, 2.5, 3.5])})
    assert "block 2" in gone.warnings("taylor", [2])[0], "a block that is gone matters no more"


def test_the_file_holds_everything(tmp_path: Path) -> None:
    found = scores()
    (tmp_path / "scores.json").write_text(json.dumps(found.to_json(), allow_nan=False))
    read = BlockScores.from_json(tmp_path / "scores.json")
    assert read.to_json() == found.to_json()
    assert all(torch.equal(read.score(name), found.score(name)) for name in SCORES)
    assert (read.paths, read.gate_pivot, read.origin) == (found.paths, found.gate_pivot, found.origin)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"paths": 3}', json.dumps(scores().to_json() | {"full": 3})])
def test_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"there is no such file; `entrecipes score` writes it"):
        BlockScores.from_json(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match=r"scores.json: no file of `entrecipes score`"):
        BlockScores.from_json(tmp_path / "scores.json")


def test_scores_of_something_else_are_refused() -> None:
    scores().check_fits("m", "d", "prune.scores")
    with pytest.raises(UserError, match=r"prune.scores: these scores were measured with another model \(mine\)"):
        scores().check_fits("other", "d", "prune.scores")
    with pytest.raises(UserError, match=r"another data set \(digits\)"):
        scores().check_fits("m", "other", "prune.scores")


def test_a_model_keeps_its_fingerprint_until_it_changes(tmp_path: Path) -> None:
    model, _ = build("dit")
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)) == before
    bias, kept = model.proj_out_2.bias.data, model.proj_out_2.bias[0].item()
    bias[0] += 1e-6
    assert model_fingerprint(model) != before
    bias[0] = kept
    assert model_fingerprint(model) == before
    model.register_to_config(norm_eps=1e-3)
    assert model_fingerprint(model) != before
