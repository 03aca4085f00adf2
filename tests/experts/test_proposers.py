"""Who proposes plans: what each gives, on networks whose best plan is known."""

from __future__ import annotations

import builtins
import functools

import numpy as np
import optuna
import pytest
import torch
from analytic import ATOMS, Problem, run, section
from diffusers import UNet2DModel

from entrecipes.errors import UserError
from entrecipes.experts.memory import Trial
from entrecipes.experts.proxy_pruning import Measured, MemoryBank, Task, search
from entrecipes.experts.units import Units
from entrecipes.recipe.base import build
from entrecipes.recipe.experts import Search

SEEDS = range(6)
LEVELS = Search().levels


@functools.cache
def left(proposer: str, seed: int, memory: bool = True) -> float:
    """What a search of 40 trials leaves of the uniform plan's distance to the optimum; 0 is the optimum."""
    problem = Problem(seed)
    best, bank = run(problem, section(proposer, **({} if memory else {"memory": None})), seed=seed)
    uniform, optimum = bank.trials(0)[0].loss, problem.optimum()
    assert optimum - 1e-3 < best.loss <= uniform and len(bank.trials(0)) <= 40
    assert all(abs(one.flops / problem.target - 1) <= 0.02 for one in bank.trials(0))
    return (best.loss - optimum) / (uniform - optimum)


def mean(*args: object) -> float:
    """Over the seeds."""
    return float(np.mean([left(args[0], seed, *args[1:]) for seed in SEEDS]))


def trials_of(proposer: str, **keys: object) -> list[Trial]:
    """Trials of a short search."""
    return run(Problem(0), section(proposer, **{"rounds": 2, "candidates": 4, **keys}))[1].trials(0)


def seen(task: Task, kept: tuple[int, ...], loss: float) -> Trial:
    """A trial to show."""
    shares = tuple(n / ATOMS for n in kept)
    return Trial(0, 0, 0, "random", shares, kept, 1.0, loss, -loss, 0.0, 0.0)


@pytest.mark.parametrize("proposer", ["sensitivity", "evolution", "tpe"])
def test_searching_beats_chance_and_uniform_at_the_same_number_of_trials(proposer):
    assert all(left(proposer, seed) < 0.75 for seed in SEEDS)
    assert mean(proposer) < 0.8 * mean("random")
    assert mean("uniform") == 1


def test_sensitivity_is_nearly_optimal_where_its_model_holds():
    assert mean("sensitivity") < 0.1


def test_memory_helps_evolution():
    assert mean("evolution") < 0.7 * mean("evolution", False)


def test_uniform_has_one_plan():
    trials = trials_of("uniform")
    assert [one.proposer for one in trials] == ["uniform"]
    assert max(trials[0].kept) - min(trials[0].kept) <= 1


def test_random_takes_each_level_equally_often():
    task = Problem(0).task()
    proposer = build("proposer", section("random").proposer)
    shares = np.array(proposer.propose(task, 0, [], 700, np.random.default_rng(0)))
    assert shares.shape == (700, 10)
    counts = [(shares == level).sum() for level in LEVELS]
    assert sum(counts) == 7000 and all(900 < count < 1100 for count in counts)


def test_sensitivity_halves_each_unit_first_the_dearest_ones_first():
    problem = Problem(0)
    trials = trials_of("sensitivity", rounds=10)
    uniform = trials[0].shares[0]
    halved = []
    for one in trials[1:11]:
        (unit,) = [u for u, share in enumerate(one.shares) if share != uniform]
        assert one.shares[unit] == uniform / 2 and one.kept[unit] <= 0.7 * trials[0].kept[unit]
        halved.append(unit)
    costs = [unit.flops for unit in problem.units.units]
    assert halved == sorted(range(10), key=lambda unit: -costs[unit])
    assert len({one.shares for one in trials}) == len(trials)  # shown all trials, it tries no unit twice
    few = trials_of("sensitivity", rounds=2, candidates=4)
    assert sum(len(set(one.shares)) == 2 for one in few) == 4  # at most half of the search


def test_sensitivity_without_memory_follows_the_importance():
    problem = Problem(0)
    proposer = build("proposer", section("sensitivity").proposer)
    task = problem.task()
    need = [0.01, 0.5] + [0.1] * 8
    vars(task)["importance"] = need
    shares = proposer.propose(task, 0, [], 4, np.random.default_rng(0))[10]
    pressure = [(1 - share) * n / unit.flops for share, n, unit in zip(shares, need, problem.units.units, strict=True)]
    free = [p for p, share in zip(pressure, shares, strict=True) if share > min(LEVELS) + 1e-9]
    assert len(free) > 2 and free == pytest.approx([free[0]] * len(free))
    costs = np.array([unit.flops * ATOMS for unit in problem.units.units])
    assert problem.units.base_flops - costs @ (1 - np.array(shares)) == pytest.approx(problem.target)


