"""Zero-shot proxies: how well a network would train, from a few gradients; and the vote that picks a candidate by them.

`ntk_condition` is after TE-NAS (Chen et al. 2021, arXiv 2102.11535), `zico` is ZiCo (Li et al. 2023, arXiv 2301.11300),
and `vote` is the rank sum of AutoProg-Zero's public code, whose authors wrote EntPruner. Where the published form
misleads in a search over depth, the default here differs and says so. A number that is not finite is always the worst
one: turned into 0, a NaN condition number would be the best.

A model and callables only. Both proxies measure in eval mode, where neither dropout nor running statistics interfere,
and leave the model as they found it: its modes, its buffers, its `.grad`, torch's global random numbers. They take the
bare module, not its distributed wrapper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from entrecipes.errors import UserError

Losses = Sequence[Callable[[], Tensor]]
"""Each returns a scalar that depends on the model's weights. With more weights than fit, it is called several times."""

SINGULAR = torch.finfo(torch.float32).eps ** 2
"""Smallest eigenvalue of the Gram matrix that counts, as a share of the largest: the rounding of float32 gradients
moves singular values by eps of the largest, and these are squared."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The layers that ZiCo reads."""

TIE = 1e-6
"""Numbers that are relatively as close as this share a rank."""


def ntk_condition(model: nn.Module, losses: Losses, gib: float = 4.0) -> float:
    """Condition number of the empirical neural tangent kernel; the lower, the more evenly the samples can be learned.

    The kernel is the Gram matrix of n gradients, one a sample, over all trainable parameters with at least two
    dimensions: matrices, kernels and tables, whatever they are called. (TE-NAS takes what is named 'weight', so that it
    leaves biases out too: the gradient of an output's bias is the same for every sample.) It is summed up tensor by
    tensor in float64, so that memory is bounded: see `gib`.

    Args:
        model: The network.
        losses: One for each of n >= 2 samples, about 16: a projection of its prediction on fixed random signs, or its
            loss. (The published sum over outputs is nearly noise where the target has zero mean.)
        gib: Memory for gradients, in GiB. What is more than that (n times the size of the weights) is split into
            passes, each of which calls every loss once, on the same global random numbers. A tensor above it is taken
            alone, and one tensor's n gradients are once more in memory in float64.

    Returns:
        Largest eigenvalue over smallest, at least 1 and at most 1 / `SINGULAR`; inf, the worst, when a gradient is not
        finite or all are zero.

    Raises:
        UserError: For fewer than 2 samples, or a model without trainable matrices.
    """
    if len(losses) < 2:
        raise UserError(f"ntk_condition: {len(losses)} samples have no condition number; pass 2 or more, about 16")
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim >= 2]
    gram = sum((rows @ rows.T).cpu() for rows in _gradients(model, weights, losses, gib))
    if not bool(gram.isfinite().all()):
        return math.inf
    smallest, largest = torch.linalg.eigvalsh(gram)[[0, -1]].tolist()
    return largest / max(smallest, SINGULAR * largest) if largest > 0 else math.inf


