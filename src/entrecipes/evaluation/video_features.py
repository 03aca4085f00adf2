"""Descriptors of whole clips, for distances between sets of clips: uint8 clips in, one vector a clip out.

As with images, a number is only comparable with numbers from the same extractor, whose `tag` is in the metric's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor, preprocess, weights_digest
from entrecipes.recipe.evaluation import FrameStatistics, I3DFeatures, TransformersVideoFeatures

OFFLINE = "or use `evaluation.video_features.type: frame_statistics`, which needs no weights of its own"
MOTION_WEIGHT = 4.0
CLIPS_AT_A_TIME = 8
I3D_SIZE = 224

Frames = Callable[[], Tensor]
"""Gives the features [N, F, D] of the clips' frames; called only where they are used."""


class VideoExtractor:
    """Descriptors of clips.

    Args:
        name: What it is, in words.
        tag: Short and safe for metric names, such as `framestats_efflite0`.
        version: Packages, their versions, and a digest of the weights.
    """

    def __init__(self, *, name: str, tag: str, version: str) -> None:
        self.name, self.tag, self.version = name, tag, version

    def __call__(self, clips: Tensor, frames: Frames) -> Tensor:
        """uint8 clips [N, 3, F, H, W] on the CPU, and the way to their frame features -> float32 [N, D] on the CPU.

        Raises:
            UserError: When the network can't take such clips.
        """
        raise NotImplementedError


class _FrameStatistics(VideoExtractor):
    def __call__(self, clips: Tensor, frames: Frames) -> Tensor:
        features = frames()
        if features.shape[1] < 2:
            raise UserError("evaluation.video_features: a single frame has no motion; set data.frames to 2 or more")
        return torch.cat([features.mean(1), MOTION_WEIGHT * features.diff(dim=1).abs().mean(1)], dim=1)


def frame_statistics(
    section: FrameStatistics, *, features: FeatureExtractor, device: torch.device | str = "cpu"
) -> VideoExtractor:
    """Of the features of a clip's frames: their mean, and 4 times their mean absolute difference from frame to frame.

    The second half sees motion: frames in a wrong order raise it. A clip played backwards looks the same.

    Args:
        features: Embeds the frames.
    """
    return _FrameStatistics(
        name=f"mean, and {MOTION_WEIGHT:g} x mean |temporal difference|, of the frames' features of {features.name}",
        tag=f"framestats_{features.tag}",
        version=features.version,
    )


class _Network(VideoExtractor):
    """A network that takes prepared clips, a few at a time."""

    def __init__(self, network: nn.Module, prepare: Callable[[Tensor], Tensor], device: Any, **about: str) -> None:
        super().__init__(**about)
        self.network, self.prepare, self.device = network.eval().to(device), prepare, device

    @torch.inference_mode()
    def __call__(self, clips: Tensor, frames: Frames) -> Tensor:
        found = []
        for part in clips.split(CLIPS_AT_A_TIME):
            try:
                found.append(self._describe(self.prepare(part.to(self.device))).float().cpu())
            except Exception as error:  # whatever a network of the user's raises
                reason = str(error).strip().splitlines()[-1]
                raise UserError(
                    f"evaluation.video_features: {self.name} fails on clips of {clips.shape[2]} frames ({reason}); it "
                    f"may need more frames, {OFFLINE}"
                ) from error
        return torch.cat(found)

    def _describe(self, prepared: Tensor) -> Tensor:
        raise NotImplementedError


def _by_frame(clips: Tensor) -> Tensor:
    """[n, C, F, H, W] -> [n * F, C, H, W]."""
    return clips.transpose(1, 2).flatten(0, 1)


class _I3D(_Network):
    def _describe(self, prepared: Tensor) -> Tensor:
        return self.network(prepared, rescale=False, resize=False, return_features=True)


