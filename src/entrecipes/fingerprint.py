"""One hash for all that keys caches or tells data and models apart."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fingerprint(*parts: Any) -> str:
    """128-bit hex hash of tensors, arrays (content, shape, dtype) and anything whose repr tells it apart."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu()
            part = (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
