"""RDTF's dual masks against masks written by hand, for every task and every length."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.path import GaussianPath
from entrecipes.errors import UserError
from entrecipes.recipe.base import build
from entrecipes.recipe.masks import TASKS, DualMasksSection, NoMasksSection, follows_text
from entrecipes.recipe.pipeline import Objective as ObjectiveSection
from entrecipes.samples.masks import EVERYTHING, BatchRandom, DualMasks, WholeSamples, draw_frames, made_share
from entrecipes.training.randomness import StepRandom

F = 8
# all masks that may be given to a clip of n frames, each as often as it stands here, written by hand
ONE = {
    1: "1",
    2: "10 01",
    3: "100 010 001",
    4: "1000 0100 0010 0001",
    5: "10000 01000 00100 00010 00001",
    6: "100000 010000 001000 000100 000010 000001",
    7: "1000000 0100000 0010000 0001000 0000100 0000010 0000001",
    8: "10000000 01000000 00100000 00010000 00001000 00000100 00000010 00000001",
}
NONE = {n: "0" * n for n in range(1, 9)}
ALLOWED = {
    "i2v": ONE,
    "it2v": ONE,
    "t2v": NONE,
    "uncond": NONE,
    "interpolation": {
        1: "0",
        2: "10 01 10",
        3: "101 010 100",
        4: "1010 0101 1001",
        5: "10101 01010 10010",
        6: "101010 010101 100100",
        7: "1010101 0101010 1001001",
        8: "10101010 01010101 10010010",
    },
    "pre_frame_prediction": {
        1: "0",
        2: "01 00",
        3: "011 001",
        4: "0111 0011 0001",
        5: "01111 00111 00011",
        6: "011111 001111 000111 000011",
        7: "0111111 0011111 0001111 0000111",
        8: "01111111 00111111 00011111 00001111 00000111",
    },
    "post_frame_prediction": {
        1: "0",
        2: "10",
        3: "100 110",
        4: "1100 1110",
        5: "11000 11100 11110",
        6: "111000 111100 111110",
        7: "1110000 1111000 1111100 1111110",
        8: "11110000 11111000 11111100 11111110",
    },
}


def masks(**keys) -> DualMasks:
    return DualMasks(DualMasksSection(**{"tasks": TASKS, "uncond": 0, "lengths": (F, F)} | keys), F)


def only(task: str, n: int) -> torch.Tensor:
    """Odds of one task for n samples."""
    return torch.nn.functional.one_hot(torch.tensor(TASKS.index(task)), len(TASKS)).float().expand(n, -1)


def draw(dual: DualMasks, lengths, task: str | None = None, seed: int = 0):
    lengths = torch.as_tensor(lengths)
    random = BatchRandom(len(lengths), generator=torch.Generator().manual_seed(seed))
    return dual.draw(lengths, None if task is None else only(task, len(lengths)), random)


def written(row: torch.Tensor) -> str:
    return "".join(str(int(frame)) for frame in row)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n", range(1, 9))
def test_what_is_given_is_allowed_and_every_choice_is_as_likely(task, n):
    frames = draw(masks(), [n] * 3000, task)
    assert (frames.task == TASKS.index(task)).all() and (frames.text == follows_text(task)).all()
    assert torch.equal(frames.valid, (torch.arange(F) < n).expand(3000, -1))
    found, times = frames.given.unique(dim=0, return_counts=True)
    found, allowed = [written(row) for row in found], [mask + "0" * (F - n) for mask in ALLOWED[task][n].split()]
    assert set(found) == set(allowed)
    for mask, count in zip(found, times.tolist(), strict=True):
        share = allowed.count(mask) / len(allowed)
        assert abs(count - 3000 * share) <= 4.5 * (3000 * share * (1 - share)) ** 0.5


def test_the_mean_share_to_be_made_is_that_of_the_masks_written_by_hand():
    shares = made_share(F)
    for column, task in enumerate(TASKS):
        for n in range(1, 9):
            wanted = np.mean([mask.count("0") / n for mask in ALLOWED[task][n].split()])
            assert shares[n, column].item() == pytest.approx(wanted)


def test_other_numbers_of_frames_follow_the_same_rules():
    dual = DualMasks(DualMasksSection(tasks=TASKS, uncond=0, lengths=(12, 12)), 12)
    random = BatchRandom(2000, generator=torch.Generator().manual_seed(0))
    for task, wanted in {
        "interpolation": {"101010101010", "010101010101", "100100100100"},
        "pre_frame_prediction": {"0" * s + "1" * (12 - s) for s in (1, 2, 3, 4, 5, 6, 7)},
        "post_frame_prediction": {"1" * e + "0" * (12 - e) for e in (6, 7, 8, 9, 10, 11)},
    }.items():
        found = dual.draw(None, only(task, 2000), random).given.unique(dim=0)
        assert {written(row) for row in found} == wanted
    stills = DualMasks(DualMasksSection(lengths=(1, 1)), 1).draw(None, None, random)
    assert stills.valid.all() and 0 < stills.given.sum() < 2000


def test_frames_are_spread_evenly_over_the_clip():
    for length in range(1, 9):
        for count in range(1, 9):
            shown = min(count, length)
            frames = draw(masks(lengths=(count, count)), [length] * 2)
            assert (frames.valid.sum(1) == shown).all()
            assert (frames.places[:, :shown].numpy() == np.round(np.linspace(0, length - 1, shown))).all()
            assert frames.places.max() < length


def test_a_clip_is_shown_in_as_many_frames_as_the_range_says():
    valid = draw(masks(lengths=(3, 8)), [8] * 6000 + [4] * 6000 + [1] * 10).valid.sum(1)
    times = torch.bincount(valid[:6000], minlength=9)
    assert times[:3].sum() == 0 and ((times[3:] - 1000).abs() < 130).all()
    short = torch.bincount(valid[6000:12000], minlength=5)
    assert short[3] + short[4] == 6000 and abs(short[3] - 1000) < 130
    assert (valid[12000:] == 1).all()


def test_tasks_are_drawn_by_their_odds_and_a_share_is_given_nothing():
    dual = masks(tasks=("interpolation", "t2v", "i2v"), uncond=0.1)
    odds = torch.tensor([[1.0, 0.0, 3.0]]).expand(20_000, -1)
    frames = dual.draw(None, odds, BatchRandom(20_000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(frames.task, minlength=len(TASKS)) / 20_000
    wanted = {"interpolation": 0.225, "i2v": 0.675, "uncond": 0.1}
    for column, task in enumerate(TASKS):
        assert share[column].item() == pytest.approx(wanted.get(task, 0), abs=0.012)
    nothing = frames.task == TASKS.index("uncond")
    assert not frames.given[nothing].any() and not frames.text[nothing].any() and dual.tasks[2] == "i2v"
    equal = dual.draw(None, None, BatchRandom(20_000, generator=torch.Generator().manual_seed(1))).task
    assert ((torch.bincount(equal, minlength=7) / 20_000)[[3, 1, 0]] - 0.3).abs().max() < 0.012


def test_one_task_and_one_mask_for_a_batch_by_its_shortest_clip():
    dual = masks(draw="batch", lengths=(1, 8))
    seen = set()
    for seed in range(60):
        random = BatchRandom(4, generator=torch.Generator().manual_seed(seed))
        frames = dual.draw(torch.tensor([8, 8, 8, 5]), None, random)
        assert len(set(frames.task.tolist())) == 1
        seen.add(TASKS[frames.task[0]])
        n, valid = frames.valid.sum(1).min(), frames.valid
        whole = frames.given[valid.sum(1).argmax()]
        if n > 1:  # a still is given nothing to interpolate
            assert torch.equal(frames.given, whole & valid)
        if TASKS[frames.task[0]] == "post_frame_prediction":
            assert n // 2 <= whole.sum() <= max(n - 1, 0)
    assert seen == set(TASKS)
    mixed = dual.draw(None, torch.tensor([[1.0] + 6 * [0]] * 2 + [[0.0, 1] + 5 * [0]] * 2), BatchRandom(4))
    assert len(set(mixed.task.tolist())) == 1 and mixed.task[0] in (0, 1)


def test_the_same_random_numbers_give_the_same_masks_and_processes_share_them():
    first, again = (draw(masks(lengths=(3, 8)), [8] * 16, seed=3) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    whole, parts, common = None, [], []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        random = StepRandom(0, 16, rank, world, torch.device("cpu"))
        random.begin(160)
        frames = masks(lengths=(3, 8)).draw(torch.full((16 // world,), F), None, random)
        whole, parts = (frames, parts) if world == 1 else (whole, [*parts, frames])
        common.append(random.common())
        assert common[-1].shape == () and 0 <= common[-1] < 1
    assert torch.equal(whole.given, torch.cat([part.given for part in parts]))
    assert common[0] == common[1] == common[2]


def test_shown_frames_are_those_of_the_clip_and_padding_is_zero():
    clips = torch.arange(4 * 3 * F).reshape(4, 3, F, 1, 1).float().expand(-1, -1, -1, 2, 2).clone()
    clips[:, :, 5:] = torch.nan
    frames = draw(masks(lengths=(3, 3)), [5] * 4)
    shown = frames.of(clips)
    assert torch.equal(shown[:, :, :3], clips[:, :, [0, 2, 4]]) and (shown[:, :, 3:] == 0).all()
    assert torch.equal(frames[1:3].of(clips[1:3]), shown[1:3])
    assert torch.equal(frames[torch.tensor([3, 0])].places, frames.places[[3, 0]])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("skip", ["learn", "skip"])
def test_no_gradient_comes_from_padding_or_uncounted_frames(task, skip):
    path = GaussianPath.from_scheduler(DDPMScheduler())
    objective = Objective(ObjectiveSection(), path)
    frames = draw(masks(given_frames=skip, lengths=(1, 8)), [8, 8, 8, 6, 4, 2, 1, 1], task)
    clips = torch.randn(8, 3, F, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0 = frames.of(clips)
    prediction = torch.randn(8, 3, F, 2, 2).requires_grad_()
    loss, x0_error = objective(prediction, x0, torch.zeros(8), frames.counted)
    (loss * frames.weight).sum().backward()
    learned = prediction.grad.abs().amax(dim=(1, 3, 4)) > 0
    assert torch.equal(learned, frames.counted)
    assert not (frames.counted & ~frames.valid).any() and frames.counted.any(1).all() and x0_error.isfinite().all()
    for row in range(8):
        shown = clips.grad[row].abs().amax(dim=(0, 2, 3)).nonzero()[:, 0]
        assert shown.tolist() == frames.places[row][frames.counted[row]].tolist()
    if skip == "learn":
        assert torch.equal(frames.counted, frames.valid)
    else:  # but the whole of a still is learned where all of it is given
        made = frames.valid & ~frames.given
        assert torch.equal(frames.counted[made.any(1)], made[made.any(1)])
        assert torch.equal(frames.counted[~made.any(1)], frames.valid[~made.any(1)])


def test_a_short_clip_weighs_as_much_as_a_whole_one_or_by_its_frames_as_published():
    for normalize, wanted in (("valid", [1, 1, 1]), ("paper", [1, 0.5, 0.125])):
        frames = draw(masks(normalize=normalize), [8, 4, 1], "t2v")
        assert frames.weight.tolist() == wanted
        prediction = torch.zeros(3, 1, F, 1, 1, requires_grad=True)
        square = (prediction - 1).square().mean(dim=(1, 3, 4)) * frames.counted
        (square.sum(1) / frames.counted.sum(1) * frames.weight).sum().backward()
        steepness = prediction.grad.abs()[:, 0, 0, 0, 0]
        # published: every frame weighs 1 / F, whatever the length of its clip
        torch.testing.assert_close(
            steepness, torch.tensor([2 / 8, 2 / 4, 2.0] if normalize == "valid" else [2 / 8] * 3)
        )
    skipped = draw(masks(normalize="paper", given_frames="skip"), [8, 1], "i2v")
    assert skipped.weight.tolist() == [7 / 8, 1 / 8]


def test_without_masks_all_frames_count_and_only_the_text_is_given():
    whole = build("masks", NoMasksSection(), frames=F)
    frames = whole.draw(torch.tensor([8, 3]), None, BatchRandom(2))
    assert frames.valid.sum(1).tolist() == [8, 3] and torch.equal(frames.counted, frames.valid)
    assert not frames.given.any() and frames.text.all() and frames.weight.tolist() == [1, 1]
    assert {TASKS[task] for task in frames.task} == set(whole.tasks) == {"t2v"}
    assert whole.draw(None, None, BatchRandom(2)).valid.all()

    images = torch.randn(2, 3, 4, 4)
    nothing = WholeSamples(NoMasksSection(), None).draw(None, None, BatchRandom(2))
    assert nothing is EVERYTHING and nothing.of(images) is images and nothing[:1] is nothing
    assert nothing.counted is None and nothing.weight == 1


def test_masks_work_in_a_loop_of_ones_own():
    lengths = torch.tensor([8, 8, 1, 5])
    frames = draw_frames(lengths, 8, torch.Generator().manual_seed(0), tasks=("i2v",), uncond=0, lengths=(2, 8))
    assert (frames.given.sum(1) == 1).all() and not frames.text.any()
    odds = torch.tensor([[0.0, 1.0]]).expand(4, -1)
    assert (draw_frames(lengths, 8, odds=odds, tasks=("i2v", "t2v"), uncond=0).task == TASKS.index("t2v")).all()


def test_masks_that_do_not_fit_the_data_are_named():
    with pytest.raises(UserError, match="masks.type: dual masks frames of stickers, which the data are not"):
        build("masks", DualMasksSection(), frames=None)
    with pytest.raises(UserError, match="masks.lengths: at least 3 frames, but the clips have 2; lower it"):
        build("masks", DualMasksSection(), frames=2)
