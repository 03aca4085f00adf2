"""All pictures of a run, for its card and its report."""

from __future__ import annotations

from pathlib import Path

from entrecipes.report.block_schedule_plots import draw_block_schedule_plots
from entrecipes.report.experts_plots import draw_expert_plots
from entrecipes.report.noise_plots import draw_noise_plots
from entrecipes.report.plots import draw_plots
from entrecipes.report.prune_plots import draw_prune_plots
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.stickers import draw_sticker_plots

DRAWERS = (
    draw_plots,
    draw_noise_plots,
    draw_sticker_plots,
    draw_prune_plots,
    draw_block_schedule_plots,
    draw_expert_plots,
)
"""Each draws what it knows of into `folder.assets`; returns `{name: path}`."""


def draw_assets(folder: RunFolder) -> dict[str, Path]:
    """Draw whatever the run has logged so far into its `assets/`; returns `{name: path}`."""
    return {name: path for drawer in DRAWERS for name, path in drawer(folder).items()}