def zico(model: nn.Module, batch_losses: Losses, reduction: Literal["mean", "sum"] = "mean", gib: float = 4.0) -> float:
    """ZiCo: how large gradients are against their spread over batches; the higher, the faster the network should train.

    Of each weight w, mean_d |g_w| / std_d g_w over D batches, with the population's standard deviation of the signed
    gradient, as ZiCo's public code has it. Of each trainable linear and convolution layer, the logarithm of these over
    its weights, without those of no spread. In float64, so that equal gradients have none.

    Compare networks in the same state of training: one that has just lost blocks has a high loss, whose gradients agree
    between batches, and so scores higher than the whole one.

    Args:
        model: The network.
        batch_losses: The loss of each of D >= 2 batches. Take 4 or more: with two the ratio is (|a| + |b|) / |a - b|,
            which has no mean.
        reduction: "mean": of the layers' logarithms of mean ratios, which does not depend on depth or width as such.
            "sum": of the layers' logarithms of summed ratios, as published; every layer adds to it, so that among
            networks of different depth it votes for the deepest.
        gib: Memory for gradients, as in `ntk_condition`, with n = D.

    Returns:
        The score; -inf, the worst, when a gradient is not finite or no weight has any spread.

    Raises:
        UserError: For fewer than 2 batches, another reduction, or a model without trainable layers of these kinds.
    """
    if len(batch_losses) < 2:
        raise UserError(f"zico: {len(batch_losses)} batches have no spread; pass the losses of 4 or more (at least 2)")
    if reduction not in ("mean", "sum"):
        raise UserError(f"zico: there is no reduction '{reduction}'; take 'mean', or 'sum' as published")
    layers = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    weights = list(dict.fromkeys(weight for weight in layers if weight.requires_grad))  # a shared weight counts once
    scores = []
    for rows in _gradients(model, weights, batch_losses, gib):
        if not bool(rows.isfinite().all()):
            return -math.inf
        spread = rows.std(0, correction=0)
        ratio = (rows.abs().mean(0) / spread)[spread > 0]
        if len(ratio):
            scores.append((ratio.mean() if reduction == "mean" else ratio.sum()).log().item())
    if not scores:
        return -math.inf
    return sum(scores) / len(scores) if reduction == "mean" else sum(scores)


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of what a call computes, without gradients.

    Attention is counted in its plain form, since torch's counter knows no operations of the fused kernels of CPUs.
    """
    return flops_within(call, {})[0]


def flops_within(call: Callable[[], Any], modules: Mapping[str, nn.Module]) -> tuple[int, dict[str, int]]:
    """As `flops`, and those of each of these modules, by the same names."""
    counts = dict.fromkeys(modules, 0)

    def add(name: str, sign: int) -> Callable[..., None]:
        return lambda *_: counts.update({name: counts[name] + sign * counter.get_total_flops()})

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(add(name, -1)).remove)
            hooks.callback(module.register_forward_hook(add(name, 1)).remove)
        call()
    return counter.get_total_flops(), counts


@dataclass(frozen=True)
class Candidate:
    """What the vote knows of a network.

    Args:
        cost: Operations of a forward pass, seconds of a training step, or any other cost.
        kappa: From `ntk_condition`.
        zico: From `zico`.
    """

    cost: float
    kappa: float
    zico: float


@dataclass(frozen=True)
class Vote:
    """A vote, in the candidates' order.

    Args:
        candidates: Who stood.
        ranks: Of each its ranks by cost, kappa and zico; 1 is the best.
        totals: Of each the weighted sum of its ranks.
        winner: Index of the smallest total, the first one of equals.
    """

    candidates: tuple[Candidate, ...]
    ranks: tuple[tuple[int, int, int], ...]
    totals: tuple[float, ...]
    winner: int

    def to_row(self) -> dict[str, Any]:
        """The vote as plain numbers and lists, for JSON: null stands for a number that is not finite."""
        numbers = [
            {name: value if math.isfinite(value) else None for name, value in asdict(candidate).items()}
            for candidate in self.candidates
        ]
        ranks = [list(row) for row in self.ranks]
        return {"candidates": numbers, "ranks": ranks, "totals": list(self.totals), "winner": self.winner}


def vote(candidates: Sequence[Candidate], weights: tuple[float, float, float] = (1.0, 0.5, 0.5)) -> Vote:
    """Rank the candidates by cost (less is better), kappa (less) and zico (more), and add up the ranks.

    With the default weights, time counts as much as both proxies together: where both rank the candidates against
    time, all totals are equal and the first candidate wins. So put the one to fall back on first.

    Args:
        candidates: At least one.
        weights: Of the ranks by cost, kappa and zico.

    Raises:
        UserError: Without candidates.
    """
    if not candidates:
        raise UserError("vote: nobody stands; pass at least one candidate")
    columns = (
        [row.cost for row in candidates],
        [row.kappa for row in candidates],
        [-row.zico for row in candidates],
    )
    ranks = tuple(zip(*(_ranks(column) for column in columns), strict=True))
    totals = tuple(sum(weight * rank for weight, rank in zip(weights, row, strict=True)) for row in ranks)
    return Vote(tuple(candidates), ranks, totals, totals.index(min(totals)))


def _ranks(values: Sequence[float]) -> list[int]:
    """1 + how many are smaller by more than a tie; what is not finite comes last."""
    values = [value if math.isfinite(value) else math.inf for value in values]
    return [1 + sum(other < one and not math.isclose(other, one, rel_tol=TIE) for other in values) for one in values]


def _gradients(model: nn.Module, weights: list[Tensor], losses: Losses, gib: float) -> Iterator[Tensor]:
    """Of each weight in turn the gradients of all losses [n, numel], float64."""
    if not weights:
        raise UserError("the model has no trainable weights to score; unfreeze some with requires_grad_(True)")
    for group in _groups(weights, gib * 2**30 / len(losses)):
        with at_rest(model):
            gradients = [torch.autograd.grad(loss(), group, materialize_grads=True) for loss in losses]
        for rows in zip(*gradients, strict=True):
            yield torch.stack(rows).flatten(1).double()
        del gradients, rows  # or else the next pass takes twice the memory


def _groups(weights: list[Tensor], limit: float) -> Iterator[list[Tensor]]:
    """Runs of weights of at most `limit` bytes, or of a single one."""
    group, size = [], 0
    for weight in weights:
        if group and size + weight.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(weight)
        size += weight.nbytes
    yield group


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; afterwards every module's mode and the global random numbers are what they were."""
    training = [module for module in model.modules() if module.training]
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
