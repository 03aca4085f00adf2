"""Inputs and options that the tiny models share; text and image are of equal length where a model takes both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 4
Tiny = tuple[nn.Module, dict[str, Any]]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TIME = torch.tensor([500, 20])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE, VIDEO, TEXT = noise(2, 4, 4, 4), noise(2, 4, 2, 4, 4), noise(2, TOKENS, 16)
PACKED = {"hidden_states": noise(2, TOKENS, 16), "encoder_hidden_states": TEXT}
IMAGE_AND_TEXT = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": TIME}
VIDEO_AND_TEXT = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": TIME}
MASK = torch.ones(2, TOKENS, dtype=torch.bool)
