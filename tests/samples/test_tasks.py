"""Which task each sample gets: written schedules, the controller on the loss, and measured difficulty."""

import math

import pytest
import torch

from entrecipes.errors import UserError
from entrecipes.recipe.base import REGISTRY, build
from entrecipes.recipe.curriculum import AdaptiveTasksSection, EntropyTasksSection, LinearTasksSection, PhasesSection
from entrecipes.recipe.masks import TASKS, DualMasksSection
from entrecipes.samples.masks import BatchRandom, DualMasks, made_share
from entrecipes.samples.tasks import KEPT, PIVOT

SIX = TASKS[:-1]
GENERATION, INTERPOLATION, PREDICTION = [0, 1, 2], [3], [4, 5]
CONTEXT = {"model": torch.nn.Linear(1, 1), "kind": "stickers", "images": 1000, "frames": 8, "device": "cpu"}


def curriculum(section, tasks=SIX, **context):
    return build("curriculum", section, **CONTEXT | {"tasks": tasks} | context)


def adaptive(**keys):
    return curriculum(AdaptiveTasksSection(**keys))


def record(choice, task: str | torch.Tensor, loss, n: int = 4) -> None:
    """A batch of one loss for one task, or of many."""
    task = torch.full((n,), TASKS.index(task)) if isinstance(task, str) else task
    loss = torch.as_tensor(loss, dtype=torch.float32).expand(len(task))
    choice.record(task, loss, loss, torch.zeros(len(task), dtype=torch.float64))


def by_kind(odds: torch.Tensor) -> list[float]:
    """Odds of generation, interpolation and prediction, which must be the same for all samples and within each."""
    assert odds.dtype == torch.float32 and torch.equal(odds, odds[:1].expand_as(odds))
    for kind in (GENERATION, INTERPOLATION, PREDICTION):
        assert len(odds[0][kind].unique()) == 1
    return [odds[0][kind[0]].item() for kind in (GENERATION, INTERPOLATION, PREDICTION)]


def test_the_static_part_goes_through_the_published_knots():
    for choice, length in ((adaptive(), 1000), (adaptive(images=400), 400)):
        for share, wanted in (
            (0, (0.1, 0.9, 0.7)),
            (0.25, (0.3, 0.7, 0.6)),
            (0.5, (0.5, 0.5, 0.5)),
            (1, (0.9, 0.1, 0.3)),
        ):
            static = [odds - 0.5 for odds in by_kind(choice.odds(int(share * length), 3))]  # + level 2: 0.5 for all
            assert static == pytest.approx(wanted, abs=1e-6)
        assert by_kind(choice.odds(2 * length, 3)) == by_kind(choice.odds(length, 3))


def test_each_level_has_the_published_weights():
    weights = [(0.1, 0.9), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)]
    for greater in range(10):  # so many of the nine other losses in the history are greater
        fresh = adaptive(proportional=1, integral=0, derivative=0, smoothing=0, history=10, scores="raw")
        for loss in [2.0] * greater + [0.5] * (9 - greater) + [1.0]:
            record(fresh, "t2v", loss)
        level = greater // 2
        generation, interpolation, prediction = by_kind(fresh.odds(500, 2))
        assert fresh.facts()["level"] == level and prediction == 1
        assert (generation - 0.5, interpolation - 0.5) == pytest.approx(weights[level])


