"""Where prepared data sets, downloads and caches live, and how folders appear there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def home() -> Path:
    """The root of everything kept between runs: `$ENTRECIPES_HOME`, else `~/.cache/entrecipes`."""
    return Path(os.environ.get("ENTRECIPES_HOME") or "~/.cache/entrecipes").expanduser()


@contextmanager
def atomic_folder(target: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    A crash leaves the old `target` (or none), never a half-written one. With `keep_existing`, a `target` that appeared
    in the meantime stays: another process of the run was quicker to write the same cache.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes private folders; data sets may be shared
        if target.exists() and not keep_existing:
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            try:
                os.replace(scratch, target)
            except OSError:  # not empty: written by another process
                if not target.exists():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
