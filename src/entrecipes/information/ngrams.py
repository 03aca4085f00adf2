"""Spectra of n-grams (k-mers): how often each run of n symbols occurs."""

from __future__ import annotations

import numpy as np


def ngram_counts(ids: np.ndarray, order: int, symbols: int, weights: np.ndarray | None = None) -> np.ndarray:
    """How often each n-gram occurs in sequences of symbol ids.

    Args:
        ids: uint8 [L] or [N, L], each below `symbols`.
        order: n, at least 1.
        symbols: V, size of the alphabet.
        weights: How often each of the N sequences counts; null: once.

    Returns:
        [V ** n], the first symbol being the most significant digit; int64, float64 with weights.
    """
    ids = np.atleast_2d(ids)
    length = ids.shape[1] - order + 1
    codes = np.zeros((len(ids), max(length, 0)), np.int64)
    for offset in range(order):
        codes = codes * symbols + ids[:, offset : offset + length]
    if weights is not None:
        weights = np.repeat(weights, codes.shape[1])
    return np.bincount(codes.ravel(), weights, minlength=symbols**order)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation distance, between 0 and 1, of the two distributions that counts [K] stand for."""
    return float(0.5 * np.abs(p / p.sum() - q / q.sum()).sum())
