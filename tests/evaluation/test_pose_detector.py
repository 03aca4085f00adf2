from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moving import figure_set

from entrecipes.data.skeleton import draw_poses
from entrecipes.errors import UserError
from entrecipes.evaluation.pose_detector import _prepared, _turned, frames_of, pose_detector, pose_errors, pose_metrics
from entrecipes.recipe.evaluation import PoseDetection

SECTION = PoseDetection(images=8000)


@pytest.fixture(scope="module")
def sets():
    return figure_set(200, 4), figure_set(40, 4, seed=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTRECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def detector(sets, home):
    return pose_detector(SECTION, *sets)


def values(detector, clips, keypoints):
    found = pose_metrics(detector, clips, keypoints, {"split": "held_out"})
    return {metric.name: metric.value for metric in found}


def test_it_finds_joints_of_clips_that_it_has_not_seen(detector, sets):
    _, held_out = sets
    found = pose_metrics(detector, frames_of(held_out), held_out.keypoints, {"split": "held_out"})
    error, correct, floor = found
    assert [metric.name for metric in found] == [
        "pose_error_heatmaps_40", "pose_pck10_heatmaps_40", "pose_error_real_heatmaps_40",
    ]  # fmt: skip
    assert error.value < 0.05 and correct.value > 0.9
    assert floor.value == pytest.approx(error.value, abs=1e-4) == error.origin["floor_error"]
    assert error.origin["floor_split"] == "held_out" and error.origin["floor_clips"] == 40
    assert error.origin["detector_seed"] == 0 and error.origin["visible_joints"] == 40 * 4 * 13
    assert correct.higher_is_better and not error.higher_is_better


def test_other_poses_and_noise_raise_the_error(detector, sets):
    _, held_out = sets
    clips, keypoints = frames_of(held_out), held_out.keypoints
    true = values(detector, clips, keypoints)["pose_error_heatmaps_40"]
    late = values(detector, clips.roll(1, dims=2), keypoints)["pose_error_heatmaps_40"]
    others = values(detector, clips.roll(1, dims=0), keypoints)["pose_error_heatmaps_40"]
    noise = torch.randint(0, 256, clips.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    nothing = values(detector, noise, keypoints)["pose_error_heatmaps_40"]
    assert true < late < others < nothing
    grainy = (clips.float() + 10 * torch.randn(clips.shape)).clamp(0, 255).to(torch.uint8)
    assert values(detector, grainy, keypoints)["pose_error_heatmaps_40"] < 2 * true


def test_it_is_trained_once_for_each_data_set_and_setting(detector, sets, monkeypatch):
    train, held_out = sets
    before = detector(frames_of(held_out)[:, :, 0])
    small = replace(train, tensor=train.tensor[:2], keypoints=train.keypoints[:2])
    with monkeypatch.context() as patch:
        patch.setattr("entrecipes.evaluation.pose_detector._trained", None)  # to train again would fail
        again = pose_detector(SECTION, *sets)
    assert torch.equal(again(frames_of(held_out)[:, :, 0]), before) and again.about == detector.about
    short = PoseDetection(images=64)
    first, second = (
        pose_detector(short, replace(small, fingerprint=name), held_out) for name in ("one name", "another")
    )
    assert first.about["detector_data"] != second.about["detector_data"]
    assert torch.equal(first(held_out.tensor[:4, :, 0]), second(held_out.tensor[:4, :, 0]))  # by its seed alone
    other = pose_detector(PoseDetection(images=64, seed=1), small, None)
    assert not torch.equal(first(held_out.tensor[:4, :, 0]), other(held_out.tensor[:4, :, 0]))
    assert other.about["floor_split"] == "train"


def test_larger_frames_are_found_in_the_same_units(detector, sets):
    clips = frames_of(sets[1])[:8, :, 0]
    larger = torch.nn.functional.interpolate(clips.float(), scale_factor=2, mode="bilinear").to(torch.uint8)
    assert detector(larger).shape == (8, 13, 2) and detector(larger).max() <= 1


def test_turned_frames_keep_their_joints():
    """A figure drawn from the turned joints lies where the turned frame shows it."""
    clips = figure_set(40, 2, size=64)
    frames, joints = _turned(_prepared(clips.tensor[:, :, 0]), clips.keypoints[:, 0], torch.Generator().manual_seed(0))
    drawn = torch.from_numpy(draw_poses(joints.numpy(), 64)).float()
    shown = ((frames + 1) * 127.5 - 40).clamp(min=0)
    assert torch.nn.functional.cosine_similarity(drawn.flatten(1), shown.flatten(1)).median() > 0.85
    untouched = torch.from_numpy(draw_poses(clips.keypoints[:, 0].numpy(), 64)).float()
    assert torch.nn.functional.cosine_similarity(untouched.flatten(1), shown.flatten(1)).median() < 0.6


def test_errors_are_in_extents_of_the_visible_figure():
    keypoints = torch.zeros(1, 2, 13, 3)
    keypoints[0, :, 0] = torch.tensor([0.5, 0.1, 1.0])
    keypoints[0, 0, 1] = torch.tensor([0.5, 0.9, 1.0])  # extent 0.8 in the first frame
    keypoints[0, 1, 1] = torch.tensor([0.6, 0.1, 1.0])
    keypoints[0, :, 2] = torch.tensor([0.0, 0.0, 0.2])  # not visible: counts for nothing
    keypoints[0, :, 3] = torch.tensor([0.5, 1.2, 1.0])  # outside the frame: nor does it
    detected = keypoints[..., :2].clone()
    detected[0, 0, 0, 0] += 0.08
    detected[0, 1, 1, 1] += 0.24
    detected[0, :, 3:] += 9
    error, correct = pose_errors(detected, keypoints)
    assert error.item() == pytest.approx((0.1 + 0.3) / 4) and correct.item() == pytest.approx(0.75)


def test_clips_without_keypoints_are_refused(sets):
    with pytest.raises(UserError, match="'pose' needs clips with keypoints"):
        pose_detector(SECTION, replace(sets[0], keypoints=None), None)