def test_evolution_breeds_from_the_best_shown_by_single_levels():
    problem = Problem(0, units=4)
    task = problem.task()
    proposer = build("proposer", section("evolution").proposer)
    best, other = (16, 4, 12, 8), (16, 4, 8, 8)
    worse = [seen(task, (4, 16, 4, 16), 9.0 + i) for i in range(8)]
    shown = [*worse, seen(task, best, 1.0), seen(task, best, 1.1), seen(task, other, 1.2), seen(task, best, 1.3)]
    children = proposer.propose(task, 3, shown, 400, np.random.default_rng(0))
    atoms = np.array(children) * ATOMS
    # no parent is further than the best four; levels are two atoms apart
    assert set(atoms[:, 0]) == {16, 14} and set(atoms[:, 1]) == {4, 6} and set(atoms[:, 3]) == {6, 8, 10}
    assert set(atoms[:, 2]) == {6, 8, 10, 12, 14}
    changed = (atoms != best)[:, [0, 1, 3]].mean()
    assert changed == pytest.approx(0.25 + 0.75 * 0.2, abs=0.04)  # one unit surely, the others by `mutation`


def test_evolution_begins_from_plans_that_follow_the_importance():
    problem = Problem(0)
    task = problem.task()
    vars(task)["importance"] = problem.a / problem.a.sum()
    bank = MemoryBank()
    search(section(rounds=1, candidates=3), task, problem.evaluate, bank, build("proposer", section().proposer))
    losses = [one.loss for one in bank.trials(0)]
    assert losses[1] < losses[2] < losses[0]  # here the importance is the truth
    assert losses[1] == pytest.approx(problem.optimum(), abs=0.1 * (losses[0] - problem.optimum()))


def test_tpe_is_quiet_and_turns_to_where_losses_are_low(capfd):
    problem = Problem(0, units=3)
    task = problem.task()
    proposer = build("proposer", section("tpe").proposer)
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(60):
        kept = tuple(rng.integers(4, 17, 3).tolist())
        shown.append(seen(task, kept, abs(kept[0] - 12) + 0.1))
    shares = np.array(proposer.propose(task, 5, shown, 40, np.random.default_rng(1)))
    assert shares.min() >= min(LEVELS) and shares.max() <= max(LEVELS)
    assert abs(np.median(shares[:, 0]) - 0.75) < 0.08
    assert np.abs(shares[:, 0] - 0.75).mean() < 0.6 * np.abs(shares[:, 1] - 0.75).mean()
    assert capfd.readouterr() == ("", "")
    again = proposer.propose(task, 5, shown, 40, np.random.default_rng(1))
    assert np.array_equal(shares, again)


def test_tpe_without_optuna_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **keys):
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return real(name, *args, **keys)

    assert optuna  # it is here, and hidden
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"tpe needs optuna.*pip install 'entrecipes\[search\]'"):
        build("proposer", section("tpe").proposer)


@pytest.fixture(scope="module")
def unet() -> Units:
    """The units of a real, tiny network: widths, heads and blocks."""
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Units.of(model, ("widths", "heads", "blocks"), lambda net: net(torch.zeros(1, 1, 8, 8), 0))


@pytest.mark.parametrize("ratio", [0.45, 0.8])
@pytest.mark.parametrize("proposer", ["uniform", "random", "sensitivity", "evolution", "tpe"])
def test_every_proposer_searches_a_real_unet(unet, proposer, ratio):
    target = ratio * unet.base_flops
    number = len(unet.units)
    weight = np.random.default_rng(4).uniform(0.1, 2, number)

    def evaluate(kept: tuple[int, ...]) -> Measured:
        shares = np.array(kept) / [unit.atoms for unit in unet.units]
        return Measured(1 + float(weight @ (1 - shares) ** 2), unet.flops(kept))

    how = section(proposer, rounds=4, candidates=3)
    task = Task(Problem(0).task().group, unet, [1 / number] * number, target, 1.0, 0)
    bank = MemoryBank()
    best = search(how, task, evaluate, bank, build("proposer", how.proposer))
    trials = bank.trials(0)
    fewest = {"uniform": 1, "sensitivity": 8}  # these end where they have nothing new
    assert fewest.get(proposer, 12) <= len(trials) <= (1 if proposer == "uniform" else 12)
    assert {one.proposer for one in trials[1:]} <= {proposer}
    assert all(abs(unet.flops(one.kept) / target - 1) <= 0.02 for one in trials)
    assert best.loss <= trials[0].loss and {unit.kind for unit in unet.units} == {"widths", "heads", "blocks"}
    if ratio == 0.8:  # blocks go only where they must
        assert all(n for n, unit in zip(trials[0].kept, unet.units, strict=True) if unit.kind == "blocks")
