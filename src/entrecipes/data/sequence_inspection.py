"""A look at a set of sequences before training on it: counts of its symbols, its entropies, some windows."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrecipes.data.prepared import facts, prepared_folder
from entrecipes.data.sequences import EMBEDDED, Sequences, read_sequences
from entrecipes.information.ngrams import ngram_counts

WINDOW = 64
ORDERS = 4
"""Lengths of n-grams that are counted."""


@dataclass(frozen=True)
class SequenceInspection:
    """What can be said of a set of sequences."""

    name: str
    source: str
    license: str
    sequences: int
    symbols: int
    lengths: tuple[int, int]
    """The shortest and the longest."""
    counts: dict[str, int]
    """Symbol -> how often, in the order of the alphabet."""
    entropies: tuple[float, ...]
    """Nats a symbol, given the 0, 1, 2, 3 symbols before it; from counts, so too small on short sets."""
    labels: dict[str, int]
    """Class -> sequences; empty without classes."""
    examples: tuple[str, ...]
    """A few windows."""


def holds_sequences(name: str) -> bool:
    """Whether `name` (embedded, prepared, a folder that `prepare` made, or a text file) is a set of sequences."""
    noted = facts(Path(name)) or facts(prepared_folder(name)) or {}
    return name == EMBEDDED or name.endswith(".txt") or "alphabet" in noted


def inspect_sequences(name: str, *, count: int = 8, seed: int = 0) -> SequenceInspection:
    """Describe a set of sequences.

    Args:
        name: The embedded set, a prepared one, a folder that `prepare` made, or a text file.
        count: Windows shown, drawn by `seed`.

    Raises:
        UserError: It is not prepared, or holds no sequences.
    """
    whole = read_sequences(name)
    lengths = [len(text) for text in whole.texts]
    ids, symbols = whole.ids(), len(whole.alphabet)
    spectra = [sum(ngram_counts(part, order + 1, symbols) for part in ids) for order in range(ORDERS)]
    return SequenceInspection(
        name=whole.name,
        source=whole.source,
        license=whole.license,
        sequences=len(lengths),
        symbols=sum(lengths),
        lengths=(min(lengths), max(lengths)),
        counts=dict(zip(whole.alphabet, spectra[0].tolist(), strict=True)),
        entropies=tuple(np.diff([0.0, *map(_entropy, spectra)]).tolist()),
        labels=_label_counts(whole),
        examples=tuple(_windows(whole, count, seed)),
    )


def _entropy(counts: np.ndarray) -> float:
    """Nats of the distribution that counts stand for."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _label_counts(whole: Sequences) -> dict[str, int]:
    if whole.labels is None:
        return {}
    counts = Counter(whole.labels.tolist())
    return {name: counts[label] for label, name in enumerate(whole.label_names)}


def _windows(whole: Sequences, count: int, seed: int) -> list[str]:
    """Windows drawn evenly over all symbols."""
    drawn = random.Random(seed)
    texts = drawn.choices(whole.texts, weights=[len(text) for text in whole.texts], k=count)
    starts = (drawn.randrange(max(1, len(text) - WINDOW)) for text in texts)
    return [text[start : start + WINDOW] for text, start in zip(texts, starts, strict=True)]
