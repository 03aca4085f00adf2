"""What a training step holds in memory, measured (not computed) once for every set of weights that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class StepCosts:
    """Watches the first step with each trained set; on all others it costs a walk over the parameters.

    Saved activations are the bytes of all distinct storages that autograd keeps for the backward pass, weights apart
    (copies of weights in another precision count: they are held as long). A gradient-accumulating step counts its
    largest forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: `model` is trained."""
        self.model = model
        self.begin()

    def begin(self, model: nn.Module | None = None) -> None:
        """Forget what was measured: the trained set (or the model) has changed."""
        self.model = model or self.model
        self.seen: set[int] = set()
        self.row: dict[str, Any] | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around a forward and a backward pass."""
        focused = [weight for weight in self.model.parameters() if weight.requires_grad]
        trained = sum(weight.numel() for weight in focused)
        if trained in self.seen and self.row is None:
            yield
            return
        self.seen.add(trained)
        weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        saved = max(sum(held.values()), self.row["saved_bytes"] if self.row else 0)
        gradients = sum(weight.grad.nbytes for weight in focused if weight.grad is not None)
        self.row = {"trained_parameters": trained, "saved_bytes": saved, "gradient_bytes": gradients}

    def take(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The row of the step that has just been taken, if it was watched, with the optimizer's state; once."""
        if self.row is None:
            return None
        row, self.row = self.row, None
        return row | {"optimizer_bytes": state_bytes(optimizer.state.values())}


def state_bytes(states: Iterable[dict[str, Any]]) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
