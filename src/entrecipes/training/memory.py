"""What a training step will hold in memory, by component, predicted before it is taken.

The step is rehearsed without memory (`training.rehearsal`) on the recipe's own model, micro batch, precision and
optimizer; what surrounds it (the data, a VAE, the process itself) is added. Not counted: evaluation, sampling, what a
wrapper over several processes keeps beside the gradients, and the copies that `blocks.mode: snapshot` puts aside.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entrecipes.diffusion.pipelines import best_device
from entrecipes.errors import UserError
from entrecipes.recipe.schema import Recipe
from entrecipes.training.costs import held_bytes, state_bytes
from entrecipes.training.heap import Heap
from entrecipes.training.rehearsal import Held, rehearse, rehearsing
from entrecipes.training.skeleton import frozen_bytes, skeleton, steps

if TYPE_CHECKING:
    from entrecipes.training.run import Run

GIB = 2**30
KERNELS = 0.06
"""GiB that a CPU process takes when it trains for the first time: code of libraries that is read in, compiled kernels,
buffers of the matrix library. A round figure of the order seen on one machine."""
CUBLAS = {True: 32 / 1024, False: 8.125 / 1024}
"""GiB of cuBLAS' workspace on CUDA, on Hopper and newer or before."""
SETS = ("labels", "lengths", "motion", "text", "tensor", "mirrored")
"""What of a data set is moved to the device and stays there."""


@dataclass(frozen=True)
class Prediction:
    """GiB of one process; components are the most of each, of which gradients and activations come and go."""

    device: str
    """`cpu`: resident memory of the process. `cuda`: what torch's allocator has given out."""
    process: float
    """The process before a model is built, and what its libraries take once they compute."""
    frozen: float
    """VAE and text encoders."""
    data: float
    """The data set; 0 where it has not been opened."""
    weights: float
    average: float
    gradients: float
    optimizer: float
    activations: float
    gradients_at_peak: float
    """When most is held; the next two likewise."""
    activations_at_peak: float
    temporary_at_peak: float
    """The batch, what operations pass on to each other, and their workspaces."""
    holes: float
    """CPU: what the allocator keeps between blocks that are in use (see `Heap`)."""
    available: float | None
    """What there is on the device, all of it (CUDA), or what is free and what this process has already (CPU)."""
    trained: str
    """The set of weights whose step holds the most."""

    @property
    def step(self) -> float:
        """The most that the step holds."""
        moving = self.gradients_at_peak + self.activations_at_peak + self.temporary_at_peak
        return self.weights + self.average + self.optimizer + moving + self.holes

    @property
    def peak(self) -> float:
        """The most in all."""
        return self.process + self.frozen + self.data + self.step

    @property
    def fits(self) -> bool:
        """Whether there is as much, as far as is known."""
        return self.available is None or self.peak <= self.available

    def beside(self, run: Run) -> Prediction:
        """The same with what is known once data, VAE and text encoders are loaded."""
        return replace(self, frozen=frozen_gib(run), data=data_gib(run))


def predict(recipe: Recipe, world_size: int = 1, process: float | None = None) -> Prediction:
    """The memory of a training step of a recipe on this machine's device, found without weights, data or memory.

    Args:
        recipe: What would be run; of a pre-trained pipeline the configuration is read.
        world_size: Processes that share the batch.
        process: GiB of the process; null: as it is now, on a CPU.

    Raises:
        UserError: Where it can't be predicted: the model is known only when it is loaded, or its code needs values.
    """
    device = best_device()
    try:
        on_cpu = (cpu_workspace, Heap()) if device.type == "cpu" else ()
        with rehearsing(device, *on_cpu) as ledger:
            rows = recipe.training.batch_size // world_size
            sets = [(rehearse(step, ledger), name) for name, step in steps(recipe, rows, ledger)]
            # elsewhere the VAE has left the device by then (`diffusion.visiting`)
            frozen = frozen_bytes(skeleton(recipe.pipeline)) if device.type == "cpu" else 0
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"its memory can't be predicted ({why}); the measured one is what the steps take") from error
    finally:
        _forget_tables()
    held, name = max(sets, key=lambda found: found[0].peak)
    return _prediction(device, held, name, process_gib(device) if process is None else process, frozen)


