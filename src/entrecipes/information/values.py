"""What the numbers of a data set look like."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def value_statistics(x0: Tensor) -> dict[str, Any]:
    """Scale and kind of the numbers in x0 [n, ...] (this waits for the device).

    Returns:
        `data_std`, their standard deviation; `distinct_values`, how many different ones there are; `spacing`, the
        smallest distance between two of these (0 when all are equal).
    """
    values = x0.unique()
    spacing = values.diff().min().item() if values.numel() > 1 else 0.0
    return {"data_std": x0.std().item(), "distinct_values": values.numel(), "spacing": spacing}
