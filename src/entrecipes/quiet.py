"""No progress bars where weights are read and written: they say nothing that a log should keep."""

from __future__ import annotations

import diffusers
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars


def quieten_loading() -> None:
    """From now on diffusers and transformers load and save without bars; downloads keep theirs, if they had any."""
    diffusers.logging.disable_progress_bar()
    hidden = are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # which hides those of downloads, too
    if not hidden:
        enable_progress_bars()
