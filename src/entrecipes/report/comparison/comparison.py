"""A comparison of arms over seeds: how many times fewer images and seconds each needs to be as good as the baseline.

Definitions, for a metric whose values by image count make a run's curve:

- The *target* of a seed is the baseline's final value with that seed (or one fixed number for all).
- *Images to target* is where the best value so far first is as good, interpolated linearly over log images
  ([`Curve.reach`]). The baseline's own is counted in the same way, so that a flat or noisy tail favours nobody.
- *Speed-up* is the baseline's images to target over the arm's, seed by seed; likewise in seconds of training,
  evaluation excluded. An arm that never gets there, or whose run failed, has *not reached* it, which is below any
  number.
- Of an arm that does not get there, the *reverse* is given: how many times fewer the baseline needs to the arm's best
  value than the arm itself.
- Given are the median over seeds, and the lowest and highest; beside it the speed-up between the curves averaged over
  seeds, whose target is the baseline's mean final value.
- *Differences* are paired: the arm's final value minus the baseline's with the same seed (same data order, same initial
  weights for the same network, same held-out images).

Quality at a fixed compute budget, and time to a fixed quality: both are common (e.g. Dahl et al. 2023, AlgoPerf).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from entrecipes.report.comparison.arms import Arm, ArmRun, Spread
from entrecipes.report.comparison.conditions import Base, Budget
from entrecipes.report.comparison.curve import Curve, mean_curve


@dataclass(frozen=True)
class Comparison:
    """Arms with their finished runs, and what follows from them.

    Args:
        name: Title of the report.
        metric: What is compared: `heldout_nats`, or any other that [`read_curve`] knows.
        arms: By name, in the order of the report.
        baseline: Name of the arm that the others are measured against.
        seeds: Seeds of the runs.
        fixed_target: The target for all seeds; None: each seed's is the baseline's final value.
        unequal: Keys of the budget, data or evaluation in which arms were allowed to differ.
        budget: How the arms' images were timed to take the same seconds; None: the images are those of the recipes.
        bases: What arms start from.
        command: The command line that made it, to be shown; may be empty.

    Raises:
        UserError: From what reads curves, when a finished run did not measure the metric.
    """

    name: str
    metric: str
    arms: dict[str, Arm]
    baseline: str
    seeds: tuple[int, ...]
    fixed_target: float | None = None
    unequal: tuple[str, ...] = ()
    budget: Budget | None = None
    bases: tuple[Base, ...] = ()
    command: str = ""

    # -- curves -----------------------------------------------------------------------------------------------------

    @cached_property
    def curves(self) -> dict[str, dict[int, Curve]]:
        """The metric's curve of every finished run, by arm and seed."""
        return {
            name: {seed: run.curve(self.metric) for seed, run in arm.finished.items()}
            for name, arm in self.arms.items()
        }

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return any(curve.higher_is_better for curves in self.curves.values() for curve in curves.values())

    @property
    def runs(self) -> list[ArmRun]:
        """All runs, arm by arm."""
        return [run for arm in self.arms.values() for run in arm.runs.values()]

    @property
    def others(self) -> list[str]:
        """The arms that are not the baseline."""
        return [name for name in self.arms if name != self.baseline]

    # -- time to a fixed quality --------------------------------------------------------------------------------------

    @cached_property
    def targets(self) -> dict[int, float]:
        """The value to reach, by seed; seeds without a finished baseline have none."""
        finals = {seed: curve.final for seed, curve in self.curves[self.baseline].items()}
        return finals if self.fixed_target is None else dict.fromkeys(self.seeds, self.fixed_target)

    def images_to_target(self, arm: str) -> Spread:
        """Images until the seed's target; inf: not reached, or the run failed. Missing runs are left out."""
        return Spread({seed: self._reach(arm, seed) for seed in self.targets if self._counts(arm, seed)})

    def seconds_to_target(self, arm: str) -> Spread:
        """Seconds of training until the seed's target; inf: not reached, or the run failed."""
        reached = self.images_to_target(arm).by_seed
        return Spread({seed: self._seconds(arm, seed, images) for seed, images in reached.items()})

    def speedup(self, arm: str, unit: str = "images") -> Spread:
        """Baseline's images (or `seconds`) to target over the arm's, by seed; -inf: not reached.

        Seeds whose baseline did not reach a fixed target are left out.
        """
        needs = self.images_to_target if unit == "images" else self.seconds_to_target
        base, own = needs(self.baseline).by_seed, needs(arm).by_seed
        return Spread({seed: _ratio(base[seed], own[seed]) for seed in own if math.isfinite(base.get(seed, math.inf))})

    def budget_ratio(self, arm: str) -> Spread:
        """The baseline's whole budget over the arm's images to target, by seed; -inf: not reached."""
        base, own = self.curves[self.baseline], self.images_to_target(arm).by_seed
        return Spread({seed: _ratio(base[seed].images[-1], own[seed]) for seed in own if seed in base})

    def reverse(self, arm: str, unit: str = "images") -> Spread:
        """How many times fewer images (or `seconds`) the baseline needs to the arm's best value than the arm, by seed.

        What is left to say of an arm that does not reach the target; -inf: the baseline never gets there.
        """
        base, own, ratios = self.curves[self.baseline], self.curves[arm], {}
        for seed in (seed for seed in own if seed in base):
            needs = [curve.reach(own[seed].best) for curve in (own[seed], base[seed])]
            if unit == "seconds":
                needs = [curve.seconds_at(count) for curve, count in zip((own[seed], base[seed]), needs, strict=True)]
            ratios[seed] = _ratio(*needs)
        return Spread(ratios)

    def mean_speedup(self, arm: str, unit: str = "images") -> float | None:
        """The speed-up between the curves averaged over the seeds that both arms finished; -inf: not reached."""
        base, own = self.curves[self.baseline], self.curves[arm]
        shared = [seed for seed in own if seed in base]
        ours, theirs = (mean_curve([curves[seed] for seed in shared]) for curves in (own, base))
        if ours is None or theirs is None:
            return None
        target = theirs.final if self.fixed_target is None else self.fixed_target
        needs = [curve.reach(target) for curve in (theirs, ours)]
        if unit == "seconds":
            needs = [curve.seconds_at(count) for curve, count in zip((theirs, ours), needs, strict=True)]
        return _ratio(*needs) if math.isfinite(needs[0]) else None

    def _counts(self, arm: str, seed: int) -> bool:
        run = self.arms[arm].runs.get(seed)
        return run is not None and run.state != "missing"

    def _reach(self, arm: str, seed: int) -> float:
        curve = self.curves[arm].get(seed)
        return curve.reach(self.targets[seed]) if curve else math.inf

    def _seconds(self, arm: str, seed: int, images: float) -> float:
        return math.inf if math.isinf(images) else self.curves[arm][seed].seconds_at(images)

    # -- quality at a fixed budget ------------------------------------------------------------------------------------

    def final(self, arm: str) -> Spread:
        """The metric's last value by seed."""
        return Spread({seed: curve.final for seed, curve in self.curves[arm].items()})

    def best(self, arm: str) -> Spread:
        """The metric's best value by seed."""
        return Spread({seed: curve.best for seed, curve in self.curves[arm].items()})

    @cached_property
    def value_names(self) -> list[str]:
        """Every final number that some run has, the compared metric first."""
        names = dict.fromkeys(name for run in self.runs if run.finished for name in run.values)
        return sorted(names, key=lambda name: name != self.metric)

    def values(self, arm: str, name: str) -> Spread:
        """A final number by seed, for the finished runs that have it."""
        runs = self.arms[arm].finished
        return Spread({seed: run.values[name] for seed, run in runs.items() if name in run.values})

    def paired(self, own: Spread, base: Spread) -> Spread:
        """Differences by seed, of the seeds that both have."""
        return Spread({seed: own.by_seed[seed] - base.by_seed[seed] for seed in own.by_seed if seed in base.by_seed})


def _ratio(base: float, own: float) -> float:
    """How many times less `own` is; -inf when it is infinite."""
    return -math.inf if math.isinf(own) else base / own
