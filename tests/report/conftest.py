"""A run folder as training leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_case import make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run: three sample grids, curves, two metrics, an empty pipeline folder."""
    return make_run(tmp_path / "outputs" / "digits")
