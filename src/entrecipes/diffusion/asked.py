"""What a model of captioned clips is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """Conditions of a batch of clips; it is indexed, moved and counted as a tensor is.

    Attributes:
        frames: The given frames in the model's space, float [n, C, F, h, w]; zeros at the other places.
        given: Which are given, bool [n, F].
        text: Embedded texts, float [n, T, D], zeros where none is given; None for a model without text.
    """

    frames: Tensor
    given: Tensor
    text: Tensor | None

    @classmethod
    def of(cls, x0: Tensor, given: Tensor, text: Tensor | None, with_text: Tensor | None = None) -> Asked:
        """The given frames cut out of clips x0 [n, C, F, h, w]; `with_text` bool [n] says whose text is shown."""
        if text is not None:
            text = text.to(x0.dtype)
            text = text if with_text is None else text * with_text[:, None, None]
        return cls(x0 * given[:, None, :, None, None], given, text)

    @classmethod
    def stack(cls, rows: Sequence[Asked]) -> Asked:
        """One batch of single rows."""
        parts = zip(*map(_parts, rows), strict=True)
        return cls(*(None if part[0] is None else torch.stack(part) for part in parts))

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: Any) -> Asked:
        return Asked(*(None if part is None else part[rows] for part in _parts(self)))

    def to(self, device: torch.device | str) -> Asked:
        """The same on a device."""
        return Asked(*(None if part is None else part.to(device) for part in _parts(self)))


def _parts(asked: Asked) -> list[Tensor | None]:
    return [getattr(asked, field.name) for field in fields(asked)]