def controller(losses, kp, ki, kd, history, smoothing):
    """Levels by the reference's recommended reading, with plain lists."""
    seen, values, levels = [], [], []
    for loss in losses:
        before = seen[-1] if seen else loss
        loss = smoothing * before + (1 - smoothing) * loss if seen else loss
        seen = [*seen, loss][-history:]
        value = kp * loss + ki * sum(seen) / len(seen) + kd * (loss - before)
        values = [*values, value][-history:]
        share = sum(other > value for other in values), len(values)
        levels.append(2 if len(values) < 10 else min(4, 5 * share[0] // share[1]))
    return levels


def test_the_controller_follows_a_sequence_computed_by_hand():
    choice, levels = adaptive(smoothing=0, scores="raw", history=10), []
    for loss in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 5, 0.5, 20):
        record(choice, "it2v", loss)
        levels.append(choice.facts()["level"])
    # P = 5 L + 3 mean(L) + 1.3 (L - L before). Of a steadily falling loss the last P is the least: 9 of 10 are greater
    assert levels[:10] == [2] * 9 + [4]
    assert levels[11:] == [4, 0]  # 0.5 gives the least of all, 20 the greatest
    # the eleventh: P(5) = 25 + 3 * 5 + 1.3 * 4 = 45.2; greater are P(9) = 72.2, P(8) = 65.7, P(7) = 59.2, P(6) = 52.7,
    # and P(5) = 25 + 22.5 - 1.3 = 46.2: 5 of 10
    assert levels[10] == 2


@pytest.mark.parametrize("smoothing", [0, 0.9])
def test_the_controller_agrees_with_plain_lists_over_a_full_history(smoothing):
    choice, levels = adaptive(smoothing=smoothing, scores="raw", history=16), []
    losses = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    for loss in losses:
        record(choice, "i2v", loss)
        levels.append(choice.facts()["level"])
    assert levels == controller(losses, 5, 3, 1.3, 16, smoothing) and len(set(levels)) == 5


@pytest.mark.parametrize("scores", ["raw", "task"])
def test_a_rising_loss_asks_for_easier_tasks_and_a_falling_one_for_harder(scores):
    shares = {}
    for name, slope in (("rising", 0.01), ("falling", -0.01)):
        choice, random = adaptive(scores=scores), torch.Generator().manual_seed(0)
        for step in range(60):
            task = torch.randint(6, (16,), generator=random)
            record(choice, task, (1 + slope * step) * (1 + task / 6) + 0.02 * torch.randn(16, generator=random))
        shares[name] = by_kind(choice.odds(500, 2))
    assert shares["rising"][0] < 1 < shares["falling"][0] and shares["rising"][1] > 1 > shares["falling"][1]


def test_the_mix_of_tasks_alone_does_not_move_the_controller():
    random = torch.Generator().manual_seed(0)
    levels = {"raw": [], "task": []}
    for scores, found in levels.items():
        choice = adaptive(scores=scores, smoothing=0)
        for step in range(400):  # every other step all tasks are hard ones, with twice the loss
            task = torch.full((64,), 1 if step % 2 else 3)
            record(choice, task, (2.0 if step % 2 else 1.0) + 0.1 * torch.randn(64, generator=random))
            if step >= 200:
                found.append(choice.facts()["level"])
    hard, easy = (torch.tensor(levels["raw"][start::2]).float().mean() for start in (1, 0))
    assert easy - hard > 2
    hard, easy = (torch.tensor(levels["task"][start::2]).float().mean() for start in (1, 0))
    assert abs(easy - hard) < 1  # by chance


def test_a_loss_counts_by_the_deviation_of_its_own_task():
    choice = adaptive(smoothing=0)
    record(choice, "t2v", torch.tensor([1.0, 3, 1, 3]))  # mean 2, deviation 1
    record(choice, "i2v", torch.tensor([10.0, 30, 10, 30]))  # mean 20, deviation 10
    record(choice, torch.tensor([0, 1]), torch.tensor([50.0, 2]))
    # i2v: 10, 30, 10, 30, 50 have mean 26 and variance 224; t2v's 2 is its mean
    assert choice.losses[:3].tolist() == pytest.approx([0, 0, (50 - 26) / 224**0.5 / 2])
    record(choice, "it2v", 7.0)
    assert choice.losses[3] == 0  # nothing is known of its deviation


def test_other_tasks_and_losses_that_are_no_numbers_are_left_out():
    choices = [curriculum(AdaptiveTasksSection(scores=scores), tasks=("i2v", "t2v")) for scores in ("raw", "task")]
    for choice in [*choices, curriculum(EntropyTasksSection(), tasks=("i2v", "t2v"))]:
        for step in range(12):
            record(choice, "i2v", 1.0 + step)
        before = {**choice.facts(), **choice.state_dict()}
        record(choice, torch.tensor([6, 3, 0, 1]), torch.tensor([1.0, 2.0, math.nan, math.inf]))
        after = {**choice.facts(), **choice.state_dict()}
        assert torch.equal(before["sums"], after["sums"]) and before["nats"] == after["nats"]
        assert after["nats"]["t2v"] is None
        for name in set(after) & {"losses", "values"}:
            assert after[name].isfinite().all()
        if "losses" in after:
            assert after["losses"][12] == after["losses"][11]


def test_linear_has_the_published_values():
    choice = curriculum(LinearTasksSection())
    for r, wanted in (
        (0, (0, 1, 0.25)),
        (1 / 8, ((1 - 0.5**0.5) / 2, (1 + 0.5**0.5) / 2, (1 - 0.5**0.5) / 4 + 0.25)),
        (1 / 4, (0.5, 0.5, 0.5)),
        (1 / 2, (1, 0, 0.75)),
        (3 / 4, (0.5, 0.5, 0.5)),
        (1, (0.5, 0.5, 0.5)),
    ):
        odds = by_kind(choice.odds(int(1000 * r), 2))
        assert odds == pytest.approx(wanted, abs=1e-5)
        written = (
            (1 + math.sin(2 * math.pi * (min(r, 0.75) - 0.25))) / 2,
            (1 + math.cos(2 * math.pi * min(r, 0.75))) / 2,
            0.5 * (1 + math.sin(2 * math.pi * (min(r, 0.75) - 0.25))) / 2 + 0.25,
        )
        assert odds == pytest.approx(written, abs=1e-5)
    only_hard = curriculum(LinearTasksSection(), tasks=("i2v", "t2v")).odds(0, 2)
    assert (only_hard > 0).all() and len(only_hard.unique()) == 1
    assert not choice.records and choice.state_dict() == {} and choice.facts()["odds"]["i2v"] == 0.1667


def test_measured_nats_are_a_mean_of_gated_rates():
    choice = curriculum(EntropyTasksSection())
    assert set(choice.facts()["nats"].values()) == {None}
    log_sigma = torch.tensor([0.0, math.log(PIVOT), 1.0, 0.0], dtype=torch.float64)
    x0_error = torch.tensor([0.5, 0.01, 0.3, 0.2])
    choice.record(torch.tensor([1, 1, 0, 6]), x0_error, x0_error, log_sigma)
    whole = 1 / (1 + PIVOT**3)
    first = (0.5 * whole, 0.01 / PIVOT**2 / 2)
    assert choice.facts()["nats"]["t2v"] == pytest.approx(sum(first) / 2, rel=1e-3)
    assert choice.facts()["nats"]["i2v"] == pytest.approx(0.3 * math.exp(-2) / (1 + (PIVOT / math.e) ** 3), rel=1e-3)
    choice.record(torch.tensor([1]), x0_error[:1], x0_error[:1], log_sigma[:1])
    wanted = (KEPT * sum(first) + 0.5 * whole) / (2 * KEPT + 1)
    assert choice.nats[1].item() == pytest.approx(wanted, rel=1e-6)


def test_difficulty_is_what_is_known_and_what_was_measured():
    choice = curriculum(EntropyTasksSection(static=0.25))
    # i2v of a whole clip: 7 of 8 frames are made; of a still none; t2v all
    motion, lengths = torch.tensor([0.4, 0.0]), torch.tensor([8, 1])
    difficulty = choice.difficulty(motion, lengths)
    known = {(0, 0): (0.4 + 1 + 7 / 8) / 3, (0, 1): (0.4 + 1 + 1) / 3, (1, 0): 1 / 8 / 3, (1, 1): (1 / 8 + 1) / 3}
    for place, value in known.items():
        assert difficulty[place].item() == pytest.approx(0.25 * value + 0.75 * 0.5)  # unseen tasks: the middle
    for task, error in ((0, 0.1), (1, 0.3), (3, 0.2)):
        record(choice, TASKS[task], error)
    difficulty = choice.difficulty(motion, lengths)
    for (row, task), value in known.items():
        assert difficulty[row, task].item() == pytest.approx(0.25 * value + 0.75 * {0: 0, 1: 1}[task], abs=1e-6)
    assert choice.measured.tolist() == pytest.approx([0, 1, 0.5, 0.5, 0.5, 0.5], abs=1e-6)
    assert choice.difficulty(None, None)[0, 1].item() == pytest.approx(0.25 * (0.5 + 1 + 1) / 3 + 0.75)
    assert choice.odds(0, 5, None, None).shape == (5, 6)


def test_entropy_has_its_odds_where_the_difficulty_fits_the_moment():
    choice = curriculum(EntropyTasksSection(static=0.5, width=0.2, floor=0.3))
    motion, lengths = torch.rand(4, generator=torch.Generator().manual_seed(0)), torch.tensor([8, 8, 4, 1])
    odds, difficulty = choice.odds(600, 4, motion, lengths), choice.difficulty(motion, lengths)
    fit = torch.exp(-(((difficulty - 0.6) / 0.2) ** 2) / 2)
    torch.testing.assert_close(odds, 0.7 * fit / fit.sum(1, keepdim=True) + 0.3 / 6)
    assert odds.min() >= 0.3 / 6 and len(odds.unique(dim=0)) == 4
    assert list(choice.facts()["odds"]) == list(SIX) and sum(choice.facts()["odds"].values()) == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize("static", [0.5, 1.0])
def test_entropy_goes_from_easy_to_hard(static):
    n = 2000
    choice, random = curriculum(EntropyTasksSection(static=static)), torch.Generator().manual_seed(0)
    for column, error in enumerate(made_share(8)[8, :6]):  # a model whose error is in the frames to be made
        record(choice, TASKS[column], error * 0.1)
    masks = DualMasks(DualMasksSection(uncond=0, lengths=(8, 8)), 8)
    motion, lengths = torch.rand(n, generator=random), torch.full((n,), 8)
    shares = []
    for images in range(0, 1001, 200):
        odds = choice.odds(images, n, motion, lengths)
        frames = masks.draw(lengths, odds, BatchRandom(n, generator=random))
        shares.append(1 - frames.given.float().mean().item())
    assert all(later > earlier - 0.01 for earlier, later in zip(shares, shares[1:], strict=False))
    assert shares[0] < 0.55 and shares[-1] > shares[0] + 0.2


@pytest.mark.parametrize("section", [AdaptiveTasksSection(history=20), EntropyTasksSection()])
def test_a_restored_curriculum_goes_on_bit_by_bit(section):
    random = torch.Generator().manual_seed(0)
    motion, lengths = torch.rand(8, generator=random), torch.full((8,), 8)

    def step(choice, task, loss):
        choice.record(task, loss, loss / 2, loss.double() - 1)
        return choice.odds(300, 8, motion, lengths)

    batches = [(torch.randint(7, (8,), generator=random), torch.rand(8, generator=random)) for _ in range(60)]
    one = curriculum(section)
    for batch in batches[:33]:
        step(one, *batch)
    kept = one.state_dict()
    other = curriculum(section)
    for batch in batches[33:40]:
        step(one, *batch)  # what was given is a copy
    other.load_state_dict(kept)
    for batch in batches[33:40]:
        step(other, *batch)
    for batch in batches[40:]:
        assert torch.equal(step(one, *batch), step(other, *batch))
    again = curriculum(section)
    again.load_state_dict(kept)  # nor was it touched since
    for batch in batches[33:]:
        step(again, *batch)
    assert torch.equal(again.odds(0, 8, motion, lengths), one.odds(0, 8, motion, lengths))
    state = one.state_dict()
    for copy in (other.state_dict(), again.state_dict()):
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(copy[name])) for name in state)
    with pytest.raises(ValueError, match="saved as"):
        curriculum(section, tasks=SIX[:3]).load_state_dict(kept)


