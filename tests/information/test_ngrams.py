"""n-gram spectra against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from entrecipes.information.ngrams import ngram_counts, total_variation


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counts_equal_those_by_hand(order):
    ids = np.random.default_rng(0).integers(0, 5, (7, 11), dtype=np.uint8)
    by_hand = Counter(tuple(row[i : i + order]) for row in ids.tolist() for i in range(11 - order + 1))
    counts = ngram_counts(ids, order, 5).reshape((5,) * order)
    assert counts.sum() == 7 * (12 - order)
    assert {gram: count for gram, count in np.ndenumerate(counts) if count} == by_hand


def test_weights_repeat_sequences():
    ids = np.random.default_rng(1).integers(0, 4, (3, 9), dtype=np.uint8)
    repeated = ngram_counts(ids[[0, 0, 2]], 2, 4)
    assert np.array_equal(ngram_counts(ids, 2, 4, np.array([2, 0, 1])), repeated)


def test_short_sequences_hold_no_long_grams():
    assert not ngram_counts(np.array([1, 2], np.uint8), 3, 4).any()


def test_distance_is_zero_one_or_the_moved_share():
    assert total_variation(np.array([1, 3]), np.array([2, 6])) == 0
    assert total_variation(np.array([5, 0]), np.array([0, 1])) == 1
    assert total_variation(np.array([1, 1, 0]), np.array([2, 1, 1])) == pytest.approx(0.25)
