"""`hub:` where a finished run is pushed to. Who may do so is never said in a recipe: `hf auth login`, or HF_TOKEN."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entrecipes.recipe.base import Section

Part = Literal["pipeline", "adapter", "infonoise", "samples", "report"]


class Hub(Section):
    """The run folder's results on the Hugging Face Hub, pushed once everything is on disk, by the main process."""

    repo_id: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """owner/name of the repository; null: nothing is pushed."""
    private: bool = False
    """Make a new repository private (one that is there stays as it is)."""
    revision: str | None = Field(None, min_length=1)
    """Branch to push to, made where it is missing; null: main."""
    what: tuple[Part, ...] = Field((), max_length=5)
    """Parts to push besides the card, the recipe and run.json; empty: all that the run has."""
    checkpoints: bool = False
    """Push the averaged weights of every kept checkpoint, too, each as a pipeline on a branch images-N."""