def test_every_choice_is_built_alike_and_the_plain_ones_ask_for_nothing():
    for name, entry in REGISTRY["curriculum"].items():
        section = entry.section(**({"phases": [{}]} if name == "phases" else {}))
        choice = curriculum(section, kind="clips")
        assert choice.advance(0) == [] or name == "phases"
        assert choice.eligible("weight")
        odds = choice.odds(0, 3, torch.rand(3), torch.full((3,), 8))
        if name in ("none", "phases"):
            assert odds is None and not choice.records and choice.state_dict() == choice.facts() == {}
        else:
            assert odds.shape == (3, 6) and (odds > 0).all() and choice.records == (name != "linear")


@pytest.mark.parametrize("section", [LinearTasksSection(), AdaptiveTasksSection(), EntropyTasksSection()])
def test_a_curriculum_without_tasks_to_choose_from_is_refused(section):
    with pytest.raises(UserError, match=f"curriculum.type: {section.type} chooses tasks for stickers"):
        curriculum(section, tasks=("t2v",), frames=None)
    with pytest.raises(UserError, match=f"curriculum.type: {section.type} chooses among the tasks of masks.type: dual"):
        curriculum(section, tasks=("t2v",))
    with pytest.raises(UserError, match="phases cuts clips"):
        curriculum(PhasesSection(phases=[{}]))
