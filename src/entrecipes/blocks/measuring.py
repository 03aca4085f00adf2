"""The pass behind block scores: every block skipped in turn on common draws, each prefix computed once.

A skipped block changes nothing before it, so that what the blocks before it returned is kept from the full pass: about
half of the passes that skipping each block afresh would take. One mini-batch's hidden states of all blocks are held in
memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from entrecipes.blocks.scores import BlockScores
from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.quantised import expanded
from entrecipes.errors import UserError

KEYS = ("mean", "square", "loss", "output_distance", "log_spread", "abs_log_spread")
TINY = 1e-12
"""Least variance, so that a constant prediction has a logarithm."""


@dataclass(frozen=True)
class Draw:
    """A mini-batch at one noise level, the same inputs at every call.

    Args:
        level: Index of its noise level.
        call: Runs the model on it: prediction and target, both [n, ...], in the model's own prediction space.
        counted: How many of the n samples count, from the front; None: all.
    """

    level: int
    call: Callable[[], tuple[Tensor, Tensor]]
    counted: int | None = None


@torch.no_grad()
def measure_blocks(
    stack: BlockStack,
    draws: Iterable[Draw],
    *,
    log_sigma: Tensor,
    x0_error_scale: Tensor,
    gate_pivot: float | None = None,
    gone: Collection[int] = (),
    gradients: bool = True,
    origin: dict[str, Any] | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> BlockScores:
    """Score every block of a model (put it into eval mode first; it is left as it was found).

    Args:
        stack: The model's blocks.
        draws: Mini-batches, those of one level together; about 1,000 samples in all (Ent-Prog, section 3).
        log_sigma: The noise levels [L].
        x0_error_scale: x0 error per squared error of the prediction at each level [L] (`GaussianPath.x0_error_scale`).
        gate_pivot: Sigma at which the information's gate is one half; None: no gate.
        gone: Blocks that count as removed already: skipped throughout, and without scores (their rows are NaN).
        gradients: Also measure the Taylor score, which takes one more forward and backward pass.
        origin: Kept with the scores.
        total: Adds up tensors of processes that have drawn a part each, all of them of every level.

    Raises:
        UserError: When a level has no draws or they are scattered, or a prediction is not finite.
    """
    start, count = time.perf_counter(), len(stack)
    left = [index for index in range(count) if index not in gone]
    tally, taylor = _Tally(count + 1, len(log_sigma), total), _Taylor(stack) if gradients else None
    for draw in draws:
        with stack.skipped(*gone):
            _skip_each(stack, draw, left, tally)
            if taylor:
                taylor.add(draw)
    every = tally.tables()
    every["x0_error"] = every["loss"] * x0_error_scale.double().cpu()
    skipped = {key: table[:-1] for key, table in every.items()}
    fixed = {"magnitude": _magnitude(stack)} | ({"taylor": taylor.scores(total)} if taylor else {})
    for table in (*skipped.values(), *fixed.values()):
        if not bool(table[left].isfinite().all()):
            raise UserError("a prediction without one of the blocks is not finite: the weights are damaged or overflow")
        table[list(gone)] = torch.nan
    samples = int(tally.samples.sum())
    passes = samples * (1 + sum(count - 1 - index for index in left) / count + (3 if gradients else 0))
    return BlockScores(
        paths=tuple(block.paths[0] for block in stack.blocks),
        log_sigma=log_sigma.double().cpu(),
        dimensions=tally.shape,
        full={key: every[key][-1] for key in ("mean", "square", "loss", "x0_error")},
        skipped=skipped,
        fixed=fixed,
        gate_pivot=gate_pivot,
        origin=(origin or {}) | {"samples": samples, "passes": round(passes), "seconds": time.perf_counter() - start},
    )


def _skip_each(stack: BlockStack, draw: Draw, blocks: list[int], tally: _Tally) -> None:
    """The full pass, and one without each block, which starts from what the full pass left behind."""
    with stack.recorded() as calls:
        full, target = draw.call()
    samples, part = len(full), slice(draw.counted)
    full, target = full[part], target[part]
    tally.add(len(stack), draw.level, full, target, full)
    for index in blocks:
        before, after = stack.hidden_states(index, calls)
        alike = cosine_similarity(before.double(), after.double(), dim=-1).reshape(samples, -1).mean(1)
        tally.bi[index, draw.level] += (1 - alike[part]).sum()
        with stack.skipped(index, calls=calls):
            tally.add(index, draw.level, draw.call()[0][part], target, full)


class _Tally:
    """Sums over the draws of each noise level, a row for each block and the last for the full model; on the device."""

    def __init__(self, rows: int, levels: int, total: Callable[[Tensor], Tensor]) -> None:
        self.rows, self.levels, self.shape, self.total = rows, levels, 0, total
        self.level, self.done = -1, set[int]()

    def _begin(self, prediction: Tensor) -> None:
        """Everything lies where the predictions do."""
        zeros = prediction.new_zeros(self.rows, self.levels, dtype=torch.float64)
        self.sums = {key: zeros.clone() for key in KEYS}
        self.bi, self.shift, self.samples = zeros.clone(), zeros.clone(), zeros[0].clone()
        self.shape = prediction[0].numel()

    def add(self, row: int, level: int, prediction: Tensor, target: Tensor, full: Tensor) -> None:
        """Add a batch: a prediction, its target and the full model's prediction [n, ...]."""
        if not self.shape:
            self._begin(full)
        if level != self.level:
            self._finish_level()
            if level in self.done:
                raise UserError(f"the draws of noise level {level} must come one after another; sort them by level")
            self.level, self.drift = level, prediction.new_zeros(self.rows, self.shape, dtype=torch.float64)
        prediction, target, full = (part.flatten(1).double() for part in (prediction, target, full))
        ratio = 0.5 * (prediction.var(1).clamp(min=TINY) / full.var(1).clamp(min=TINY)).log()
        distance, error = (prediction - full).square(), (prediction - target).square()
        moments = (prediction.mean(1), prediction.square().mean(1), error.mean(1), distance.mean(1), ratio, ratio.abs())
        for key, values in zip(KEYS, moments, strict=True):
            self.sums[key][row, level] += values.sum()
        self.drift[row] += (prediction - full).sum(0)
        if row == self.rows - 1:
            self.samples[level] += len(prediction)

    def _finish_level(self) -> None:
        """The mean of each element can be compared only when all draws of a level are in."""
        if self.level >= 0:
            self.done.add(self.level)
            columns = [table[:, self.level] for table in (*self.sums.values(), self.bi)]
            counted = self.samples[self.level].expand(self.rows)
            summed = self.total(torch.cat([self.drift, torch.stack([*columns, counted], dim=1)], dim=1))
            for column, values in zip(columns, summed[:, self.shape : -1].unbind(1), strict=True):
                column.copy_(values)
            self.samples[self.level] = n = summed[0, -1]
            drift = summed[:, : self.shape] / n
            distance, shift = self.sums["output_distance"][:, self.level] / n, drift.square().mean(1)
            # a mean over n draws has a square of its own: the variance of the distance, over n
            self.shift[:, self.level] = (shift - (distance - shift) / (n - 1).clamp(min=1)).clamp(min=0).sqrt()

    def tables(self) -> dict[str, Tensor]:
        """Means over samples [rows, L] on the CPU; `mean_shift` is the root mean square over elements, in standard
        deviations of the full model's prediction.

        Raises:
            UserError: When a level has no draws.
        """
        if not self.shape:
            raise UserError("there is nothing to score blocks on: no draws were given")
        self._finish_level()
        if missing := sorted(set(range(len(self.samples))) - self.done):
            raise UserError(f"there are no draws of noise level {missing[0]}; give some for each of log_sigma")
        means = {key: total / self.samples for key, total in (self.sums | {"bi": self.bi}).items()}
        deviation = (means["square"][-1] - means["mean"][-1].square()).clamp(min=TINY).sqrt()
        return {key: table.cpu() for key, table in (means | {"mean_shift": self.shift / deviation}).items()}


