from __future__ import annotations

import math

import pytest
import torch
from moving import figures
from torch import nn

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.stickers import compare_stickers
from entrecipes.evaluation.text_alignment import TextJudge
from entrecipes.evaluation.video_features import frame_statistics
from entrecipes.recipe.evaluation import STICKER_METRICS, FrameStatistics

FIRST = torch.tensor([True, False, False, False])
CAPTIONS = ["bright", "dark"] * 6


class Pooled(nn.Module):
    """Mean colours of four quarters of each picture; enough for exact numbers, and it has weights to be told by."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(12))

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) @ self.weight


class Brightness(TextJudge):
    """Clips and words on a circle: black is "dark", white is "bright", at a right angle."""

    def clips(self, clips, frames):
        angle = clips.float().mean((1, 2, 3, 4)) / 255 * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], 1)

    def captions(self, captions):
        return torch.tensor([[1.0, 0.0] if caption == "dark" else [0.0, 1.0] for caption in captions])


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(Pooled(), name="colours", tag="colours", version="1", num_features=12)


@pytest.fixture(scope="module")
def real():
    return figures(12, 4)[0]


@pytest.fixture(scope="module")
def measure(extractor, real):
    video = frame_statistics(FrameStatistics(), features=extractor)
    judge = Brightness(name="brightness", tag="brightness", version="1", about={"judge_r1": 1.0})

    def measured(fake, metrics=STICKER_METRICS, real=real, captions=CAPTIONS, given=FIRST):
        found = compare_stickers(
            metrics, extractor, real, fake, captions=captions, given=given, video=video, text=judge,
            origin={"split": "held_out"}, real_fingerprint=None,
        )  # fmt: skip
        return {metric.name: metric for metric in found}

    return measured


def test_equal_clips_are_at_no_distance(measure, real):
    found = measure(real)
    assert list(found) == [
        "fid_frames_colours_48", "kid_frames_colours_48", "precision_frames_colours_48", "recall_frames_colours_48",
        "fvd_framestats_colours_12", "kvd_framestats_colours_12", "text_brightness_12", "consistency_gap_colours_12",
        "motion_gap_12", "given_psnr_12",
    ]  # fmt: skip
    assert found["given_psnr_12"].value == 100 and found["given_psnr_12"].spread == 0
    assert found["consistency_gap_colours_12"].value == 0 == found["motion_gap_12"].value
    assert found["fvd_framestats_colours_12"].value == pytest.approx(0, abs=1e-6)
    assert found["text_brightness_12"].value == pytest.approx(found["text_brightness_12"].origin["real"], abs=1e-4)
    for metric in found.values():
        assert metric.origin["split"] == "held_out" and metric.origin["frames"] == 4 and metric.origin["size"] == 24
    assert {name for name, metric in found.items() if metric.higher_is_better} == {
        "precision_frames_colours_48", "recall_frames_colours_48", "text_brightness_12", "given_psnr_12",
    }  # fmt: skip


def test_only_given_frames_count_as_given(measure, real):
    """One pixel value of 24 x 24 x 3 in a given frame is wrong by 255 in six of twelve clips."""
    fake = real.clone()
    fake[:, :, 1:] = 0
    assert measure(fake, ("given",))["given_psnr_12"].value == 100
    fake[::2, 0, 0, 5, 5] = 255 * (real[::2, 0, 0, 5, 5] < 128).to(torch.uint8)
    wrong = (fake[::2, 0, 0, 5, 5].double() - real[::2, 0, 0, 5, 5].double()).square() / (24 * 24 * 3)
    expected = (10 * torch.log10(255**2 / wrong)).sum() / 12 + 50
    found = measure(fake, ("given",))["given_psnr_12"]
    assert found.value == pytest.approx(expected.item(), rel=1e-5)
    assert found.origin["given_frames"] == 1 and found.origin["cap"] == 100
    both = measure(fake, ("given",), given=torch.tensor([True, False, False, True]))["given_psnr_12"]
    assert both.value < found.value and both.origin["given_frames"] == 2


def test_still_clips_are_as_far_from_consistent_as_the_real_ones_move(measure, extractor):
    """Frames turn by a known angle between two colours: the mean cosine of successive frames is that of the angle."""
    angles = torch.linspace(0, math.pi / 2, 4)
    colours = torch.stack([angles.cos(), angles.sin(), torch.zeros(4)]) * 255
    real = colours.round().to(torch.uint8)[None, :, :, None, None].expand(6, 3, 4, 8, 8).contiguous()
    still = real[:, :, :1].expand_as(real).contiguous()
    found = measure(still, ("consistency",), real)["consistency_gap_colours_6"]
    assert found.origin["generated"] == 1 and found.origin["real"] == pytest.approx(math.cos(math.pi / 6), abs=2e-3)
    assert found.value == pytest.approx(1 - math.cos(math.pi / 6), abs=2e-3) and not found.higher_is_better
    flicker = real[:, :, [0, 3, 0, 3]]
    assert measure(flicker, ("consistency",), real)["consistency_gap_colours_6"].value > found.value


def test_a_clip_is_scored_by_its_own_caption_beside_the_real_one_and_those_of_others(measure, real):
    grey = torch.tensor([255, 0] * 6, dtype=torch.uint8).view(12, 1, 1, 1, 1)
    fits = measure(grey.expand_as(real).contiguous(), ("text",))["text_brightness_12"]
    assert fits.value == pytest.approx(1, abs=1e-6) and fits.spread == pytest.approx(0, abs=1e-6)
    assert fits.origin["mismatched"] == pytest.approx(0, abs=1e-6) and fits.origin["judge_r1"] == 1
    swapped = measure((255 - grey).expand_as(real).contiguous(), ("text",))["text_brightness_12"]
    assert swapped.value == pytest.approx(0, abs=1e-6) and swapped.origin["mismatched"] == pytest.approx(1, abs=1e-6)
    assert swapped.origin["real"] == fits.origin["real"] > 0 and swapped.origin["judge"] == "brightness"
    assert "mismatched" not in measure(real, ("text",), captions=["dark"] * 12)["text_brightness_12"].origin


def test_what_is_missing_is_said(measure, real):
    with pytest.raises(UserError, match="'text' needs clips with captions"):
        measure(real, ("text",), captions=None)
    with pytest.raises(UserError, match="set evaluation.task"):
        measure(real, ("given",), given=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(UserError, match="there is no 'ssim' of stickers"):
        measure(real, ("ssim",))
    with pytest.raises(UserError, match="at least 4 pairs"):
        measure(real[:3], ("motion",), real[:3])
    with pytest.raises(UserError, match="2 frames or more"):
        measure(real[:, :, :1], ("consistency",), real[:, :, :1])


def test_a_distance_tells_what_held_first_frames_would_get(measure, real):
    held = real[:, :, :1].expand_as(real).contiguous()
    found = measure(held, ["fvd"])["fvd_framestats_colours_12"]
    assert found.value > 0 and found.origin["first_frame_held"] == pytest.approx(found.value, abs=1e-3)
