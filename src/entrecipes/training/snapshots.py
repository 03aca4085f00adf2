"""A run's weights, put aside and taken back in mid-run, for schedules that try what they may not keep."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from entrecipes.training.run import Run


def snapshot(run: Run) -> dict[str, Any]:
    """A copy of what training moves: the weights that may be trained, their average and the optimizer's state."""
    return copy.deepcopy(
        {
            "model": run.adapter.state_dict(run.model),
            "ema": run.adapter.state_dict(run.ema.model) if run.ema else {},
            "optimizer": run.optimizer.optimizer.state_dict(),
        }
    )


def restore(run: Run, state: dict[str, Any]) -> None:
    """Go back to a snapshot, which stays as it is; the optimizer must be over the same weights as then."""
    run.adapter.load_state_dict(run.model, state["model"])
    if run.ema:
        run.adapter.load_state_dict(run.ema.model, state["ema"])
    run.optimizer.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    match_memory_format(run.optimizer.optimizer)


def match_memory_format(optimizer: Optimizer) -> None:
    """Give loaded moments the strides of their weights, which fused kernels rely on and checkpoints don't keep."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
