"""FID, KID and precision/recall between a real and a generated set of images, each image embedded once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version as package_version
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from entrecipes.errors import UserError, nearest
from entrecipes.evaluation.features import FeatureExtractor, torchmetrics_image
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.result import Metric, metric_name

Origin = Mapping[str, str | int | float | None]

KID_SUBSETS, KID_SUBSET_SIZE = 50, 1000
NEIGHBOURS = 3
ALONE = {"sync_on_compute": False}
"""Of torchmetrics: every process holds all features, so that adding up those of the others would count them twice."""

_REAL_FEATURES: WeakKeyDictionary[FeatureExtractor, dict[str, Tensor]] = WeakKeyDictionary()


def embed(
    images: Tensor | Iterable[Tensor],
    extractor: FeatureExtractor,
    batch_size: int,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> Tensor:
    """Features of uint8 images [N, C, H, W] (one tensor, or batches of any size): float32 [N, F] on the CPU.

    Args:
        images: Of one tensor, processes embed a share each; every one gets all features.
        extractor: Embeds them.
        batch_size: Images at a time.
        shard: This process among those that all have these images.

    Raises:
        UserError: If there are no images.
    """
    if isinstance(images, Tensor) and len(images) and shard.world_size > 1:
        return shard.join(embed(shard.of(images), extractor, batch_size), len(images)).cpu()
    batches = [images] if isinstance(images, Tensor) else images
    features = [extractor(part).cpu() for batch in batches for part in batch.split(batch_size)]
    if not features:
        raise UserError("metrics: there are no images to embed; check data and evaluation.samples")
    return torch.cat(features)


class _Identity(nn.Module):
    """Hands torchmetrics features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features [N, F] and [M, F] (Heusel et al. 2017, eq. 6).

    Computed in float64: torchmetrics returns the dtype of the features, and float32 loses the difference of two large
    traces. Biased upward at small N: compare at equal counts only, or use [`kid`].
    """
    metric = torchmetrics_image("fid").FrechetInceptionDistance(feature=_Identity(real.shape[1]), **ALONE)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def frechet(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to [N, D] and [M, D], exact also where D is far above N.

    The trace of the root of the product of both covariances is the sum of the singular values of an N x M matrix
    (centred descriptors of one side times those of the other), so that no D x D matrix is needed.
    """
    real, fake = real.double(), fake.double()
    means = real.mean(0), fake.mean(0)
    centred = [(side - mean) / (len(side) - 1) ** 0.5 for side, mean in zip((real, fake), means, strict=True)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    variances = sum(side.square().sum() for side in centred)
    return float((means[0] - means[1]).square().sum() + variances - 2 * cross)


def kid_subset_size(real: int, fake: int) -> int:
    """Images of each KID subset: 1000 as in the paper, or half of the smaller set so that subsets differ."""
    return min(KID_SUBSET_SIZE, min(real, fake) // 2)


def kid(real: Tensor, fake: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features [N, F], [M, F], cubic kernel (Binkowski et al. 2018): unbiased.

    Args:
        seed: Of the subsets; the global generator is left as it was.

    Returns:
        Mean and standard deviation over 50 random subsets.
    """
    size = kid_subset_size(len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        # The default CPU generator only: torch.manual_seed would also reseed the accelerators, which aren't forked.
        torch.random.default_generator.manual_seed(seed)
        metric = torchmetrics_image("kid").KernelInceptionDistance(
            feature=_Identity(real.shape[1]), subsets=KID_SUBSETS, subset_size=size, **ALONE
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _distances(rows: Tensor, columns: Tensor, reduce: Callable[[Tensor], Tensor], chunk: int = 1000) -> Tensor:
    """Euclidean distances of `rows` to all `columns`, reduced row-wise a chunk at a time."""
    return torch.cat([reduce(torch.cdist(part, columns)) for part in rows.split(chunk)])


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of features [N, F], [M, F] (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision: share of the fake features inside the real manifold, the union of balls around real features that reach
    to their k-th nearest neighbour; recall: the same with the roles exchanged.
    """
    real, fake = real.double(), fake.double()

    def coverage(points: Tensor, manifold: Tensor) -> float:
        # The nearest neighbour of each point is the point itself, hence k + 1.
        radius = _distances(manifold, manifold, lambda distance: distance.kthvalue(neighbours + 1, dim=1).values)
        return float(_distances(points, manifold, lambda distance: (distance <= radius).any(1)).double().mean())

    return coverage(fake, real), coverage(real, fake)


def _real_features(
    real: Tensor | Iterable[Tensor],
    extractor: FeatureExtractor,
    batch_size: int,
    fingerprint: str | None,
    shard: Shard,
) -> Tensor:
    if fingerprint is None:
        return embed(real, extractor, batch_size, shard)
    known = _REAL_FEATURES.setdefault(extractor, {})
    if fingerprint not in known:
        known[fingerprint] = embed(real, extractor, batch_size, shard)
    return known[fingerprint]


def compare(
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    real: Tensor | Iterable[Tensor],
    fake: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 250,
    seed: int = 0,
    origin: Origin | None = None,
    real_fingerprint: str | None = None,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> list[Metric]:
    """Measure generated images against real ones.

    Args:
        metrics: Any of `fid`, `kid`, `precision_recall` (which yields two metrics).
        real: uint8 [N, C, H, W], or batches of such.
        fake: uint8 [M, C, H, W], or batches of such.
        batch_size: Images embedded at a time.
        seed: Of KID's subsets.
        origin: What the caller knows of the samples (split, sampler, steps, guidance_scale, seed, ema).
        real_fingerprint: Identifies the real images, down to their selection and size: their features are then kept in
            memory as long as the extractor lives, and `real` isn't read again.
        shard: Processes that hold the same images and embed a share each.

    Returns:
        Metrics in the order asked, named by extractor and count of generated images.

    Raises:
        UserError: For an unknown metric, too few images, or a number that isn't finite.
    """
    for name in metrics:
        if name not in MEASURES:
            raise UserError(f"evaluation.metrics: there is no '{name}'{nearest(name, MEASURES)}")
    real_features = _real_features(real, extractor, batch_size, real_fingerprint, shard)
    fake_features = embed(fake, extractor, batch_size, shard)
    counts = len(real_features), len(fake_features)
    if min(counts) < NEIGHBOURS + 2:
        raise UserError(
            f"evaluation.samples: {counts[0]} real and {counts[1]} generated images can't be compared; use hundreds"
        )
    about = {
        **(origin or {}),
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "samples": counts[1],
        "reference_samples": counts[0],
    }
    tag = extractor.tag
    return [found for name in metrics for found in MEASURES[name](real_features, fake_features, seed, tag, about)]


def _measure_fid(real: Tensor, fake: Tensor, seed: int, tag: str, about: Origin) -> list[Metric]:
    origin = {**about, "torchmetrics": package_version("torchmetrics")}
    return [Metric(metric_name("fid", tag, len(fake)), fid(real, fake), None, origin, higher_is_better=False)]


def _measure_kid(real: Tensor, fake: Tensor, seed: int, tag: str, about: Origin) -> list[Metric]:
    mean, deviation = kid(real, fake, seed=seed)
    origin = {
        **about,
        "torchmetrics": package_version("torchmetrics"),
        "spread": "standard deviation over subsets",
        "subsets": KID_SUBSETS,
        "subset_size": kid_subset_size(len(real), len(fake)),
        "subset_seed": seed,
    }
    return [Metric(metric_name("kid", tag, len(fake)), mean, deviation, origin, higher_is_better=False)]


def _measure_precision_recall(real: Tensor, fake: Tensor, seed: int, tag: str, about: Origin) -> list[Metric]:
    origin = {**about, "neighbours": NEIGHBOURS}
    return [
        Metric(metric_name(name, tag, len(fake)), value, None, origin, higher_is_better=True)
        for name, value in zip(("precision", "recall"), precision_recall(real, fake), strict=True)
    ]


MEASURES: dict[str, Callable[[Tensor, Tensor, int, str, Origin], list[Metric]]] = {
    "fid": _measure_fid,
    "kid": _measure_kid,
    "precision_recall": _measure_precision_recall,
}
