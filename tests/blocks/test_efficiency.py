"""Convergence efficiency on scripted losses."""

from __future__ import annotations

import json

import pytest

from entrecipes.blocks.comparison import Candidate, Comparison

BATCH = 10


def candidates() -> list[Candidate]:
    return [Candidate(2, predicted=10.0), Candidate(4, predicted=20.0)]


def play(found: Comparison, losses: list[float], seconds: dict[int, float], images: int = 0) -> tuple[list[int], int]:
    """Take steps until the comparison is over, the losses as scripted: whose each step was, and the images seen."""
    taken = []
    while True:
        current, images = found.current, images + BATCH
        taken.append(current.m)
        current.seconds += seconds[current.m]
        if found.step(images):
            found.credit(losses.pop(0))
            if found.over(images):
                return taken, images


def test_the_drop_is_credited_to_the_steps_that_earned_it():
    found = Comparison(candidates(), loss=10.0, start=0, until=60, burst=2)
    taken, images = play(found, [9.0, 8.5, 8.1, 7.6], {2: 0.5, 4: 2.0})
    assert taken == [2, 2, 4, 4, 4, 4, 2, 2], "turned round in the second round"
    assert images == 80, "a whole number of rounds"
    small, large = found.candidates
    assert small.drop == pytest.approx(8.1 - 7.6) and large.drop == pytest.approx(8.5 - 8.1), "but of the first turns"
    assert (small.losses, large.losses) == ([9.0, 7.6], [8.5, 8.1])
    assert (small.steps, large.steps) == (2, 2)
    assert small.efficiency("predicted") == pytest.approx(0.5 / 20)
    assert large.efficiency("predicted") == pytest.approx(0.4 / 40)
    assert small.efficiency("measured") == pytest.approx(0.5 / 1) and small.seconds == 1.0
    assert found.best("predicted").m == 2
    rows = found.rows("predicted")
    assert rows[1]["ce"] == pytest.approx(0.4 / 40) and json.dumps(rows)


def test_every_turn_after_the_first_counts():
    found = Comparison(candidates(), loss=10.0, start=0, until=60, burst=1)
    play(found, [9.0, 8.5, 8.1, 7.6, 7.0, 6.9], {2: 1.0, 4: 1.0})
    small, large = found.candidates
    assert small.drop + large.drop == pytest.approx(8.5 - 6.9), "all of the drop since then is someone's"
    assert small.drop == pytest.approx((8.1 - 7.6) + (7.6 - 7.0))


def test_the_clock_decides():
    found = Comparison(candidates(), loss=10.0, start=0, until=20, burst=1)
    play(found, [12.0, 10.0, 8.8, 7.8], {2: 3.0, 4: 1.0})
    assert found.best("predicted").m == 2, "1 / 10 against 1.2 / 20"
    assert found.best("measured").m == 4, "1 / 3 against 1.2 / 1"


def test_equal_ones_stay_small_and_a_rise_counts_against():
    equal = Comparison(candidates(), loss=1.0, start=0, until=20, burst=1)
    play(equal, [1.0, 1.0, 0.75, 0.5], {2: 1.0, 4: 1.0})
    assert equal.best("measured").m == 2
    rising = Comparison(candidates(), loss=1.0, start=0, until=20, burst=1)
    play(rising, [1.0, 1.0, 0.9, 1.1], {2: 1.0, 4: 1.0})
    assert rising.candidates[0].drop < 0 and rising.best("predicted").m == 4
    worse = Comparison(candidates(), loss=1.0, start=0, until=20, burst=1)
    play(worse, [1.0, 1.0, 1.2, 1.4], {2: 1.0, 4: 1.0})
    assert worse.best("predicted").m == worse.best("measured").m == 2, "the dearer of two rises is not the better"


def test_snapshots_are_credited_with_the_whole_drop_since_the_start():
    found = Comparison(candidates(), loss=5.0, start=100, until=180, burst=None)
    taken, images = play(found, [4.0, 3.5], {2: 1.0, 4: 1.0}, images=100)
    assert taken == [2] * 4 + [4] * 4 and images == 180, "turns of equal length"
    assert [c.drop for c in found.candidates] == [1.0, 1.5]
    assert found.best("predicted").m == 2 and found.best("measured").m == 4


def test_one_that_had_no_turn_is_not_chosen():
    found = Comparison(candidates(), loss=5.0, start=0, until=100, burst=4)
    found.step(10)
    found.credit(6.0)
    assert found.best("measured").m == 2 and found.rows("measured")[1]["ce"] is None


@pytest.mark.parametrize("stop", range(1, 12))
def test_its_state_goes_on_in_the_middle_of_a_turn(stop):
    losses = [9.0, 8.5, 8.1, 7.6, 7.0, 6.9]
    whole = Comparison(candidates(), loss=10.0, start=0, until=120, burst=2)
    played = play(whole, list(losses), {2: 0.1, 4: 0.3})
    part, images, left = Comparison(candidates(), loss=10.0, start=0, until=120, burst=2), 0, list(losses)
    for _ in range(stop):
        part.current.seconds += {2: 0.1, 4: 0.3}[part.current.m]
        images += BATCH
        if part.step(images):
            part.credit(left.pop(0))
    state = json.loads(json.dumps(part.state_dict()))
    rest = Comparison.from_state(state)
    again = play(rest, left, {2: 0.1, 4: 0.3}, images)
    assert again == (played[0][stop:], played[1]) and rest.state_dict() == whole.state_dict()
