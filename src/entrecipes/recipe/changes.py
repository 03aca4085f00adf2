"""Where two recipes differ, and which keys decide nothing about the weights."""

from __future__ import annotations

from typing import Any

HARMLESS = (
    "description",
    "license",
    "data.num_workers",
    "data.max_bad_images",
    "data.max_bad_clips",
    "data.on_device",
    "evaluation.",
    "hub.",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.sample_every",
    "training.resume",
    "training.trackers",
    "training.output",
    "training.cpu_threads",
)
"""Beginnings of the dotted keys that decide nothing about the weights."""


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two nested recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in sorted(old.keys() | new.keys())
            for change in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [(key, old, new)]
