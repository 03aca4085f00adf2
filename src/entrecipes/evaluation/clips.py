"""Generated clips against real ones: each beside the clip that gave its condition, and all of them as a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as package_version
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from entrecipes.errors import UserError, nearest
from entrecipes.evaluation.features import FeatureExtractor, torchmetrics_image
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.metrics import ALONE, MEASURES, Origin, embed, frechet, kid, kid_subset_size
from entrecipes.evaluation.pose_detector import PoseDetector, pose_metrics
from entrecipes.evaluation.result import Metric, metric_name
from entrecipes.evaluation.video_features import Frames, VideoExtractor
from entrecipes.recipe.evaluation import IMAGE_METRICS, METRICS

LEAST_CLIPS = 4
PSNR_CAP = 100.0
"""dB; equal frames have infinitely many, which no mean survives."""


@dataclass(eq=False)
class ClipSide:
    """The real or the generated clips, uint8 [N, 3, F, H, W], with what networks see in them, computed once."""

    clips: Tensor
    extractor: FeatureExtractor
    video: VideoExtractor | None
    batch_size: int
    frame_features: Tensor | None = field(default=None)
    """Features of all frames [N * F, D], clip after clip."""
    shard: Shard = Shard()
    """Processes that hold the same clips and look at a share each."""

    @property
    def frames(self) -> Tensor:
        """All frames [N * F, 3, H, W], clip after clip."""
        return self.clips.transpose(1, 2).flatten(0, 1)

    def features(self) -> Tensor:
        """`frame_features`, computed when first asked for."""
        if self.frame_features is None:
            self.frame_features = embed(self.frames, self.extractor, self.batch_size, self.shard)
        return self.frame_features

    @cached_property
    def descriptors(self) -> Tensor:
        """One vector a clip [N, D]."""
        return self.each(self.video)

    def each(self, describe: Callable[[Tensor, Frames], Tensor]) -> Tensor:
        """One vector a clip [N, D], from the clips and the way to their frames' features."""
        count, of = len(self.clips), self.shard.of
        vectors = describe(of(self.clips), lambda: of(self.features().unflatten(0, (count, -1))))
        return self.shard.join(vectors, count).cpu()


@dataclass(frozen=True)
class Pairs:
    """Real clips and the clips generated from the same conditions, with what the measures need besides."""

    real: ClipSide
    fake: ClipSide
    seed: int
    origin: Origin
    keypoints: Tensor | None = None
    detector: PoseDetector | None = None

    def metric(self, name: str, tag: str, values: Tensor, *, higher_is_better: bool, **about: str | float) -> Metric:
        """Mean and spread of one value a clip [N]."""
        deviation = values.double().std().item()
        origin = {**self.origin, **about, "spread": "standard deviation over clips"}
        name = metric_name(name, tag, len(values)) if tag else f"{name}_{len(values)}"
        return Metric(name, values.double().mean().item(), deviation, origin, higher_is_better)

    def by_clip(self, per_frame: Tensor) -> Tensor:
        """Mean over each clip's frames: [N * F] -> [N]."""
        return per_frame.unflatten(0, (len(self.real.clips), -1)).mean(1)


_REAL: WeakKeyDictionary[FeatureExtractor, dict[str, ClipSide]] = WeakKeyDictionary()


def sides(
    real: Tensor,
    fake: Tensor,
    extractor: FeatureExtractor,
    video: VideoExtractor | None,
    batch_size: int,
    real_fingerprint: str | None,
    shard: Shard,
) -> tuple[ClipSide, ClipSide]:
    """The real and the generated clips; see [`compare_clips`].

    Raises:
        UserError: When they don't pair or are too few.
    """
    if real.shape != fake.shape or real.ndim != 5 or len(real) < LEAST_CLIPS:
        raise UserError(
            f"evaluation.samples: real clips {list(real.shape)} and generated clips {list(fake.shape)} can't be "
            f"compared; give at least {LEAST_CLIPS} pairs of one shape [N, 3, F, H, W]"
        )
    known = _REAL.setdefault(extractor, {}) if real_fingerprint else {}
    key = f"{real_fingerprint}-{video and (video.tag, video.version)}"
    if key not in known:
        known[key] = ClipSide(real, extractor, video, batch_size, shard=shard)
    return known[key], ClipSide(fake, extractor, video, batch_size, shard=shard)


