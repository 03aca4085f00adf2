"""How well clips fit their captions: networks that embed both, so that a clip and its caption lie near each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entrecipes.data.images import ImageSet
from entrecipes.data.places import atomic_folder, home
from entrecipes.data.text import TextEncoders
from entrecipes.errors import UserError
from entrecipes.evaluation.caption_heads import VERSION, Heads, ability, train_heads
from entrecipes.evaluation.features import FeatureExtractor, preprocess, weights_digest
from entrecipes.evaluation.metrics import Origin, embed
from entrecipes.evaluation.video_features import Frames
from entrecipes.fingerprint import fingerprint
from entrecipes.quiet import quieten_loading
from entrecipes.recipe.evaluation import CaptionAlignment, TransformersClip
from entrecipes.recipe.pipeline import TextEncoder

FRAMES_AT_A_TIME = 250
MOST_PAIRS = 4096
"""Training clips that are embedded, at most; drawn by the seed."""
MOST_JUDGED = 512
"""Held-out clips on which the judge's own retrieval is measured, at most."""
CLIPS_AT_A_TIME, CAPTIONS_AT_A_TIME = 32, 256
OFFLINE = "or use `evaluation.text_features.type: caption_alignment`, whose networks come in packages"
WORDS = TextEncoder(id="minilm", tokens=32)


class TextJudge:
    """Embeds clips and captions in one space.

    As with images, a number is only comparable with numbers from the same judge.

    Args:
        name: What it is, in words.
        tag: Short and safe for metric names.
        version: Packages, their versions, and a digest of the weights.
        about: What it was trained on and what it can do, for metrics' origins.
    """

    def __init__(self, *, name: str, tag: str, version: str, about: Origin) -> None:
        self.name, self.tag, self.version, self.about = name, tag, version, dict(about)

    def clips(self, clips: Tensor, frames: Frames) -> Tensor:
        """uint8 [N, 3, F, H, W] and the way to the features of their frames [N, F, D] -> float32 [N, d] on the CPU.

        Of unit length, or the mean of frames' vectors of unit length, so that products with captions are cosines.
        """
        raise NotImplementedError

    def captions(self, captions: Sequence[str]) -> Tensor:
        """N captions -> float32 [N, d] of unit length on the CPU."""
        raise NotImplementedError

    def score(self, clips: Tensor, captions: Sequence[str], frames: Frames) -> Tensor:
        """How well each clip fits its own caption: cosine [N] in [-1, 1]; see `clips`."""
        return (self.clips(clips, frames) * self.captions(captions)).sum(1)


def _sentences(captions: Sequence[str], encoders: TextEncoders, device: torch.device | str) -> Tensor:
    """Mean of each caption's token embeddings, without the padding: float32 [N, E] on the CPU."""
    numbers = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    tokens = encoders.encode(list(numbers), device).float()
    sentences = tokens.sum(1) / tokens.any(2).sum(1, keepdim=True).clamp(min=1)
    return sentences[[numbers[caption] for caption in captions]]


def _clip_features(images: ImageSet, features: FeatureExtractor) -> Tensor:
    """Mean features of each clip's frames, without its padding: float32 [N, D] on the CPU."""
    frames = images.tensor.shape[2]
    lengths = torch.full((len(images),), frames) if images.lengths is None else images.lengths
    counted = torch.arange(frames) < lengths[:, None]
    clips = images.tensor.transpose(1, 2)
    parts = zip(clips.split(CLIPS_AT_A_TIME), counted.split(CLIPS_AT_A_TIME), strict=True)
    found = embed((clips[use] for clips, use in parts), features, FRAMES_AT_A_TIME)
    owner = torch.arange(len(clips)).repeat_interleave(lengths)
    return torch.zeros(len(clips), found.shape[1]).index_add_(0, owner, found) / lengths[:, None]


class _Aligned(TextJudge):
    """The heads behind the networks that they were trained on."""

    def __init__(self, heads: Heads, encoders: TextEncoders, device: torch.device | str, **about: Any) -> None:
        super().__init__(**about)
        self.heads, self.encoders, self.device = heads, encoders, device

    @torch.no_grad()
    def clips(self, clips: Tensor, frames: Frames) -> Tensor:
        return self.heads.clip(frames().mean(1))

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        return self.heads.text(_sentences(captions, self.encoders, self.device))


