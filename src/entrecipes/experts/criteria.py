"""Which channels, heads and features of a unit stay: what each is worth to the network, before any is cut.

Callables and a model only: this file knows no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.experts.units import KINDS, Unit, Units
from entrecipes.information.proxies import at_rest
from entrecipes.models.slim import Part, parts

Criterion = Literal["magnitude", "taylor", "diff_pruning", "random"]
Losses = Iterable[Callable[[], Tensor]]
"""One scalar loss for each noise level of the group, from the cleanest to the noisiest."""


def scores(
    units: Units,
    model: ModelMixin,
    criterion: Criterion,
    losses: Losses = (),
    threshold: float = 0.05,
    seed: int = 0,
) -> list[Tensor]:
    """What each atom is worth; the higher, the sooner it stays.

    - `magnitude`: sum of |w| over the matrices and kernels that lead to an atom's channels and away from them.
    - `taylor`: sum of |w g| over these and the biases and norms between, where g is the gradient of the loss summed
      over all noise levels (Molchanov et al. 2019, per group of channels).
    - `diff_pruning`: the same over the levels from the cleanest on, up to the first whose loss is below `threshold` of
      the largest so far (Diff-Pruning, arXiv 2305.10924: what comes later is nearly noise). The published sum runs
      over all timesteps, this one over the group's.
    - `random`: any.

    Args:
        units: The units of `model`.
        model: Measured in eval mode; its weights' `.grad` are left alone.
        criterion: One of these.
        losses: For `taylor` and `diff_pruning`; each is called once at most.
        threshold: Of `diff_pruning`.
        seed: Of `random`.

    Returns:
        Of each unit float64 [atoms] on the CPU. Of a block [1]: the sum over all that is in it.

    Raises:
        UserError: When weights or gradients are not finite, or gradients are asked for without losses.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(unit.atoms, generator=generator, dtype=torch.float64) for unit in units.units]
        return [values / values.sum() for values in drawn]
    if criterion == "magnitude":
        worth = {name: weight.detach().abs() for name, weight in model.named_parameters() if weight.ndim > 1}
    else:
        worth = _taylor(units, model, losses, threshold if criterion == "diff_pruning" else 0.0)
    result = [_of_unit(unit, model, worth) for unit in units.units]
    for unit, values in zip(units.units, result, strict=True):
        if not values.isfinite().all():
            raise UserError(
                f"experts.search.criterion: {criterion} of {unit.path} is not finite: the base has diverged; lower its "
                "optimizer.learning_rate and train it anew"
            )
    return result


def rankings(found: list[Tensor]) -> list[Tensor]:
    """From scores, of each unit its atoms, int64 [atoms], the best first and equal ones in their old order."""
    return [values.argsort(descending=True, stable=True) for values in found]


def shares(found: list[Tensor]) -> tuple[float, ...]:
    """Share of each unit in the sum over all atoms' scores; sums to 1, all alike for `random`."""
    sums = torch.stack([values.sum() for values in found])
    total = sums.sum()
    return tuple((sums / total if total > 0 else torch.full_like(sums, 1 / len(sums))).tolist())


def _modules(unit: Unit, model: ModelMixin) -> list[tuple[str, nn.Module]]:
    """What a unit's atoms lie in: its module, or of a block all that have a width."""
    kinds = tuple(KINDS.values()) if unit.kind == "blocks" else KINDS[unit.kind]
    module = model.get_submodule(unit.path)
    found = module.named_modules(prefix=unit.path) if unit.kind == "blocks" else [(unit.path, module)]
    return [(path, inner) for path, inner in found if isinstance(inner, kinds)]


def _of_unit(unit: Unit, model: ModelMixin, worth: dict[str, Tensor]) -> Tensor:
    """Sum up the worth of weights by atoms."""
    total = torch.zeros(unit.atoms, dtype=torch.float64)
    for path, module in _modules(unit, model):
        for part in parts(module):
            values = worth.get(f"{path}.{part.name}")
            if values is not None:
                total += _by_atoms(values, part, unit.atoms)
    return total


def _by_atoms(values: Tensor, part: Part, atoms: int) -> Tensor:
    rows = values.double().movedim(part.dim, 0).unflatten(0, (part.halves, atoms, -1))
    return rows.transpose(0, 1).flatten(1).sum(1).cpu()


def _taylor(units: Units, model: ModelMixin, losses: Losses, threshold: float) -> dict[str, Tensor]:
    """|w g| of every weight that belongs to a unit, with g summed over levels until the loss is small."""
    modules = dict(entry for unit in units.units for entry in _modules(unit, model))
    names = [f"{path}.{part.name}" for path, module in modules.items() for part in parts(module)]
    weights = [model.get_parameter(name) for name in names]
    sums, largest = None, 0.0
    with at_rest(model):
        for level in losses:
            loss = level()
            largest = max(largest, loss.item())
            if loss.item() < threshold * largest:
                break
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
    if sums is None:
        raise UserError("experts.search.criterion: there is no loss to take gradients of; set experts.search.draws")
    return {name: (w.detach() * g).abs() for name, w, g in zip(names, weights, sums, strict=True)}
