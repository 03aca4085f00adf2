"""Linear layers of blocks that were never opened, held in 4 or 8 bits while others are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entrecipes.blocks.adapters import linear_layers
from entrecipes.diffusion.quantised import quantised

PLACE = "blocks.closed"


@dataclass
class _Held:
    """One layer: what stands in its place on the device, and what it is."""

    quantised: nn.Linear
    linear: nn.Linear
    others: list[nn.Linear]
    """Those of the copies, which share its weights."""
    host: dict[nn.Parameter, Tensor]
    """Its weights in the host's memory."""
    device: torch.device


class ClosedLayers:
    """Holds the linear layers of blocks quantised until one of their weights may be trained for the first time.

    A layer that was never trained is what the run began with, and so is its average, to the bit: one copy in the host's
    memory (pinned for CUDA) is all that is kept of both, and the layer gets its weights back from there when it is
    opened. Once opened it stays in full precision, also when it is closed again, since its average goes on moving.
    Evaluation, checkpoints and publishing work on whole weights (`whole`), so that nothing quantised leaves the run.

    It pays where blocks stay closed for long: on the device a closed weight takes half a byte (nf4) or one (int8) in
    place of four, with EMA of eight; but each evaluation and checkpoint brings the closed layers to the device for a
    while, so that what it saves is memory beside activations. Open blocks meet rounded neighbours until those open: in
    fine-tuning a digit DiT of 1.8 M weights, the 4 lower of 6 blocks closed for the first half, held-out nats ended at
    39.526 and 39.761 with int8 (two seeds; the same without) and at 39.858 and 40.089 with nf4. It is not worth it
    where all blocks open soon: the peak then is that of a full step.
    """

    def __init__(self, how: str | None, model: nn.Module, copies: Sequence[nn.Module] = ()) -> None:
        """Args: `how` is nf4 or int8, None holds nothing; `copies` are averages of the model."""
        self.how, self.models, self.begun = how, (model, *copies), False
        self.layers = linear_layers(model, PLACE) if how else []
        self.held: dict[str, _Held] = {}

    def open(self, trained: Callable[[str], bool], closed: Collection[str] | None = None) -> None:
        """Give back the layers that may be trained; the first time, hold all others.

        Args:
            trained: Whether the weight of a name may be trained from now on.
            closed: What `names` gave at a checkpoint, to go on from there.
        """
        wanted = set(self.held if self.begun else self.layers) if closed is None else set(closed)
        self.begun = True
        wanted = {name for name in wanted if not (trained(f"{name}.weight") or trained(f"{name}.bias"))}
        for name in [name for name in self.held if name not in wanted]:
            self._give_back(name)
        for name in self.layers:
            if name in wanted and name not in self.held:
                self._hold(name)

    def names(self) -> list[str]:
        """Paths of the layers that are held quantised."""
        return list(self.held)

    @contextmanager
    def whole(self, changed: bool = False) -> Iterator[None]:
        """Within, the model and its copies have all weights, in full precision and on the device.

        Args:
            changed: Weights are loaded within.
        """
        for name, held in self.held.items():
            for weight, host in held.host.items():
                weight.data = host.to(held.device, non_blocking=True)
            self._put(name, held.linear, *held.others)
        try:
            yield
        finally:
            for name, held in self.held.items():
                if changed:
                    held.quantised = self._quantised(held.linear)
                    held.host = _to_host(held.linear)
                for weight, host in held.host.items():
                    weight.data = host
                self._put(name, *[held.quantised] * len(self.models))

    def _hold(self, name: str) -> None:
        linear, *others = (model.get_submodule(name) for model in self.models)
        linear.requires_grad_(False)
        device, stand_in = linear.weight.device, self._quantised(linear)
        for other in others:
            other.weight, other.bias = linear.weight, linear.bias
        self.held[name] = _Held(stand_in, linear, others, _to_host(linear), device)
        for weight, host in self.held[name].host.items():
            weight.data = host
        self._put(name, *[stand_in] * len(self.models))

    def _give_back(self, name: str) -> None:
        held = self.held.pop(name)
        for weight, host in held.host.items():
            weight.data = host.to(held.device)
        for other in held.others:
            other.weight, other.bias = copy.deepcopy(held.linear.weight), copy.deepcopy(held.linear.bias)
        self._put(name, held.linear, *held.others)

    def _put(self, name: str, *layers: nn.Module) -> None:
        for model, layer in zip(self.models, layers, strict=True):
            model.set_submodule(name, layer)

    def _quantised(self, linear: nn.Linear) -> nn.Linear:
        layer = quantised(linear, self.how, PLACE)
        if layer.bias is not None:  # that of the layer leaves the device
            layer.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return layer


def _to_host(linear: nn.Linear) -> dict[nn.Parameter, Tensor]:
    pin = linear.weight.device.type == "cuda"
    found = {weight: weight.data.to("cpu") for weight in linear.parameters()}
    return {weight: host.pin_memory() if pin else host for weight, host in found.items()}
