from __future__ import annotations

import json

import pytest
import torch
from moving import figures
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import FrameStatistics, I3DFeatures, TransformersVideoFeatures


def never() -> Tensor:
    raise AssertionError("a network of its own needs no frame features")


class Brightness(FeatureExtractor):
    """The mean of each colour, through a fixed layer."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), name="brightness", tag="brightness", version="1", num_features=4)


def test_frame_statistics_are_the_mean_and_four_times_the_motion():
    extractor = build("video_features", FrameStatistics(), features=Brightness(), device="cpu")
    features = torch.tensor([[[0.0, 2.0], [1.0, 2.0], [3.0, -2.0]]])
    found = extractor(torch.zeros(1, 3, 3, 4, 4, dtype=torch.uint8), lambda: features)
    assert torch.allclose(found, torch.tensor([[4 / 3, 2 / 3, 4 * 1.5, 4 * 2.0]]))
    assert extractor.tag == "framestats_brightness"
    with pytest.raises(UserError, match="a single frame has no motion"):
        extractor(torch.zeros(1, 3, 1, 4, 4, dtype=torch.uint8), lambda: features[:, :1])


class TinyI3D(nn.Module):
    """Called as the I3D file is, with a layer in time that needs five frames."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(3, 6, (5, 32, 32), (1, 32, 32))

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224
        assert x.min() >= -1 and x.max() <= 1 and x.min() < 0
        return self.layer(x).mean((2, 3, 4))


def test_a_scripted_i3d_is_called_as_the_published_one(tmp_path):
    torch.manual_seed(0)
    network = TinyI3D()
    torch.jit.script(network).save(str(tmp_path / "i3d_torchscript.pt"))
    extractor = build("video_features", I3DFeatures(weights=str(tmp_path / "i3d_torchscript.pt")), device="cpu")
    clips = figures(10, 6)[0]
    found = extractor(clips, never)
    assert found.shape == (10, 6) and extractor.tag == "i3d" and "sha256" in extractor.version
    large = torch.nn.functional.interpolate(clips[9].float().movedim(1, 0), size=(224, 224), mode="bilinear")
    with torch.inference_mode():
        expected = network((large / 127.5 - 1).movedim(0, 1)[None], False, False, True)
    assert torch.allclose(found[9:], expected, atol=1e-5)
    with pytest.raises(UserError, match="fails on clips of 4 frames.*may need more frames.*frame_statistics"):
        extractor(clips[:, :, :4], never)


def test_i3d_without_a_fit_file_names_it(tmp_path):
    with pytest.raises(UserError, match=r"there is no file '.*absent.pt'; save i3d_torchscript.pt there.*frame_stat"):
        build("video_features", I3DFeatures(weights=str(tmp_path / "absent.pt")), device="cpu")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="text.pt' is no TorchScript file"):
        build("video_features", I3DFeatures(weights=str(tmp_path / "text.pt")), device="cpu")


@pytest.fixture(scope="module")
def videomae_folder(tmp_path_factory):
    from transformers import VideoMAEConfig, VideoMAEModel

    folder = tmp_path_factory.mktemp("tiny") / "Tiny-VideoMAE"
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    VideoMAEModel(config).save_pretrained(folder)
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    processor |= {"resample": 2, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_transformers_video_model_gives_the_mean_of_its_tokens(videomae_folder):
    from transformers import VideoMAEModel

    extractor = build("video_features", TransformersVideoFeatures(id=str(videomae_folder)), device="cpu")
    clips = figures(9, 4, size=32)[0]
    found = extractor(clips, never)
    assert found.shape == (9, 16) and extractor.tag == "tiny_videomae" and "8 frames" in extractor.name
    doubled = clips[8:, :, [0, 0, 1, 1, 2, 2, 3, 3]].transpose(1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (doubled - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.inference_mode():
        expected = VideoMAEModel.from_pretrained(videomae_folder).eval()(pixels).last_hidden_state.mean(1)
    assert torch.allclose(found[8:], expected, atol=1e-5)


def test_sizes_of_old_and_of_video_processors_are_understood(videomae_folder, tmp_path):
    import shutil

    first = build("video_features", TransformersVideoFeatures(id=str(videomae_folder)), device="cpu")
    folder = tmp_path / videomae_folder.name
    shutil.copytree(videomae_folder, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text()) | {"size": 32, "crop_size": 32}
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").write_text(json.dumps(processor))
    second = build("video_features", TransformersVideoFeatures(id=str(folder)), device="cpu")
    clips = figures(4, 4)[0]
    assert torch.equal(first(clips, never), second(clips, never))


def test_models_that_see_no_clips_are_refused(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="Dinov2Model takes no clips; choose a video model"):
        build("video_features", TransformersVideoFeatures(id=str(tmp_path)), device="cpu")
    with pytest.raises(UserError, match="no-such-model.*frame_statistics"):
        build("video_features", TransformersVideoFeatures(id="no-such-folder/no-such-model"), device="cpu")
