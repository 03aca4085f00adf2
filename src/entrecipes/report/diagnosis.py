"""What a diagnosis of a pipeline's noise levels says: as a table, a picture, JSON, and a recipe section to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from entrecipes.information.nats import gate
from entrecipes.information.profile import Histogram
from entrecipes.noise.recommendation import SAMPLING_GRIDS, Recommendation, weighted
from entrecipes.recipe.base import Section
from entrecipes.recipe.noise import InfoNoiseSection
from entrecipes.recipe.tree import to_yaml
from entrecipes.report.comparison.tables import Table
from entrecipes.report.facts import number
from entrecipes.report.noise_plots import SIGMA, density_panel, rate_panel
from entrecipes.report.plots import BLUE, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULES = {
    "onset": "by the onset rule: where the rate per unit sigma reaches 0.2 % of its maximum",
    "usual": "the usual one",
}
EFFORTS = {"draws": "draws", "effective": "draws x weight", "loss": "loss"}
"""What is spent over noise levels: draws; draws times the loss's weight on the x0 error; and that times the error."""
SCHEDULES = {"this": "this schedule", "recommended": "InfoNoise"}


@dataclass(frozen=True)
class Diagnosis:
    """A measured profile, the recommendation made from it, and the schedule that it is held against.

    Args:
        pipeline: Name of what was diagnosed.
        facts: What was measured on what and how long it took, for the JSON and the first line.
        dimensions: Numbers in one x0: rates of the profile are per dimension.
        recommended: What the profile says.
        noise: The schedule that the pipeline is trained with, as a recipe's section.
        noise_note: How that is known.
        draws: Where it draws.
        weight: The loss's weight on the x0 error at the recommendation's levels [K].
        weighting: Its name in a recipe.
        sampling: The recommended grid of each number of steps (see `sampling_steps`).
    """

    pipeline: str
    facts: Mapping[str, Any]
    dimensions: int
    recommended: Recommendation
    noise: Section
    noise_note: str
    draws: Histogram
    weight: Tensor
    weighting: str
    sampling: Mapping[int, Mapping[str, Any]]

    @property
    def nats(self) -> dict[str, float]:
        """Nats about the whole of x0, `gated` and `ungated`: upper bounds, the network's own error included."""
        profile, pivot = self.recommended.profile, self.recommended.pivot
        return {"gated": profile.nats(pivot) * self.dimensions, "ungated": profile.nats() * self.dimensions}

    @cached_property
    def efforts(self) -> dict[str, dict[str, Histogram]]:
        """Each of [`EFFORTS`] over the noise levels, under `this` schedule and under the `recommended` one."""
        error = self.recommended.profile.x0_error
        return {
            name: {
                "draws": draws,
                "effective": weighted(draws, self.weight),
                "loss": weighted(draws, self.weight * error),
            }
            for name, draws in (("this", self.draws), ("recommended", self.recommended.draws))
        }

    def headline(self) -> str:
        """The finding in one sentence."""
        low, high = (math.exp(end) for end in self.recommended.window)
        shares = self.recommended.shares(self.efforts["this"]["draws"])
        outside, below, above = (f"{100 * shares[key]:.0f} %" for key in ("outside", "below", "above"))
        return (
            f"{outside} of the draws fall outside the informative window, sigma {low:.3g} to {high:.3g}: "
            f"{below} below it, {above} above it."
        )

    def to_text(self) -> str:
        """All of it for a terminal."""
        found, nats = self.recommended, self.nats
        low, high = (math.exp(end) for end in found.window)
        lines = {
            "information": f"{number(nats['gated'])} nats gated, {number(nats['ungated'])} without the gate (upper "
            "bounds: the network's own error counts as information)",
            "pivot": f"sigma {found.pivot:.3g}, {RULES[found.pivot_rule]} ({found.kind} data)",
            "window": f"sigma {low:.3g} to {high:.3g} holds the central 90 % of the gated rate",
            "trained with": f"{_inline(self.noise)}{f' ({self.noise_note})' if self.noise_note else ''}, "
            f"objective.weighting {self.weighting}",
        }
        facts = [f"{label:13} {text}" for label, text in lines.items()]
        return "\n".join([self.headline(), "", *facts, "", self.table().to_text()])

    def table(self) -> Table:
        """The share of each effort outside the window."""
        rows = []
        for name, efforts in self.efforts.items():
            for effort, spent in efforts.items():
                shares = self.recommended.shares(spent)
                rows.append([SCHEDULES[name], EFFORTS[effort], *(f"{100 * share:5.1f} %" for share in shares.values())])
        return Table("Effort outside the window", ["schedule", "of the", "outside", "below", "above"], rows)

    def sampling_text(self) -> str:
        """The shorter grids, and how to use any."""
        what = "times" if self.facts["path"] == "flow" else "sigmas"
        lines = [f"Sampling {what}, grid '{SAMPLING_GRIDS[self.recommended.kind]}' (longer ones in diagnosis.json)"]
        for n, steps in self.sampling.items():
            if n <= 20:
                lines.append(f"  {n}: {' '.join(f'{sigma:.3g}' for sigma in steps['sigmas'])}")
        return "\n".join(lines)

    def noise_yaml(self) -> str:
        """The recommended `noise:` section, and the fixed distribution nearest to it as a comment."""
        found = self.recommended
        pivot = "the gate's pivot as found here" if found.section.pivot else "the gate's pivot for such data"
        learned = to_yaml({"noise": found.section.model_dump(exclude_unset=True) | {"type": "infonoise"}})
        fixed = to_yaml({"noise": found.log_normal.model_dump(exclude_unset=True) | {"type": "log_normal"}})
        return (
            f"# Recommended by `entrecipes diagnose` for {self.pipeline} on {found.kind} data:\n"
            f"# learn the schedule from the run's own losses, with {pivot}.\n"
            f"{learned}"
            "# Or keep it fixed, with the mean and deviation of log sigma of the gated rate:\n"
            f"{''.join(f'# {line}' for line in fixed.splitlines(keepends=True))}"
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers; the rates are nats per unit log sigma and image."""
        found = self.recommended
        rate = found.profile.rate * self.dimensions
        curves = {
            "log_sigma": found.profile.log_sigma,
            "rate": rate,
            "gate": gate(found.profile.log_sigma, found.pivot),
        }
        curves |= {f"{name}_{key}": spent.density for name, both in self.efforts.items() for key, spent in both.items()}
        return {
            "pipeline": self.pipeline,
            **self.facts,
            "dimensions": self.dimensions,
            "nats": self.nats,
            "data_kind": found.kind,
            "pivot": {"sigma": found.pivot, "rule": found.pivot_rule},
            "window_sigma": [math.exp(end) for end in found.window],
            "noise": self.noise.model_dump(),
            "noise_note": self.noise_note,
            "weighting": self.weighting,
            "shares": {
                name: {key: found.shares(spent) for key, spent in both.items()} for name, both in self.efforts.items()
            },
            "recommended": {"infonoise": found.section.model_dump(), "log_normal": found.log_normal.model_dump()},
            "sampling": {
                "grid": SAMPLING_GRIDS[found.kind],
                "steps": {str(n): steps for n, steps in self.sampling.items()},
            },
            "curves": {key: [float(f"{value:.6g}") for value in curve.tolist()] for key, curve in curves.items()},
        }


def plot_diagnosis(top: Axes, bottom: Axes, diagnosis: Diagnosis) -> None:
    """Above the information rate with the pivot and the window, below where the schedules spend their effort."""
    found = diagnosis.recommended
    window = tuple(math.exp(end) for end in found.window)
    log_sigma, rate = found.profile.log_sigma, found.profile.rate * diagnosis.dimensions
    rate_panel(top, log_sigma, rate, found.pivot, found.section.gate_order, window)
    top.set(title="Information at each noise level", ylabel="nats per\nunit log sigma")
    this = diagnosis.efforts["this"]
    curves = {
        "draws": (this["draws"].density, {"color": INK, "linewidth": 1.6}),
        "draws x weight": (this["effective"].density, {"color": INK, "linewidth": 1, "linestyle": (0, (4, 2))}),
        "loss": (this["loss"].density, {"color": ORANGE, "linewidth": 1.4}),
        "recommended draws": (found.draws.density, {"color": BLUE, "linewidth": 1.8}),
    }
    density_panel(bottom, log_sigma, curves, window)
    # the weight can pile the effective draws up at one end, far above all the others
    highest = max(float(density.max()) for label, (density, _) in curves.items() if label != "draws x weight")
    bottom.set(ylim=(0, 1.6 * highest))
    bottom.set(title="Where training spends its effort", xlabel=SIGMA)


def _inline(section: Section) -> str:
    """`log_normal, mean -0.6, std 1.2`; of a learned schedule only what is not the default."""
    few = isinstance(section, InfoNoiseSection)
    keys = section.model_dump(exclude={"type", "stratified"}, exclude_defaults=few)
    return ", ".join([section.type, *(f"{key} {value}" for key, value in keys.items())])
