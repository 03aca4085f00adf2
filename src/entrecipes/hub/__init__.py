"""What goes to the Hugging Face Hub."""

from __future__ import annotations

from entrecipes.hub.commit import Pushed, commit_files
from entrecipes.hub.push import push
from entrecipes.hub.shim import export_shim

__all__ = ["Pushed", "commit_files", "export_shim", "push"]
