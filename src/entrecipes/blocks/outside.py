"""Weights outside the blocks: which of them blocks depend on, and which only what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor
from torch.utils._pytree import tree_leaves

from entrecipes.blocks.cost import weight_names
from entrecipes.blocks.measuring import trainable
from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError


def inputs_and_head(stack: BlockStack, call: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """Tell the weights that come before a block from those that come after all of them.

    A weight is an input when anything that a block is given depends on it, through other blocks or not: training it
    takes gradients through blocks. The rest is the head; time embedders that both read are inputs.

    Args:
        stack: The model's blocks.
        call: Runs the model once, with gradients where they are on.

    Raises:
        UserError: When the call switches gradients off.

    Returns:
        Names of the weights outside the blocks: inputs, and head.
    """
    inside = {name for names in weight_names(stack) for name in names}
    outside = {
        name: weight
        for name, weight in unwrap_module(stack.model).named_parameters()
        if name not in inside and weight.is_floating_point()
    }
    with torch.enable_grad(), trainable(list(outside.values())):
        with stack.recorded() as calls:
            call()
        given = [leaf for made in calls.values() for leaf in tree_leaves((made.args, made.kwargs))]
        roots = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outside and not roots:
            raise UserError("blocks: the loss switches gradients off, so that inputs can't be told; leave out no_grad")
        gradients: tuple[Tensor | None, ...] = (None,) * len(outside)
        if roots and outside:
            ones = [torch.ones_like(root) for root in roots]
            gradients = torch.autograd.grad(roots, list(outside.values()), ones, allow_unused=True)
    inputs = {name for name, gradient in zip(outside, gradients, strict=True) if gradient is not None}
    return inputs, outside.keys() - inputs