def _pairs(images: ImageSet, most: int, seed: int) -> ImageSet:
    """At most that many of them, drawn by the seed, in memory."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[:most].sort().values).in_memory()


def caption_alignment(
    section: CaptionAlignment,
    *,
    features: FeatureExtractor,
    train: ImageSet,
    held_out: ImageSet | None,
    device: torch.device | str = "cpu",
) -> TextJudge:
    """Two linear heads over frozen networks, trained on the training set's own captions, or kept from another run.

    A clip is the mean of its frames' features, a caption the mean of its tokens in MiniLM. The heads know the training
    captions' world and nothing else, so that their cosines are no CLIP score; what they can do is in `about`, measured
    on the held-out clips: how often a clip's own caption is the best one, or among the ten best, of all of them.

    Args:
        section: How long they are trained at most, and their seed.
        features: Embeds frames.
        train: Captioned clips, `tensor` uint8 [N, 3, F, H, W].
        held_out: Clips on which they are judged; None: those that they were trained on, which is said.
        device: Where frames and captions are embedded; the heads are trained on the CPU.

    Raises:
        UserError: For clips without captions, or without the package with MiniLM.
    """
    floor = held_out if held_out is not None else train
    if train.captions is None or floor.captions is None:
        raise UserError(
            "evaluation.metrics: 'text' needs clips with captions; take data that have some, or leave it out"
        )
    try:
        encoders = TextEncoders.load([WORDS])
    except UserError as error:
        raise UserError(f"evaluation.text_features caption_alignment: {error}") from error
    train, floor = _pairs(train, MOST_PAIRS, section.seed), _pairs(floor, MOST_JUDGED, section.seed)
    data = (train.fingerprint, train.captions, floor.fingerprint, floor.captions)
    key = fingerprint(*data, section.model_dump(), features.name, features.version, encoders.fingerprint(), VERSION)
    folder = home() / "judges" / f"captions-{key[:16]}"
    if not folder.is_dir():
        clips, texts = _clip_features(train, features), _sentences(train.captions, encoders, device)
        heads, step = train_heads(clips, texts, train.captions, steps=section.steps, seed=section.seed)
        clips, texts = _clip_features(floor, features), _sentences(floor.captions, encoders, device)
        about = {
            "judge_data": train.fingerprint[:12],
            "judge_clips": len(train),
            "judge_step": step,
            "judge_seed": section.seed,
            "judge_split": "held_out" if held_out is not None else "train",
            **ability(heads, clips, texts, floor.captions),
        }
        with atomic_folder(folder, keep_existing=True) as scratch:
            save_file(heads.state_dict(), scratch / "model.safetensors", {"about": json.dumps(about)})
    with safe_open(folder / "model.safetensors", "pt") as file:
        heads = Heads.of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        about = json.loads(file.metadata()["about"])
    return _Aligned(
        heads,
        encoders,
        device,
        name=f"caption alignment (no CLIP): linear heads on {features.name} and MiniLM",
        tag=f"alignment_{features.tag}_minilm",
        version=f"{features.version}; heads {VERSION}, weights sha256 {weights_digest(heads)}",
        about=about,
    )


class _Clip(TextJudge):
    """Both halves of a CLIP-like network."""

    def __init__(self, network: nn.Module, processor: dict[str, Any], tokenizer: Any, **about: Any) -> None:
        super().__init__(about={}, **about)
        self.network, self.processor, self.tokenizer = network, processor, tokenizer

    @torch.inference_mode()
    def clips(self, clips: Tensor, frames: Frames) -> Tensor:
        device, found = self.network.device, []
        for part in clips.split(CLIPS_AT_A_TIME):
            pixels = preprocess(part.transpose(1, 2).flatten(0, 1).to(device), self.processor)
            vectors = _pooled(self.network.get_image_features(pixel_values=pixels))
            found.append(F.normalize(vectors, dim=1).unflatten(0, (len(part), -1)).mean(1).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        config = self.network.config
        longest = getattr(config, "text_config", config).max_position_embeddings
        found = []
        for start in range(0, len(captions), CAPTIONS_AT_A_TIME):
            part = list(captions[start : start + CAPTIONS_AT_A_TIME])
            # Padded to the end, as SigLIP was trained; CLIP does not look at the padding.
            words = self.tokenizer(
                part, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.network.device)
            found.append(F.normalize(_pooled(self.network.get_text_features(**words)), dim=1).float().cpu())
        return torch.cat(found)


def _pooled(output: Any) -> Tensor:
    """Of `get_image_features` and `get_text_features`, which give more or less by version of transformers."""
    return output if isinstance(output, Tensor) else output.pooler_output


def transformers_clip(
    section: TransformersClip,
    *,
    features: FeatureExtractor | None = None,
    train: ImageSet | None = None,
    held_out: ImageSet | None = None,
    device: torch.device | str = "cpu",
) -> TextJudge:
    """A CLIP-like model of transformers (CLIP, SigLIP, AltCLIP): mean cosine of a clip's frames and its caption.

    Raises:
        UserError: If the model can't be had or doesn't embed pictures and texts in one space.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    quieten_loading()
    place = f"evaluation.text_features.id '{section.id}'"
    try:
        network = AutoModel.from_pretrained(section.id, revision=section.revision, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(section.id, revision=section.revision).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(section.id, revision=section.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place}: can't be loaded ({reason}); check the id, give a folder with a saved model, {OFFLINE}"
        ) from error
    if not hasattr(network, "get_image_features") or not hasattr(network, "get_text_features"):
        raise UserError(f"{place}: {type(network).__name__} has no picture and text features; choose one such as CLIP")
    slug = Path(section.id).name.lower().replace("-", "_").replace(".", "_")
    revision = section.revision or getattr(network.config, "_commit_hash", None) or "local"
    network = network.requires_grad_(False).eval().to(device)
    return _Clip(
        network,
        processor,
        tokenizer,
        name=f"{section.id} (transformers), mean cosine of frames and caption",
        tag=slug,
        version=f"transformers {package_version('transformers')}, {Path(section.id).name} at {revision}, "
        f"weights sha256 {weights_digest(network)}",
    )