def _prediction(device: torch.device, held: Held, name: str, process: float, frozen: int) -> Prediction:
    parts = {
        part: getattr(held, part) / GIB
        for part in ("weights", "average", "gradients", "optimizer", "activations")
        + ("gradients_at_peak", "activations_at_peak", "temporary_at_peak", "holes")
    }
    available = available_gib(device)
    return Prediction(device.type, process, frozen / GIB, 0.0, **parts, available=available, trained=name)


def cpu_workspace(operation: Any, args: tuple[Any, ...], result: Any) -> tuple[int, ...]:
    """Bytes of the blocks that an operation takes on a CPU beside its result.

    oneDNN computes convolutions on copies in a layout of its own: of the image and the result; of image and gradients
    in the backward pass. All other operations that networks here are made of take next to nothing.
    """
    if operation is torch.ops.aten.convolution.default:
        return args[0].nbytes, args[1].nbytes, result.nbytes
    if operation is torch.ops.aten.convolution_backward.default:
        gradient, image, weight = args[:3]
        return gradient.nbytes, image.nbytes, image.nbytes, weight.nbytes, weight.nbytes
    return ()


def process_gib(device: torch.device) -> float:
    """What the process holds on the device now, and what its libraries will."""
    if device.type == "cuda":
        return CUBLAS[torch.cuda.get_device_capability(device)[0] >= 9]
    return resident_gib() + KERNELS


def resident_gib() -> float:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / GIB


def available_gib(device: torch.device) -> float | None:
    """What a process may have on the device in all; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    if not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        found = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
    return int(found) / 2**20 + resident_gib()


def frozen_gib(run: Run) -> float:
    """VAE and text encoders of a run that are on its device."""
    parts: list[nn.Module] = [
        part for part in (run.components.vae, *getattr(run.components.text, "models", ())) if part
    ]
    weights = [weight for part in parts for weight in (*part.parameters(), *part.buffers())]
    return held_bytes(weight for weight in weights if weight.device.type == run.device.type) / GIB


def data_gib(run: Run) -> float:
    """The data of a run in memory: on a CPU all that was opened, on an accelerator what is trained on."""
    sets: Iterable[Any] = (run.data.train,)
    if run.device.type == "cpu":
        sets = (run.data.train, run.data.held_out, run.data.images.train, run.data.images.held_out)
    tensors = [getattr(one, name, None) for one in sets for name in (*SETS, "keypoints")]
    return held_bytes(value for value in tensors if isinstance(value, Tensor)) / GIB


def measured(run: Run, costs: dict[str, Any] | None) -> dict[str, float]:
    """GiB of the components that a run holds after a step, by the names of a `Prediction`.

    Args:
        costs: The row of the step (`StepCosts.take`).
    """
    own = [*run.model.parameters(), *run.model.buffers()]
    both = [*own, *(run.ema.model.parameters() if run.ema else ()), *(run.ema.model.buffers() if run.ema else ())]
    weights, optimizer = held_bytes(own), state_bytes(run.optimizer.optimizer.state.values())
    found = {"weights": weights, "average": held_bytes(both) - weights, "optimizer": optimizer}
    found |= {
        name: costs[f"{key}_bytes"] for name, key in (("gradients", "gradient"), ("activations", "saved")) if costs
    }
    return {name: value / GIB for name, value in found.items()} | {"frozen": frozen_gib(run), "data": data_gib(run)}


def _forget_tables() -> None:
    """bitsandbytes keeps a table of 8-bit values for all time; one made in a rehearsal would hold none."""
    import sys

    functional = sys.modules.get("bitsandbytes.functional")
    if functional is not None:
        functional.name2qmap.clear()