def _prepare_i3d(clips: Tensor) -> Tensor:
    """uint8 [n, 3, F, H, W] -> float [n, 3, F, 224, 224] in [-1, 1], bilinear."""
    frames = F.interpolate(_by_frame(clips).float(), size=(I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
    return (frames / 127.5 - 1).unflatten(0, (len(clips), -1)).transpose(1, 2)


def i3d(
    section: I3DFeatures, *, features: FeatureExtractor | None = None, device: torch.device | str = "cpu"
) -> VideoExtractor:
    """The published FVD's network (Unterthiner et al. 2018): the 400 outputs before the softmax of a TorchScript I3D.

    The file is the one that most FVD code loads, `i3d_torchscript.pt`, called as
    `network(clips in [-1, 1], rescale=False, resize=False, return_features=True)`. Frames are resized to 224 px first.

    Raises:
        UserError: When the file is missing or is no TorchScript.
    """
    path = Path(section.weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"evaluation.video_features.weights: there is no file '{path}'; save i3d_torchscript.pt there, {OFFLINE}"
        )
    try:
        network = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise UserError(
            f"evaluation.video_features.weights: '{path}' is no TorchScript file; download it again, {OFFLINE}"
        ) from error
    with path.open("rb") as file:
        version = f"{path.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    return _I3D(network, _prepare_i3d, device, name=f"I3D ({path.name})", tag="i3d", version=version)


class _TransformersVideo(_Network):
    def _describe(self, prepared: Tensor) -> Tensor:
        output = self.network(**{self.network.main_input_name: prepared})
        return output.last_hidden_state.mean(1)


def _in_pixels(processor: dict[str, Any]) -> dict[str, Any]:
    """Sizes of old configurations are bare numbers."""
    size, crop = processor.get("size"), processor.get("crop_size")
    return processor | {
        "size": {"shortest_edge": size} if isinstance(size, int) else size,
        "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
    }


def _processor(section: TransformersVideoFeatures) -> dict[str, Any]:
    """The configuration of the model's processor; the processors themselves need torchvision.

    Raises:
        OSError: When the model has none.
    """
    from transformers import ImageProcessingMixin

    try:
        return _in_pixels(ImageProcessingMixin.get_image_processor_dict(section.id, revision=section.revision)[0])
    except OSError:
        return _in_pixels(
            ImageProcessingMixin.get_image_processor_dict(
                section.id, revision=section.revision, image_processor_filename="video_preprocessor_config.json"
            )[0]
        )


def transformers_video(
    section: TransformersVideoFeatures,
    *,
    features: FeatureExtractor | None = None,
    device: torch.device | str = "cpu",
) -> VideoExtractor:
    """A transformers video model: the mean of its last hidden states over all tokens.

    A clip of another length than the model wants is resampled in time: frames are repeated or left out, evenly.

    Raises:
        UserError: If the model can't be had or takes no clips.
    """
    from transformers import AutoModel

    place = f"evaluation.video_features.id '{section.id}'"
    try:
        network = AutoModel.from_pretrained(section.id, revision=section.revision, dtype=torch.float32)
        processor = _processor(section)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{place}: can't be loaded ({reason}); check the id, give a folder with a saved model, {OFFLINE}"
        ) from error
    wanted = getattr(network.config, "num_frames", None) or getattr(network.config, "frames_per_clip", None)
    if not wanted or not network.main_input_name.startswith("pixel_values"):
        raise UserError(f"{place}: {type(network).__name__} takes no clips; choose a video model such as VideoMAE")

    def prepare(clips: Tensor) -> Tensor:
        frames = torch.linspace(0, clips.shape[2] - 1, wanted).round().long()
        return preprocess(_by_frame(clips[:, :, frames]), processor).unflatten(0, (len(clips), wanted))

    slug = Path(section.id).name.lower().replace("-", "_").replace(".", "_")
    revision = section.revision or getattr(network.config, "_commit_hash", None) or "local"
    version = (
        f"transformers {package_version('transformers')}, {Path(section.id).name} at {revision}, "
        f"weights sha256 {weights_digest(network)}"
    )
    return _TransformersVideo(
        network, prepare, device, name=f"{section.id} (transformers), {wanted} frames", tag=slug, version=version
    )