def check_metrics(metrics: Sequence[str], kind: str) -> None:
    """Raise UserError for a metric that isn't measured on that kind of data."""
    for name in metrics:
        if name not in METRICS[kind]:
            raise UserError(f"evaluation.metrics: there is no '{name}' of {kind}{nearest(name, METRICS[kind])}")


def compare_clips(
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    real: Tensor,
    fake: Tensor,
    *,
    keypoints: Tensor | None = None,
    video: VideoExtractor | None = None,
    detector: PoseDetector | None = None,
    batch_size: int = 250,
    seed: int = 0,
    origin: Origin | None = None,
    real_fingerprint: str | None = None,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> list[Metric]:
    """Measure generated clips against the real ones whose poses and reference images they were generated from.

    Args:
        metrics: Any of `ssim`, `psnr`, `perceptual`, `fid`, `kid`, `precision_recall` (of the frames), `fvd` (which
            yields `fvd` and `kvd`), `pose` (which yields three), `motion`.
        extractor: Embeds frames.
        real: uint8 [N, 3, F, H, W].
        fake: The same shape; clip i was generated from the poses and the reference image of real clip i.
        keypoints: The poses asked for, float [N, F, 13, 3]: x, y in [0, 1] and visibility; `pose` needs them.
        video: Describes clips; `fvd` needs it.
        detector: Finds joints; `pose` needs it.
        batch_size: Frames embedded at a time.
        seed: Of the kernel distances' subsets.
        origin: What the caller knows of the samples (split, sampler, steps, seed, ema).
        real_fingerprint: Identifies the real clips, down to their selection: what the networks see in them is then kept
            in memory as long as the extractor lives.
        shard: Processes that hold the same clips and look at a share each.

    Returns:
        Metrics in the order asked.

    Raises:
        UserError: For an unknown metric, clips that don't pair or are too few, or a number that isn't finite.
    """
    check_metrics(metrics, "clips")
    both = sides(real, fake, extractor, video, batch_size, real_fingerprint, shard)
    about = {**(origin or {}), "samples": len(fake), "frames": fake.shape[2], "size": fake.shape[-1]}
    pairs = Pairs(*both, seed, about, keypoints, detector)
    # The perceptual distance embeds the frames on its way, so that it goes first.
    found = {name: CLIP_MEASURES[name](pairs) for name in sorted(metrics, key=lambda name: name != "perceptual")}
    return [metric for name in metrics for metric in found[name]]


def _in_parts(pairs: Pairs, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`measure(generated, real)` of frames as floats [n, 3, H, W], some at a time, as one value a clip [N]."""
    parts = zip(*(side.frames.split(pairs.fake.batch_size) for side in (pairs.fake, pairs.real)), strict=True)
    return pairs.by_clip(torch.cat([measure(fake.float(), real.float()) for fake, real in parts]))


def _measure_ssim(pairs: Pairs) -> list[Metric]:
    ssim = torchmetrics_image("ssim").StructuralSimilarityIndexMeasure(data_range=255.0, reduction="none", **ALONE)
    version = package_version("torchmetrics")
    return [pairs.metric("ssim", "", _in_parts(pairs, ssim), higher_is_better=True, torchmetrics=version)]


def decibels(fake: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, at most `PSNR_CAP`, of each frame: floats [n, 3, H, W] in 0..255 -> [n]."""
    return (10 * torch.log10(255.0**2 / (fake - real).square().mean((1, 2, 3)))).clamp(max=PSNR_CAP)


def _measure_psnr(pairs: Pairs) -> list[Metric]:
    return [pairs.metric("psnr", "", _in_parts(pairs, decibels), higher_is_better=True, cap=PSNR_CAP)]


def _measure_perceptual(pairs: Pairs) -> list[Metric]:
    """As LPIPS (Zhang et al. 2018, eq. 1) but without its learned weights, and of another network: no LPIPS.

    Feature maps of several stages, each position's vector of unit length: the squared distance, mean over positions and
    stages; 0 for equal frames, 2 for unrelated directions, 4 at most.
    """
    extractor, shard, maps, distances, features = pairs.fake.extractor, pairs.fake.shard, [], [], []
    if not extractor.stages:
        raise UserError(
            f"evaluation.metrics: 'perceptual' knows no stages of {extractor.name}; use `features.type: "
            "efficientnet_lite0`"
        )
    handles = [module.register_forward_hook(lambda _, __, output: maps.append(output)) for module in extractor.stages]
    try:
        half = max(1, pairs.fake.batch_size // 2)
        for both in zip(*(shard.of(side.frames).split(half) for side in (pairs.real, pairs.fake)), strict=True):
            maps.clear()
            features.append(extractor(torch.cat(both)).cpu().chunk(2))
            halves = [F.normalize(map_.float(), dim=1).chunk(2) for map_ in maps]
            stages = [(real - fake).square().sum(1).mean((1, 2)) for real, fake in halves]
            distances.append(torch.stack(stages).mean(0).cpu())
    finally:
        for handle in handles:
            handle.remove()
    count = len(pairs.fake.frames)
    distance, *both = (shard.join(torch.cat(parts), count).cpu() for parts in (distances, *zip(*features, strict=True)))
    pairs.real.frame_features, pairs.fake.frame_features = both
    about = {"extractor": extractor.name, "extractor_version": extractor.version, "stages": len(extractor.stages)}
    values = pairs.by_clip(distance)
    return [pairs.metric("perceptual", extractor.tag, values, higher_is_better=False, **about)]


def _measure_frames(name: str, pairs: Pairs) -> list[Metric]:
    """One of the metrics on sets of images, on all frames."""
    extractor = pairs.fake.extractor
    real, fake = pairs.real.features(), pairs.fake.features()
    about = {
        **pairs.origin,
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "samples": len(fake),
        "reference_samples": len(real),
        "clips": len(pairs.fake.clips),
    }
    return MEASURES[name](real, fake, pairs.seed, f"frames_{extractor.tag}", about)


def _measure_fvd(pairs: Pairs) -> list[Metric]:
    """The Frechet distance is biased upward by hundreds of clips in thousands of dimensions, the kernel form is not.

    So both are given: `fvd` compares runs of equal counts, `kvd` (0 on average between independent draws of one source)
    says how far apart the sources are. Clips that nearly equal the real ones of their pairs bring `kvd` below 0.
    """
    video = pairs.fake.video
    real, fake = pairs.real.descriptors, pairs.fake.descriptors
    about = {
        **pairs.origin,
        "extractor": video.name,
        "extractor_version": video.version,
        "reference_samples": len(real),
        "dimensions": real.shape[1],
    }
    halves = {"real_halves": round(frechet(real[::2], real[1::2]), 4)}
    subsets = {
        "spread": "standard deviation over subsets",
        "subset_size": kid_subset_size(len(real), len(fake)),
        "subset_seed": pairs.seed,
        "torchmetrics": package_version("torchmetrics"),
    }
    mean, deviation = kid(real, fake, seed=pairs.seed)
    name, count = video.tag, len(fake)
    return [
        Metric(metric_name("fvd", name, count), frechet(real, fake), None, about | halves, higher_is_better=False),
        Metric(metric_name("kvd", name, count), mean, deviation, about | subsets, higher_is_better=False),
    ]


def _measure_pose(pairs: Pairs) -> list[Metric]:
    if pairs.keypoints is None or pairs.detector is None:
        raise UserError("evaluation.metrics: 'pose' needs clips with keypoints; use `data.type: clips`")
    return pose_metrics(pairs.detector, pairs.fake.clips, pairs.keypoints, pairs.origin)


def _motion(clips: Tensor) -> Tensor:
    """Mean absolute difference between consecutive frames, in grey levels of 255: uint8 [N, 3, F, H, W] -> [N]."""
    return clips.float().diff(dim=2).abs().mean((1, 2, 3, 4))


def _measure_motion(pairs: Pairs) -> list[Metric]:
    """How far the ratio of generated to real motion is from 1: 0 as in the real clips, 1 for still ones."""
    real, fake = _motion(pairs.real.clips), _motion(pairs.fake.clips)
    if not real.mean() > 0:
        raise UserError("evaluation.metrics: 'motion' needs real clips that move; look at the data")
    ratio = (fake.mean() / real.mean()).item()
    origin = {**pairs.origin, "ratio": round(ratio, 4), "real_grey_levels": round(real.mean().item(), 4)}
    return [Metric(f"motion_gap_{len(fake)}", abs(1 - ratio), None, origin, higher_is_better=False)]


CLIP_MEASURES: dict[str, Callable[[Pairs], list[Metric]]] = {
    "ssim": _measure_ssim,
    "psnr": _measure_psnr,
    "perceptual": _measure_perceptual,
    **{name: lambda pairs, name=name: _measure_frames(name, pairs) for name in IMAGE_METRICS},
    "fvd": _measure_fvd,
    "pose": _measure_pose,
    "motion": _measure_motion,
}
