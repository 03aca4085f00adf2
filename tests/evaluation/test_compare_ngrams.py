"""The n-gram metrics: zero on the same sequences, known on known ones, named by count."""

from __future__ import annotations

import numpy as np
import pytest

from entrecipes.errors import UserError
from entrecipes.evaluation.ngrams import compare_ngrams


def draw(count: int, seed: int, probabilities=(0.25, 0.25, 0.25, 0.25)) -> np.ndarray:
    return np.random.default_rng(seed).choice(4, (count, 50), p=probabilities).astype(np.uint8)


def test_names_origin_and_zero_on_the_same():
    metrics = compare_ngrams(draw(500, 0), draw(500, 0), 4, origin={"split": "train"})
    assert [metric.name for metric in metrics] == ["ngram1_tv_500", "ngram2_tv_500", "ngram3_tv_500"]
    assert all(metric.value == 0 and metric.spread > 0 and not metric.higher_is_better for metric in metrics)
    assert metrics[0].origin["split"] == "train" and metrics[0].origin["reference_samples"] == 500


def test_distances_are_those_of_the_distributions():
    """Independent symbols: p = (1/4, ...) against q = (1/2, 1/2, 0, 0) are 1/2, 3/4, 7/8 apart."""
    metrics = compare_ngrams(draw(4000, 0), draw(4000, 1, (0.5, 0.5, 0, 0)), 4, origin={})
    assert [metric.value for metric in metrics] == pytest.approx([1 / 2, 3 / 4, 7 / 8], abs=0.01)


def test_two_real_halves_are_as_far_as_two_real_sets():
    about = [metric.origin["real_tv"] for metric in compare_ngrams(draw(400, 0), draw(400, 1), 4, origin={})]
    other = [metric.value for metric in compare_ngrams(draw(200, 2), draw(200, 3), 4, origin={})]
    assert about == sorted(about) and about[2] == pytest.approx(other[2], rel=0.4)


def test_the_spread_is_that_of_fresh_samples():
    real, skewed = draw(4000, 0), (0.4, 0.2, 0.2, 0.2)
    fresh = [compare_ngrams(real, draw(200, seed, skewed), 4, origin={})[0].value for seed in range(1, 31)]
    told = compare_ngrams(real, draw(200, 99, skewed), 4, origin={})[0].spread
    assert told == pytest.approx(np.std(fresh), rel=0.5)


def test_a_single_sequence_is_refused():
    with pytest.raises(UserError, match="use hundreds"):
        compare_ngrams(draw(1, 0), draw(9, 0), 4, origin={})
