"""What a training step holds in memory, measured (not computed) once for every set of weights that is trained."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class StepCosts:
    """Watches the first step with each trained set; on all others it costs a walk over the parameters.

    Saved activations are the bytes of all distinct storages that autograd holds at once for the backward pass, weights
    apart (copies of weights in another precision count: they are held as long). With gradient checkpointing, what the
    block that is being recomputed saves comes on top. A gradient-accumulating step counts its largest pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: `model` is trained."""
        self.model = model
        self.tally: _Tally | None = None
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
        sharded = any(isinstance(weight, DTensor) for weight in focused)  # whole ones come and go in the pass
        if sharded or (trained in self.seen and self.row is None):
            yield
            return
        self.seen.add(trained)
        tally = self.tally = _Tally({_storage(weight) for weight in self.model.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda kept: kept.tensor):
            yield
        saved = max(tally.most, self.row["saved_bytes"] if self.row else 0)
        gradients = sum(weight.grad.nbytes for weight in focused if weight.grad is not None)
        self.row = {"trained_parameters": trained, "saved_bytes": saved, "gradient_bytes": gradients}

    @property
    def saved_now(self) -> int:
        """Bytes that autograd holds at this moment of a watched step."""
        return self.tally.now if self.tally else 0

    def take(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The row of the step that has just been taken, if it was watched, with the optimizer's state; once."""
        if self.row is None:
            return None
        row, self.row = self.row, None
        return row | {"optimizer_bytes": state_bytes(optimizer.state.values())}


class _Kept:
    """A tensor that autograd holds; it goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Tally:
    """Bytes of the distinct storages that are held now, and the most that ever were."""

    def __init__(self, apart: set[int]) -> None:
        """Args: these storages are not counted."""
        self.apart, self.holders = apart, Counter()
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> _Kept:
        """Count a tensor until it is let go (a frozen checkpointed block's input is at once)."""
        kept, storage, size = _Kept(tensor), _storage(tensor), tensor.untyped_storage().nbytes()
        if storage not in self.apart:
            self._add(storage, size, 1)
            weakref.finalize(kept, self._add, storage, size, -1)
        return kept

    def _add(self, storage: int, size: int, by: int) -> None:
        before = self.holders[storage] > 0
        self.holders[storage] += by
        self.now += size * ((self.holders[storage] > 0) - before)
        self.most = max(self.most, self.now)


def _storage(tensor: Tensor) -> int:
    """What tells the storage of a tensor from others that are alive, also of tensors without memory."""
    return tensor.untyped_storage()._cdata


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of these tensors."""
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def state_bytes(states: Iterable[dict[str, Any]]) -> int:
    """Bytes of all tensors in an optimizer's state; what several weights share counts once."""
    return held_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
