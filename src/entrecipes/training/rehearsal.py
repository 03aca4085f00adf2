"""A training step on tensors without memory: what it would hold, before anything is loaded.

Every operation is carried out as far as shapes go (torch's fake tensors: the model's own code, autograd, autocast,
gradient checkpointing and the optimizer run as they are), and a ledger counts the storages that are alive.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.family import Condition
from entrecipes.diffusion.objective import Objective
from entrecipes.recipe.schema import Recipe
from entrecipes.training.costs import StepCosts
from entrecipes.training.heap import Heap
from entrecipes.training.optimizer import build_optimizer

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
Workspace = Callable[[Any, tuple[Any, ...], Any], tuple[int, ...]]
"""Bytes of the blocks that an operation (overload, arguments, result) takes beside its result while it runs."""


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and the most that ever were.

    `heap`, where it is given, is asked for them as an allocator would be.
    """

    def __init__(self, workspace: Workspace, heap: Heap | None = None) -> None:
        super().__init__()
        self.workspace, self.heap = workspace, heap
        self.known: set[int] = set()
        self.now = self.most = 0
        self.at_most: Callable[[], None] = lambda: None
        """Called whenever there has never been as much."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            result = operation(*args, **(kwargs or {}))
        except DataDependentOutputException:  # a number that an optimizer asks for; memory does not depend on it
            return 1
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        needed = self.workspace(operation, args, result)
        if self.heap:
            for block in [self.heap.take(size) for size in needed]:
                self.heap.give(block)
        if self.now + sum(needed) > self.most:
            self.most = self.now + sum(needed)
            self.at_most()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            block = self.heap.take(size) if self.heap else None
            weakref.finalize(storage, self._drop, key, size, block)

    def _drop(self, key: int, size: int, block: tuple[int, int] | None) -> None:
        self.known.remove(key)
        self.now -= size
        if self.heap:
            self.heap.give(block)

    def settled(self) -> int:
        """Bytes that are alive once what only waits to be collected is gone."""
        gc.collect()
        return self.now


@contextlib.contextmanager
def rehearsing(
    device: torch.device, workspace: Workspace = lambda *_: (), heap: Heap | None = None
) -> Iterator[Ledger]:
    """Tensors made in here have a shape, a type and `device`, but no memory; the ledger counts what they would take.

    Args:
        workspace: What operations take beside their results.
        heap: Asked for the memory.
    """
    ledger = Ledger(workspace, heap)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), warnings.catch_warnings(), ledger:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # a module that is moved to where it is swaps its weights with themselves, which torch refuses for fake ones
        with mock.patch.object(torch.utils, "swap_tensors", lambda old, new: None):
            yield ledger


@dataclass(frozen=True)
class Held:
    """Bytes that a step holds. Gradients and activations are the most of each: not at the same moment."""

    weights: int
    average: int
    """The averaged model's (and a teacher's) that are not the model's own."""
    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps for the backward pass (see `StepCosts`)."""
    peak: int
    """The most that all of it comes to at any moment, with the batch and what operations need for the moment."""
    gradients_at_peak: int
    activations_at_peak: int
    holes: int
    """What the allocator holds beyond that when it holds the most; 0 without a heap."""

    @property
    def temporary_at_peak(self) -> int:
        """The batch, what operations pass on to each other, and their workspaces, when most is held."""
        kept = self.weights + self.average + self.optimizer
        return self.peak - kept - self.gradients_at_peak - self.activations_at_peak


@dataclass
class Step:
    """What is rehearsed; all of it was made inside `rehearsing`.

    Attributes:
        model: With `requires_grad` where it is trained.
        denoiser: Of `model`.
        x0: This process's share of a batch [n, ...], with its `condition`.
        average: The averaged model's weights, if there is one. teacher: Another model that is asked, too.
        weights, copies: Bytes of the model, and of both of these.
    """

    recipe: Recipe
    model: nn.Module
    denoiser: Denoiser
    objective: Objective
    x0: Tensor
    condition: Condition
    average: list[Tensor]
    teacher: Denoiser | None
    weights: int
    copies: int

    def take(self, optimizer: Optimizer, costs: StepCosts) -> None:
        """As `training.loop.step`, as far as memory goes."""
        training, x0 = self.recipe.training, self.x0
        noise, level = torch.randn_like(x0), torch.zeros(len(x0), dtype=torch.float64)
        size = training.micro_batch_size or len(x0)
        for start in range(0, min(len(x0), 2 * size), size):  # all further ones hold what the second does
            rows = slice(start, start + size)
            asked = self.condition if self.condition is None else self.condition[rows]
            with costs.watch():
                loss = self._loss(x0[rows], noise[rows], level[rows], asked)
                (loss.sum() / len(x0)).backward()
        if training.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained(self.model), training.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _loss(self, x0: Tensor, noise: Tensor, level: Tensor, asked: Condition) -> Tensor:
        half = HALF.get(self.recipe.training.precision)
        with torch.autocast(x0.device.type, half, enabled=half is not None):
            prediction, target = self.denoiser(x0, noise, level, asked)
        prediction = convert_outputs_to_fp32(lambda: prediction)()
        loss = self.objective(prediction, target, level)[0]
        if self.teacher is not None:
            with torch.no_grad():
                told, _ = self.teacher(x0, noise, level, asked)
            loss = loss + self.objective(prediction, told, level)[0]
        return loss


def rehearse(step: Step, ledger: Ledger) -> Held:
    """Take two steps (the first one makes the optimizer's state) and count what the second holds."""
    optimizer, costs = build_optimizer(step.recipe.optimizer, step.model), StepCosts(step.model)
    for group in optimizer.param_groups:
        if step.x0.is_cuda and not group.get("fused") and group.get("foreach", False) is None:
            group["foreach"] = True  # torch chooses so for real tensors there
    arrived: dict[int, int] = {}
    moment = (0, 0)

    def note() -> None:
        nonlocal moment
        moment = sum(arrived.values()), costs.saved_now

    hooks = [
        weight.register_post_accumulate_grad_hook(lambda weight: arrived.update({id(weight): weight.grad.nbytes}))
        for weight in trained(step.model)
    ]
    for _ in range(2):  # the second counts
        costs.begin()
        arrived.clear()
        ledger.settled()
        ledger.most, ledger.at_most = 0, note
        if ledger.heap:
            ledger.heap.most = ledger.heap.held
        step.take(optimizer, costs)
        row = costs.take(optimizer)
    ledger.at_most = lambda: None
    for hook in hooks:
        hook.remove()
    state, saved = row["optimizer_bytes"], row["saved_bytes"]
    holes = ledger.heap.most - ledger.most if ledger.heap else 0
    return Held(step.weights, step.copies, row["gradient_bytes"], state, saved, ledger.most, *moment, holes)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that have `requires_grad`."""
    return [weight for weight in model.parameters() if weight.requires_grad]
