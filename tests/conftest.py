"""One thread: tests measure nothing, and on a small shared machine one thread is the fastest and always the same."""

from __future__ import annotations

import importlib
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_remote_code():
    """What diffusers loads from beside weights is of the cache that a test sets: no module of it outlives the test."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]
    importlib.invalidate_caches()
