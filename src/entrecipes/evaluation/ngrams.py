"""How close generated sequences are to real ones in their n-gram spectra."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from entrecipes.errors import UserError
from entrecipes.evaluation.result import Metric, count_tag
from entrecipes.information.ngrams import ngram_counts, total_variation

ORDERS = (1, 2, 3)
RESAMPLES = 50


def compare_ngrams(
    real: np.ndarray, fake: np.ndarray, symbols: int, *, seed: int = 0, origin: Mapping[str, str | int | float | None]
) -> list[Metric]:
    """Total variation distance between the spectra of single symbols, pairs and triples.

    Two finite sets of the same source are not at distance 0. `origin["real_tv"]` says how far two halves of the real
    sequences are from each other: what a perfect model would reach with half as many sequences on either side.

    Args:
        real: Symbol ids uint8 [N, L].
        fake: Symbol ids uint8 [M, L].
        symbols: Size of the alphabet.
        seed: Of the resamples.
        origin: What the caller knows of them.

    Returns:
        `ngram1_tv_M`, `ngram2_tv_M`, `ngram3_tv_M`, each with the deviation over bootstrap resamples of the generated
        sequences.

    Raises:
        UserError: When there are fewer than two sequences on either side.
    """
    if min(len(real), len(fake)) < 2:
        raise UserError(
            f"evaluation.samples: {len(real)} real and {len(fake)} generated sequences can't be compared; use hundreds"
        )
    random = np.random.default_rng(seed)
    draws = random.multinomial(len(fake), np.full(len(fake), 1 / len(fake)), size=RESAMPLES)
    metrics = []
    for order in ORDERS:
        spectrum = ngram_counts(real, order, symbols)
        halves = [ngram_counts(half, order, symbols) for half in (real[::2], real[1::2])]
        resampled = [total_variation(spectrum, ngram_counts(fake, order, symbols, draw)) for draw in draws]
        about = {
            **origin,
            "symbols": symbols,
            "samples": len(fake),
            "reference_samples": len(real),
            "real_tv": round(total_variation(*halves), 6),
            "spread": f"standard deviation over {RESAMPLES} bootstrap resamples of the generated sequences",
        }
        distance = total_variation(spectrum, ngram_counts(fake, order, symbols))
        name = f"ngram{order}_tv_{count_tag(len(fake))}"
        metrics.append(Metric(name, distance, float(np.std(resampled)), about, higher_is_better=False))
    return metrics
