"""What has been seen since the last log line, summed on the device, and the clock that counts training alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Window:
    """Sums of per-step numbers, without waiting for the device, and the seconds spent training."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Args: `size` numbers a step."""
        self.size, self.device = size, device
        self.total_seconds = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin the next window."""
        self.sums = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        self.steps, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def add(self, numbers: Tensor) -> None:
        """Add one step's numbers [size]."""
        self.sums += numbers.double()
        self.steps += 1

    def stop_clock(self) -> None:
        """Count the time since the clock was started, and start it again."""
        now = time.perf_counter()
        self.seconds += now - self.started
        self.total_seconds += now - self.started
        self.started = now

    @property
    def elapsed(self) -> float:
        """Seconds spent training so far, without waiting for the device."""
        return self.total_seconds + time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training: evaluation, sampling, checkpoints."""
        self.stop_clock()
        yield
        self.started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The sums and the clock."""
        clock = {"seconds": self.seconds, "total_seconds": self.total_seconds}
        return {"sums": self.sums, "steps": self.steps, **clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.sums, self.steps = state["sums"].to(self.device), state["steps"]
        self.seconds, self.total_seconds = state["seconds"], state["total_seconds"]
        self.started = time.perf_counter()
