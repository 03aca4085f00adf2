"""What a run says while it goes: metrics.jsonl always, accelerate's trackers if asked, and whoever listens."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from entrecipes.errors import UserError

Listener = Callable[[dict[str, Any]], None]


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers whose package is missing, before anything is built.

    Raises:
        UserError: With the pip command.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name} is not installed; `pip install entrecipes[tracking]`")


class RunLog:
    """Rows of numbers, each with its `kind` and the `images` seen, written by the main process only."""

    def __init__(self, folder: Path | None, accelerator: Accelerator, listener: Listener | None = None) -> None:
        """Args: `folder` of the run (None: nothing is written); `listener` is called with every row."""
        self.accelerator, self.listener = accelerator, listener
        self.path = folder / "metrics.jsonl" if folder and accelerator.is_main_process else None

    def start_trackers(self, project: str, config: dict[str, Any], folder: Path) -> None:
        """Open accelerate's trackers; everything they write stays in the run folder."""
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        self.accelerator.init_trackers(project.replace("/", "-"), config={"recipe": json.dumps(config)})

    def write(self, kind: str, images: int, **values: Any) -> None:
        """Append one row."""
        if not self.accelerator.is_main_process:
            return
        row = {"kind": kind, "images": images, **values}
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=images)
        if self.listener:
            self.listener(row)

    def rewind(self, images: int) -> None:
        """Drop the rows beyond a checkpoint (a killed run may have gone further), and the measurements made at it:
        they come after it, so the resumed run makes them again."""
        if self.path and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _precedes(line, images)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self.path)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind so far."""
        if not self.path or not self.path.exists():
            return []
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


def _precedes(line: str, images: int) -> bool:
    """Whether a line of metrics.jsonl was written before the checkpoint at `images`; a line cut short was not."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["images"] < images or row["images"] == images and row["kind"] not in ("held_out", "metric")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far in GiB: allocated on the accelerator, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
