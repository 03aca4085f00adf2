"""What each block is worth to a model: the published scores, the usual ones and our own, from one pass over draws.

All come from skipping one block at a time on the same x0, noise, noise level and condition, so that differences between
blocks are differences of the blocks. Tables are [blocks, levels], float64, on the CPU; `measuring` fills them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from scipy.stats import spearmanr
from torch import Tensor

from entrecipes.errors import UserError, nearest
from entrecipes.fingerprint import fingerprint
from entrecipes.information.nats import gate, integrate_nats

SCORES = {
    "information": "nats about x0 lost without the block (gated integral of the rise of the x0 error over sigma^2)",
    "loss_rise": "rise of the mean squared error of the prediction",
    "output_distance": "mean squared distance to the full model's prediction",
    "mean_shift": "shift of the mean prediction, in standard deviations (LD-Pruner's first term)",
    "bi": "1 - cosine of the block's input and output (ShortGPT, Men et al. 2024)",
    "cei": "log ratio of the prediction's spread without and with the block, signed (Ent-Prog), pooled",
    "cei_timestep": "the same for each noise level, then the mean",
    "cei_sample": "the same for each sample, then the mean",
    "ced": "absolute value of cei (EntPruner)",
    "ced_timestep": "absolute value at each noise level, then the mean",
    "ced_sample": "absolute value for each sample, then the mean",
    "taylor": "sum of |weight * gradient| over the block's weights (Molchanov et al. 2019)",
    "magnitude": "mean |weight| of the block",
}
"""Every measured score; a high one means: keep the block."""


@dataclass(frozen=True)
class BlockScores:
    """What was measured of each block of one model on one data set.

    Args:
        paths: The blocks' paths in the model, in the order in which they run.
        log_sigma: Noise levels [L], even in log sigma.
        dimensions: Numbers in one x0.
        full: Of the full model at each level [L]: `mean` and `square` (moments of the prediction over all draws and
            elements), `loss` (mean squared error of the prediction), `x0_error` (per dimension).
        skipped: The same tables without each block [B, L], and `output_distance`, `mean_shift`, `bi`, `log_spread`
            (mean over samples of the log ratio of standard deviations) and `abs_log_spread`.
        fixed: Scores without noise levels [B]: `taylor` (where measured) and `magnitude`.
        gate_pivot: Sigma at which the information's gate is one half; None: no gate.
        origin: Model, data, their fingerprints, counts, seed, seconds, passes.
    """

    paths: tuple[str, ...]
    log_sigma: Tensor
    dimensions: int
    full: dict[str, Tensor]
    skipped: dict[str, Tensor]
    fixed: dict[str, Tensor]
    gate_pivot: float | None
    origin: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The scores that were measured."""
        return [name for name in SCORES if name not in ("taylor", "magnitude") or name in self.fixed]

    def score(self, name: str, weights: Tensor | None = None) -> Tensor:
        """One score of every block [B], in nats for `information`, `cei*` and `ced*`; higher: keep.

        Args:
            name: One of `SCORES`.
            weights: Share of the draws at each level [L], such as a noise schedule's; None: all levels alike.
                `information` has weights of its own (the gate over sigma^2), `taylor` and `magnitude` know no levels.

        Raises:
            UserError: For an unknown name, or a score that was not measured.
        """
        if name not in SCORES:
            raise UserError(f"there is no score '{name}'{nearest(name, list(SCORES))}")
        if name not in self.names:
            raise UserError(f"the score {name} was not measured here; measure it with gradients")
        if name in self.fixed:
            return self.fixed[name]
        if name == "information":
            return self.information()
        weights = torch.ones_like(self.log_sigma) if weights is None else weights.double()
        weights = weights / weights.sum()
        table = self.by_level(name)
        if name in ("cei", "ced"):
            pooled = 0.5 * (_variance(self.skipped, weights) / _variance(self.full, weights)).log()
            return pooled.abs() if name == "ced" else pooled
        return table @ weights

    def by_level(self, name: str) -> Tensor:
        """A score at each noise level [B, L] (for `information` nats per unit log sigma, before integration).

        Raises:
            UserError: For a score without noise levels.
        """
        if name in ("taylor", "magnitude"):
            raise UserError(f"the score {name} has no noise levels")
        if name == "information":
            return gate(self.log_sigma, self.gate_pivot) * self._x0_rise() * torch.exp(-2 * self.log_sigma)
        if name == "loss_rise":
            return self.skipped["loss"] - self.full["loss"]
        if name in ("cei_sample", "ced_sample"):
            return self.skipped["log_spread" if name == "cei_sample" else "abs_log_spread"]
        if name.startswith(("cei", "ced")):
            ratio = 0.5 * (_variance(self.skipped) / _variance(self.full)).log()
            return ratio.abs() if name.startswith("ced") else ratio
        return self.skipped[name]

    def information(self) -> Tensor:
        """Nats about x0 that the model loses without each block [B]: our own score.

        The integral over log sigma of gate * (x0 error without the block - x0 error) / sigma^2, summed over dimensions.
        """
        return integrate_nats(self.log_sigma, self._x0_rise(), gate(self.log_sigma, self.gate_pivot))

    def _x0_rise(self) -> Tensor:
        return (self.skipped["x0_error"] - self.full["x0_error"]) * self.dimensions

    def correlations(self, other: str = "loss_rise", weights: Tensor | None = None) -> dict[str, float]:
        """Spearman's rank correlation of every score with another one; NaN where a score is the same for all blocks."""
        against = self.score(other, weights)
        return {name: spearman(self.score(name, weights), against) for name in self.names}

    def warnings(self, name: str, blocks: Collection[int], weights: Tensor | None = None) -> list[str]:
        """What speaks against removing the `blocks` that rank lowest by a score: those that matter to the loss."""
        rise = self.score("loss_rise", weights).nan_to_num(-math.inf)
        important = rise.argsort(descending=True)[: len(rise) // 3].tolist()
        return [
            f"{name} would remove block {index}, whose loss rise ({rise[index]:.3g}) is among the highest third"
            for index in blocks
            if index in important and rise[index] > 0
        ]

    def check_fits(self, model: str, data: str, place: str) -> None:
        """Refuse scores of another model or data set.

        Args:
            model: Fingerprint of the model at hand.
            data: Fingerprint of its data.
            place: Where these scores come from, for the message.

        Raises:
            UserError: Naming what differs.
        """
        for what, mine in (("model", model), ("data", data)):
            if self.origin.get(f"{what}_fingerprint") != mine:
                other = {"model": "with another model", "data": "on another data set"}[what]
                raise UserError(
                    f"{place}: these scores were measured {other} ({self.origin.get(what, 'unknown')}); measure them "
                    "again with `entrecipes score`"
                )

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain numbers and lists."""
        return {
            "paths": list(self.paths),
            "log_sigma": self.log_sigma.tolist(),
            "dimensions": self.dimensions,
            "gate_pivot": self.gate_pivot,
            "origin": self.origin,
            **{part: {key: table.tolist() for key, table in getattr(self, part).items()} for part in _TABLES},
        }

    @classmethod
    def from_json(cls, path: str | Path) -> BlockScores:
        """Read what `to_json` gave from a file. Raises UserError when it is missing or no such file."""
        try:
            values = json.loads(Path(path).read_text())
            tables = {part: {key: _table(rows) for key, rows in values[part].items()} for part in _TABLES}
            known = {key: values[key] for key in ("dimensions", "gate_pivot", "origin")}
            return cls(paths=tuple(values["paths"]), log_sigma=_table(values["log_sigma"]), **known, **tables)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; `entrecipes score` writes it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no file of `entrecipes score` ({error}); measure the scores again") from error


_TABLES = ("full", "skipped", "fixed")


def _table(rows: Sequence[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _variance(moments: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
    """Variance of a prediction from its moments [..., L]: at each level, or over all levels by their weights."""
    mean, square = moments["mean"], moments["square"]
    if weights is not None:
        mean, square = mean @ weights, square @ weights
    return (square - mean.square()).clamp(min=1e-12)


def model_fingerprint(model: ModelMixin) -> str:
    """Hash of a model's class, config and weights; the same after saving and loading."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    config = json.dumps(config, sort_keys=True, default=str)  # which writes tuples as the lists that loading makes
    state = model.state_dict()
    return fingerprint(type(model).__name__, config, *(part for name in sorted(state) for part in (name, state[name])))


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two scores [B], blocks without one left out; NaN where one of them is constant."""
    measured = ~(first.isnan() | second.isnan())
    first, second = first[measured], second[measured]
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return math.nan
    return float(spearmanr(first, second).statistic)
