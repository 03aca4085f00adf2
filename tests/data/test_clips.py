"""Clips: cut, judged, split by video, with a reference image from elsewhere in the video."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from entrecipes.data.clips import Video, Videos, cut
from entrecipes.data.images import Splits
from entrecipes.data.skeleton import draw_poses
from entrecipes.errors import UserError
from entrecipes.recipe.data import ClipsData

SIZE = 16


def video(name: str, number: int, length: int = 40, gap: int | None = None) -> Video:
    """A bar that moves; pixel (0, 0) says which frame, pixel (0, 1) which video. `gap`: that frame is not there."""
    frames = np.zeros((length, 3, SIZE, SIZE), np.uint8)
    for t in range(length):
        frames[t, :, 4:8, t % SIZE] = 255
        frames[t, :, 0, 0], frames[t, :, 0, 1] = t, number
    random = np.random.default_rng(number)
    keypoints = np.concatenate([random.random((length, 13, 2)), np.ones((length, 13, 1))], axis=2).astype(np.float32)
    kept = np.delete(np.arange(length), [] if gap is None else [gap])
    return Video(name, frames[kept], kept, keypoints[kept])


def videos(*given: Video) -> Videos:
    return Videos("test", "Moving bars.", "none", "the test set", list(given), tuple(one.name for one in given))


def section(**keys: object) -> ClipsData:
    return ClipsData(**{"image_size": SIZE, "frames": 4, "clip_step": 4, "held_out": 0.3} | keys)


def owners(splits: Splits) -> tuple[set[int], set[int]]:
    """Which videos are on each side."""
    return tuple(set(part.tensor[:, 0, 0, 0, 1].tolist()) for part in (splits.train, splits.held_out))


TEN = videos(*(video(f"{'walk' if i < 5 else 'run'}/view{i % 5}", i) for i in range(10)))


def test_a_clip_holds_frames_pose_maps_and_a_reference() -> None:
    train = cut(videos(video("a", 7)), section(held_out=0)).train
    assert train.tensor.shape == (9, 3, 9, SIZE, SIZE) and train.tensor.dtype.is_floating_point is False
    assert train.tensor[:, 0, :4, 0, 0].tolist() == [[s, s + 2, s + 4, s + 6] for s in range(0, 36, 4)][:9]
    for clip, keypoints in zip(train.tensor.numpy(), train.keypoints.numpy(), strict=True):
        assert np.array_equal(clip[:, 4:8].transpose(1, 0, 2, 3), draw_poses(keypoints, SIZE))
        first, last, reference = clip[0, 0, 0, 0], clip[0, 3, 0, 0], clip[0, 8, 0, 0]
        assert reference < first or reference > last
    part = train.subset([8, 2])
    assert np.array_equal(part.keypoints[1], train.keypoints[2]) and part.fingerprint != train.fingerprint


def test_the_reference_comes_from_the_clip_only_where_nothing_else_is() -> None:
    short = cut(videos(video("a", 1, length=7)), section(held_out=0)).train.tensor
    assert short.shape[0] == 1 and short[0, 0, 8, 0, 0] in short[0, 0, :4, 0, 0]
    first = cut(videos(video("a", 1)), section(held_out=0, reference="first")).train.tensor
    assert np.array_equal(first[:, :, 0], first[:, :, 8])
    drawn, again, other = (
        cut(videos(video("a", 1)), section(held_out=0, split_seed=s)).train.tensor[:, 0, 8, 0, 0].tolist()
        for s in (0, 0, 1)
    )
    assert drawn == again != other


def test_a_video_is_never_on_both_sides() -> None:
    for seed in range(6):
        train, held_out = owners(cut(TEN, section(split_seed=seed)))
        assert not train & held_out and len(train | held_out) == 10 and len(held_out) == 3
    views = videos(*(replace(one, group=one.name.split("/")[0]) for one in TEN.videos))
    for seed in range(6):
        assert owners(cut(views, section(split_seed=seed)))[1] in ({0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}), "a whole motion"
    train, held_out = owners(cut(TEN, section(max_images=20)))
    assert not train & held_out
    whole = cut(TEN, section(max_images=20))
    assert len(whole.train) + len(whole.held_out) == 20


def test_videos_are_held_out_by_name() -> None:
    assert owners(cut(TEN, section(held_out_videos=("*/view4", "run/view0")))) == ({0, 1, 2, 3, 6, 7, 8}, {4, 5, 9})
    assert owners(cut(TEN, section(videos=("walk/*",), held_out_videos=("run/view[12]",)))) == (set(range(5)), {6, 7})
    with pytest.raises(UserError, match="held_out_videos: .* no video called 'wak/view0'; did you mean 'walk/view0'"):
        cut(TEN, section(held_out_videos=("wak/view0",)))
    with pytest.raises(UserError, match="no clip left to train on"):
        cut(TEN, section(held_out_videos=("*",)))


def test_no_clip_runs_across_a_gap() -> None:
    train = cut(videos(video("a", 1, length=24, gap=10)), section(held_out=0, clip_step=1)).train
    starts = train.tensor[:, 0, 0, 0, 0].tolist()
    assert starts == [*range(4), *range(11, 18)]


def test_bad_clips_are_named_and_counted() -> None:
    still, hidden, short = video("still", 1), video("hidden", 2), video("short", 3, length=6)
    still.frames[12:] = still.frames[12]
    hidden.keypoints[8:10, :, 2] = 0.2
    hidden.keypoints[30, :, 2] = np.nan
    whole = videos(video("good", 0), still, hidden, short)
    train = cut(whole, section(held_out=0)).train
    reasons = "\n".join(train.bad_images)
    assert "short frames 0 to 5 (too short: 6 frames, a clip spans 7)" in reasons
    assert "hidden frames 4 to 10 (no pose in 1 of 4 frames)" in reasons
    assert "hidden frames 24 to 30 (no pose in 1 of 4 frames)" in reasons
    assert "still frames 12 to 18 (still: it changes by 0 grey levels a frame)" in reasons
    found = [sum(name in entry for entry in train.bad_images) for name in ("good", "still", "hidden", "short")]
    assert found == [0, 6, 4, 1] and len(train) == 3 * 9 - sum(found[:3])
    assert train.tensor[train.tensor[:, 0, 0, 0, 1] == 2][:, 0, 0, 0, 0].tolist() == [0, 12, 16, 20, 32]
    with pytest.raises(UserError, match=r"more bad clips than data.max_bad_clips \(10\) allows"):
        cut(whole, section(held_out=0, max_bad_clips=10))
    assert len(cut(whole, section(held_out=0, max_bad_clips=11)).train) == len(train)
    everything = cut(whole, section(held_out=0, min_motion=0, min_visibility=0)).train
    assert len(everything.bad_images) == 1 and len(everything) == 27


def test_nothing_good_is_refused() -> None:
    with pytest.raises(UserError, match="no clip of 30 frames can be cut"):
        cut(videos(video("a", 0)), section(frames=30))
