"""What a training step costs when only some blocks are open, predicted: in forward passes of a mean block.

A closed block still runs in the forward pass. Gradients flow down to the lowest open block, the floor, and end there;
a closed block above the floor passes them on without gradients for its own weights. So a step costs the forward pass of
all blocks, the input gradients of those from the floor on, and the weight gradients of the open ones, each in
proportion to a block's weights: 3 L when all L blocks are open, 2 L - floor + m for m equal ones (Ent-Prog's speed-up
is at most 3 L / that). Weights outside the blocks are not counted, nor is what does not scale with a block's weights
(attention's products of tokens with tokens, the optimizer's step).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion.quantised import size

FROZEN_SHARE = 0.52
"""What a closed block above the floor keeps for the backward pass, relative to an open one. Measured in float32 on CPU
with saved_tensors_hooks: 0.49 to 0.51 in DiTTransformer2DModel, 0.54 in WanTransformer3DModel (width 128)."""

TINY = 1e-9


@dataclass(frozen=True)
class StepCost:
    """One training step, in forward passes of a mean block."""

    forward: float
    inputs: float
    """Input gradients, from the floor on."""
    weights: float
    """Weight gradients of the open blocks."""
    full: float
    """What a step costs that trains all blocks: three forward passes of each."""
    activations: float
    """What is kept for the backward pass, as a share of what training all blocks keeps (no gradient checkpointing)."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.forward + self.inputs + self.weights

    @property
    def speed_up(self) -> float:
        """Of the forward and backward pass against training all blocks."""
        return self.full / self.total


class CostModel:
    """Predicts the cost of a step.

    Args:
        sizes: Weights of each block, in the order in which they run.
        trained: How many of them are trained when a block is open (adapters are few); None: all.
    """

    def __init__(self, sizes: Sequence[int], trained: Sequence[int] | None = None) -> None:
        mean = sum(sizes) / len(sizes)
        self.weights = [size / mean for size in sizes]
        """Cost of each block's forward pass, and of its input gradients."""
        self.trained = [max(size / mean, TINY) for size in (sizes if trained is None else trained)]
        """Cost of each block's weight gradients; not 0, so that something can be divided by it."""

    def floor(self, open_blocks: Collection[int], below: bool) -> int:
        """The lowest block that gradients flow through; the number of blocks when there is none."""
        return 0 if below else min(open_blocks, default=len(self.weights))

    def cost(self, open_blocks: Collection[int], below: bool = False) -> StepCost:
        """Of a step that trains these blocks.

        Args:
            open_blocks: Their indices.
            below: Whether weights that blocks depend on (patch, time and condition embedders) are trained too, so that
                gradients flow through all blocks.
        """
        w, floor = self.weights, self.floor(open_blocks, below)
        kept = sum(1.0 if i in open_blocks else FROZEN_SHARE for i in range(floor, len(w)))
        return StepCost(
            forward=sum(w),
            inputs=sum(w[floor:]),
            weights=sum(self.trained[i] for i in open_blocks),
            full=2 * sum(w) + sum(self.trained),
            activations=kept / len(w),
        )


def cost_model(stack: BlockStack, eligible: set[str] | None = None) -> CostModel:
    """The cost model of a model's blocks.

    Args:
        stack: The blocks.
        eligible: Names of the weights that may be trained at all; None: all.
    """
    sizes, trained = [0] * len(stack), [0] * len(stack)
    for index, names in enumerate(weight_names(stack)):
        for name in names:
            count = size(stack.model.get_parameter(name))
            sizes[index] += count
            trained[index] += count * (eligible is None or name in eligible)
    return CostModel(sizes, trained)


def weight_names(stack: BlockStack) -> list[list[str]]:
    """Names in the model of the weights of each block."""
    return [
        [f"{path}.{name}" for path in block.paths for name, _ in stack.model.get_submodule(path).named_parameters()]
        for block in stack.blocks
    ]
