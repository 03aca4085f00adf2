"""What goes to the Hugging Face Hub and comes from there."""

from __future__ import annotations

from entrecipes.hub.shim import export_shim

__all__ = ["export_shim"]
