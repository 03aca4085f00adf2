"""Generated stickers against real ones: as a set, by what moves, by their captions, and by the frames given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from entrecipes.errors import UserError
from entrecipes.evaluation.caption_heads import same
from entrecipes.evaluation.clips import (
    CLIP_MEASURES,
    PSNR_CAP,
    ClipSide,
    Pairs,
    check_metrics,
    decibels,
    frechet,
    sides,
)
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.generation import Shard
from entrecipes.evaluation.metrics import Origin
from entrecipes.evaluation.result import Metric, metric_name
from entrecipes.evaluation.text_alignment import TextJudge
from entrecipes.evaluation.video_features import VideoExtractor


@dataclass(frozen=True, kw_only=True)
class StickerPairs(Pairs):
    """Real stickers and those generated from the same captions and given frames."""

    captions: list[str] | None
    given: Tensor
    """bool [F]: which frames were given."""
    text: TextJudge | None


def compare_stickers(
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    real: Tensor,
    fake: Tensor,
    *,
    captions: list[str] | None,
    given: Tensor,
    video: VideoExtractor | None = None,
    text: TextJudge | None = None,
    batch_size: int = 250,
    seed: int = 0,
    origin: Origin | None = None,
    real_fingerprint: str | None = None,
    shard: Shard = Shard(),  # noqa: B008 (frozen)
) -> list[Metric]:
    """Measure generated stickers against the real ones whose captions and frames they were generated from.

    Args:
        metrics: Any of `fid`, `kid`, `precision_recall` (of the frames), `fvd` (which yields `fvd` and `kvd`),
            `motion`, `text`, `consistency`, `given`.
        extractor: Embeds frames.
        real: uint8 [N, 3, F, H, W].
        fake: The same shape; clip i was generated from the caption and the given frames of real clip i.
        captions: The text of each real clip; `text` needs them.
        given: bool [F], which frames were given, the same in all clips.
        video: Describes clips; `fvd` needs it.
        text: Says how well a clip fits a caption; `text` needs it.
        batch_size: Frames embedded at a time.
        seed: Of the kernel distances' subsets.
        origin: What the caller knows of the samples (split, sampler, steps, seed, ema).
        real_fingerprint: Identifies the real clips, down to their selection: what the networks see in them is then kept
            in memory as long as the extractor lives.
        shard: Processes that hold the same clips and look at a share each.

    Returns:
        Metrics in the order asked.

    Raises:
        UserError: For an unknown metric, clips that don't pair or are too few, a metric that lacks what it needs, or a
            number that isn't finite.
    """
    check_metrics(metrics, "stickers")
    both = sides(real, fake, extractor, video, batch_size, real_fingerprint, shard)
    about = {**(origin or {}), "samples": len(fake), "frames": fake.shape[2], "size": fake.shape[-1]}
    pairs = StickerPairs(*both, seed, about, captions=captions, given=given.bool().cpu(), text=text)
    return [metric for name in metrics for metric in _MEASURES[name](pairs)]


def _measure_fvd(pairs: StickerPairs) -> list[Metric]:
    """In its origin also what clips get that hold their first frame all the time: only below that is motion learned."""
    real = pairs.real
    held = _by_clip(real)[:, :1].expand(-1, real.clips.shape[2], -1).flatten(0, 1)
    still = real.clips[:, :, :1].expand_as(real.clips)
    side = ClipSide(still, real.extractor, real.video, real.batch_size, held, real.shard)
    distance, kernel = CLIP_MEASURES["fvd"](pairs)
    first = {"first_frame_held": round(frechet(real.descriptors, side.descriptors), 4)}
    return [replace(distance, origin=distance.origin | first), kernel]


def _measure_text(pairs: StickerPairs) -> list[Metric]:
    """Mean cosine of generated clips and their captions, beside the same of real clips and of others' captions."""
    judge, captions = pairs.text, pairs.captions
    if captions is None or judge is None:
        raise UserError(
            "evaluation.metrics: 'text' needs clips with captions; leave it out, or take data that have some"
        )
    texts = judge.captions(captions)
    fake, real = (side.each(judge.clips) @ texts.T for side in (pairs.fake, pairs.real))
    own = fake.diagonal()
    other = ~same(captions)
    about = {
        "judge": judge.name,
        "judge_version": judge.version,
        **judge.about,
        "real": round(real.diagonal().mean().item(), 4),
        "unit": "mean cosine; `real`: of the real clips; `mismatched`: of generated clips with captions of others",
    }
    if other.any():
        about["mismatched"] = round(fake[other].mean().item(), 4)
    return [pairs.metric("text", judge.tag, own, higher_is_better=True, **about)]


def _by_clip(side: ClipSide) -> Tensor:
    """Features of the frames [N, F, D]."""
    return side.features().unflatten(0, (len(side.clips), -1))


def _consistency(side: ClipSide) -> Tensor:
    """Mean cosine of the features of each frame and the next [N]."""
    features = F.normalize(_by_clip(side).double(), dim=2)
    return (features[:, 1:] * features[:, :-1]).sum(2).mean(1)


def _measure_consistency(pairs: StickerPairs) -> list[Metric]:
    """How far the generated clips' consistency is from the real ones': more isn't better, since still clips reach 1."""
    extractor, frames = pairs.fake.extractor, pairs.fake.clips.shape[2]
    if frames < 2:
        raise UserError("evaluation.metrics: 'consistency' needs clips of 2 frames or more; raise data.frames")
    real, fake = (_consistency(side).mean().item() for side in (pairs.real, pairs.fake))
    about = {
        **pairs.origin,
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "real": round(real, 5),
        "generated": round(fake, 5),
        "unit": "difference of the mean cosines of successive frames, generated less real, without its sign",
    }
    name = metric_name("consistency_gap", extractor.tag, len(pairs.fake.clips))
    return [Metric(name, abs(fake - real), None, about, higher_is_better=False)]


def _measure_given(pairs: StickerPairs) -> list[Metric]:
    """How far given frames are kept: their PSNR in the generated clips."""
    given, clips = pairs.given, pairs.fake.clips
    if given.shape != clips.shape[2:3] or not given.any():
        raise UserError(
            "evaluation.metrics: 'given' needs frames that are given; set evaluation.task to a task that gives some, "
            "such as it2v or interpolation, or leave it out"
        )
    fake, real = (side.clips[:, :, given].transpose(1, 2).flatten(0, 1).float() for side in (pairs.fake, pairs.real))
    values = decibels(fake, real).unflatten(0, (len(clips), -1)).mean(1)
    about = {"given_frames": int(given.sum()), "cap": PSNR_CAP, "unit": "dB"}
    return [pairs.metric("given_psnr", "", values, higher_is_better=True, **about)]


_MEASURES: dict[str, Callable[[StickerPairs], list[Metric]]] = {
    **{name: CLIP_MEASURES[name] for name in ("fid", "kid", "precision_recall", "motion")},
    "fvd": _measure_fvd,
    "text": _measure_text,
    "consistency": _measure_consistency,
    "given": _measure_given,
}
