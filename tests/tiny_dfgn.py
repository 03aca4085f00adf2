"""A DFGN small enough for tests, whose output depends on everything, and what to call it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entrecipes.models.dfgn import DFGNModel

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "attention_levels": (False, True),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "temporal_in": False,
}
FRAMES, SIDE = 4, 8


def tiny_dfgn(seed: int = 0, **config: Any) -> DFGNModel:
    """A random one in eval mode."""
    torch.manual_seed(seed)
    return DFGNModel(**CONFIG | config).eval()


def clips(*given: int, frames: int = FRAMES) -> dict[str, Any]:
    """Inputs for two clips; the frames of these numbers are given in the first one alone."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.zeros(2, 3, frames, SIDE, SIDE)
    condition[0, :, list(given)] = torch.randn(3, len(given), SIDE, SIDE, generator=generator)
    return {
        "sample": torch.randn(2, 3, frames, SIDE, SIDE, generator=generator),
        "timestep": torch.tensor([10.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "condition": condition,
    }


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def shake(module: nn.Module, seed: int = 1) -> None:
    """Move all weights away from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