class _Taylor:
    """First-order estimate of what a block's weights matter to the loss, from gradients summed over all draws.

    Quantised weights have no gradients and are left out.
    """

    def __init__(self, stack: BlockStack) -> None:
        modules = [stack.modules(i) for i in range(len(stack))]
        self.weights = [[p for m in block for p in m.parameters() if p.is_floating_point()] for block in modules]
        self.sums = [[torch.zeros_like(p) for p in block] for block in self.weights]

    def add(self, draw: Draw) -> None:
        flat = [p for block in self.weights for p in block]
        with torch.enable_grad(), trainable(flat):
            prediction, target = draw.call()
            loss = (prediction.float() - target.float()).square().flatten(1).mean(1)[: draw.counted].sum()
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
        for total, gradient in zip((s for block in self.sums for s in block), gradients, strict=True):
            if gradient is not None:  # None: a block that counts as removed
                total += gradient

    def scores(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of |weight * gradient| over each block [B]."""
        pairs = [zip(*block, strict=True) for block in zip(self.weights, self.sums, strict=True)]
        sums = [sum(float((weight * total(gradient)).abs().sum()) for weight, gradient in block) for block in pairs]
        return torch.tensor(sums, dtype=torch.float64)


@contextlib.contextmanager
def trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, gradients flow to these, frozen or not."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


def _magnitude(stack: BlockStack) -> Tensor:
    """Mean |weight| of each block [B]."""
    found = []
    for index in range(len(stack)):
        layers = [layer for module in stack.modules(index) for layer in module.modules()]
        weights = [weight.detach() for layer in layers for weight in expanded(layer)]
        found.append(sum(float(w.abs().sum()) for w in weights) / sum(w.numel() for w in weights))
    return torch.tensor(found, dtype=torch.float64)
