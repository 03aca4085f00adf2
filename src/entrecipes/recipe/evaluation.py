"""`evaluation:` how a model is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from entrecipes.recipe.base import PositiveCount, Section, register, splits_revision, union
from entrecipes.recipe.masks import Task


@register("features", implementation="entrecipes.evaluation.features:efficientnet_lite0", paper="Tan & Le 2019")
class EfficientNetLite0Features(Section):
    """EfficientNet-Lite0 (ImageNet weights from a package, offline), 1280 features; not comparable with FID."""

    type: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    size: int = Field(112, gt=0)
    """Side that images are resized to (bicubic, antialiased)."""


@register("features", implementation="entrecipes.evaluation.features:inception", paper="Heusel et al. 2017 (FID)")
class InceptionFeatures(Section):
    """The FID network (torch-fidelity's Inception v3, 2048 features): needs `entrecipes[inception]` and its weights."""

    type: Literal["inception"] = "inception"
    weights: str | None = None
    """Path of the weights file; null: torch-fidelity downloads it."""


@register(
    "features",
    implementation="entrecipes.evaluation.features:transformers_vision",
    paper="Stein et al. 2023 (FD-DINOv2)",
)
class TransformersFeatures(Section):
    """Any transformers vision model (DINOv2, CLIP, ViT...) by Hub id or folder: its pooled output."""

    type: Literal["transformers"] = "transformers"
    id: str = "facebook/dinov2-large"
    """Hub id (with `@revision` if need be) or folder."""
    revision: str | None = None
    """Branch, tag or commit."""

    _split = splits_revision("id")


FeaturesSection = union("features")


@register("video_features", implementation="entrecipes.evaluation.video_features:frame_statistics")
class FrameStatistics(Section):
    """Mean and mean |temporal difference| of the frames' `features`: offline; not comparable with FVD."""

    type: Literal["frame_statistics"] = "frame_statistics"


@register(
    "video_features",
    implementation="entrecipes.evaluation.video_features:transformers_video",
    paper="Tong et al. 2022 (VideoMAE)",
)
class TransformersVideoFeatures(Section):
    """Any transformers video model (VideoMAE, TimeSformer, ViViT, V-JEPA 2) by Hub id or folder: mean of its tokens."""

    type: Literal["transformers_video"] = "transformers_video"
    id: str = "MCG-NJU/videomae-base"
    """Hub id (with `@revision` if need be) or folder."""
    revision: str | None = None
    """Branch, tag or commit."""

    _split = splits_revision("id")


@register(
    "video_features",
    implementation="entrecipes.evaluation.video_features:i3d",
    paper="Unterthiner et al. 2018 (FVD)",
)
class I3DFeatures(Section):
    """The network of the published FVD (I3D trained on Kinetics-400), from the usual TorchScript file."""

    type: Literal["i3d"] = "i3d"
    weights: str = "i3d_torchscript.pt"
    """Path of the TorchScript file."""


VideoFeaturesSection = union("video_features")


@register("text_features", implementation="entrecipes.evaluation.text_alignment:caption_alignment")
class CaptionAlignment(Section):
    """EfficientNet-Lite0 and MiniLM with two linear heads trained on the run's own captions (offline; no CLIP)."""

    type: Literal["caption_alignment"] = "caption_alignment"
    steps: int = Field(1500, ge=1)
    """Training steps of the heads, on training clips alone."""
    seed: int = Field(0, ge=0)
    """Seed of the heads and their batches."""


@register(
    "text_features",
    implementation="entrecipes.evaluation.text_alignment:transformers_clip",
    paper="Radford et al. 2021 (CLIP)",
)
class TransformersClip(Section):
    """Any CLIP-like transformers model by Hub id or folder: mean cosine of a clip's frames and its caption."""

    type: Literal["transformers_clip"] = "transformers_clip"
    id: str = "openai/clip-vit-base-patch32"
    """Hub id (with `@revision` if need be) or folder."""
    revision: str | None = None
    """Branch, tag or commit."""

    _split = splits_revision("id")


TextFeaturesSection = union("text_features")


class PoseDetection(Section):
    """The detector that finds the joints of generated people again; trained once on the real training frames, kept."""

    images: PositiveCount = 60_000
    """Frames that it is trained on, each as often as it is drawn."""
    seed: int = Field(0, ge=0)
    """Seed of its weights and draws."""


IMAGE_METRICS = ("fid", "kid", "precision_recall")
CLIP_METRICS = ("ssim", "psnr", "perceptual", *IMAGE_METRICS, "fvd", "pose", "motion")
STICKER_METRICS = (*IMAGE_METRICS, "fvd", "text", "consistency", "motion", "given")
METRICS = {
    "images": IMAGE_METRICS,
    "sequences": ("ngrams",),
    "clips": CLIP_METRICS,
    "stickers": STICKER_METRICS,
}
"""What is measured on each kind of data."""


@dataclass(frozen=True)
class OwnMetric:
    """A metric that a plugin adds; see [`own_metric`]."""

    measure: Callable[..., float | tuple[float, float]]
    of: Literal["samples", "features"]
    higher_is_better: bool


OWN_METRICS: dict[str, OwnMetric] = {}


def own_metric(
    name: str, *, kind: str = "images", of: Literal["samples", "features"] = "samples", higher_is_better: bool = False
) -> Callable[[Callable], Callable]:
    """Register the decorated function as a metric for `evaluation.metrics`.

    It is called as `function(real, fake, seed)` and returns a number, or a number and its spread. `real` and `fake` are
    on the CPU: samples as the data set holds them, uint8 [n, C, H, W] (clips and stickers [n, 3, F, H, W], in pairs;
    sequences [n, L]), or their features, float32 [n, D], from the recipe's extractor.

    Args:
        name: As the recipe says it; in reports the extractor and the number of samples are added.
        kind: What it is measured on: a key of [`METRICS`].
        of: `samples`, or (images alone) `features`.
        higher_is_better: Direction of improvement.

    Raises:
        ValueError: At import, when the name is taken or the kind unknown.
    """
    if kind not in METRICS or (of == "features" and kind != "images"):
        raise ValueError(f"metric '{name}': {of} of {kind} can't be measured; kinds are {', '.join(METRICS)}")
    if any(name in names for names in METRICS.values()):
        raise ValueError(f"metric '{name}' is registered twice")

    def add(measure: Callable) -> Callable:
        OWN_METRICS[name] = OwnMetric(measure, of, higher_is_better)
        METRICS[kind] += (name,)
        return measure

    return add


class HeldOut(Section):
    """The fixed bundle (same x0, noise and sigma every time) behind the error per noise level and the held-out nats."""

    images: PositiveCount = 256
    """Held-out images in the bundle (all of them when there are fewer)."""
    noise_levels: int = Field(32, ge=4)
    """Grid points over log sigma, each applied to every image of the bundle."""
    gate_pivot: float | None = Field(0.2, gt=0)
    """Sigma below which the gate sigma^3 / (sigma^3 + pivot^3) fades information out; pin it to compare."""
    seed: int = Field(0, ge=0)
    """Seed of the bundle's images and noise."""


class Evaluation(Section):
    """How the run is measured; every number carries its extractor, counts, split, sampler, steps and seed."""

    every: PositiveCount | None = None
    """Images between two measurements of the held-out nats (null: only at the end)."""
    held_out: HeldOut = HeldOut()
    """The fixed denoising bundle."""
    metrics: tuple[
        Literal[
            "fid",
            "kid",
            "precision_recall",
            "ngrams",
            "ssim",
            "psnr",
            "perceptual",
            "fvd",
            "pose",
            "motion",
            "text",
            "consistency",
            "given",
        ],
        ...,
    ] = ()
    """Sample-based metrics, measured at the end (and every `metrics_every` images): `ngrams` for sequences; `fid`,
    `kid` and `precision_recall` for images and the frames of clips; `fvd` and `motion` for clips and stickers; `text`
    (fit of clip and caption), `consistency` (of frames with the next) and `given` (how far given frames are kept) for
    stickers; the others for clips with poses."""
    metrics_every: PositiveCount | None = None
    """Images between two measurements of the sample-based metrics (null: only at the end)."""
    features: FeaturesSection = EfficientNetLite0Features()
    """The network whose features the sample-based metrics compare."""
    video_features: VideoFeaturesSection = FrameStatistics()
    """What `fvd` compares."""
    text_features: TextFeaturesSection = CaptionAlignment()
    """What judges how well a clip fits its caption (`text`)."""
    pose: PoseDetection = PoseDetection()
    """The detector behind the metric `pose`."""
    samples: PositiveCount = 1000
    """Images generated for the metrics; of clips at most as many as the reference has, one for each."""
    reference: Literal["train", "held_out"] = "train"
    """Real images to compare with; of clips their poses are also what is asked for, and the key must be set."""
    reference_samples: PositiveCount | None = None
    """Real images used (null: as many as generated, at most all)."""
    task: Task = "it2v"
    """Stickers: what is asked for when nats are measured and clips generated; given frames are those of real clips."""
    steps: int = Field(20, ge=1)
    """Denoising steps of each generated image."""
    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance scale; 1 is off."""
    frame_guidance_scale: float = Field(1.0, ge=0)
    """Stickers: guidance towards the given frames; 1 is off."""
    batch_size: PositiveCount = 250
    """Images generated or embedded at a time."""
    seed: int = Field(0, ge=0)
    """Seed of the generated images."""
    grid: int = Field(8, ge=1)
    """Rows of the sample grid (one column a class, at most 10)."""
