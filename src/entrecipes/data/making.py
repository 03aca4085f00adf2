"""Tensors made row by row and kept as shards of safetensors, by one process or by several at the same time.

Processes on one machine, or on many with a common disk, take the shards that nobody holds. A shard appears under its
name whole or not at all; what a killed process held is free again. The bits don't depend on who made what.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entrecipes.data.shards import FORMAT, INDEX, Shards, digest, facts_of
from entrecipes.errors import UserError

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Size of a shard at most, where a batch is not larger."""
SHARD_BATCHES = 16
"""Batches in a shard, unless that would be many shards: what a killed process has to do again."""
MANY = 1024
TELL_EVERY = 10.0
"""Seconds between two lines about progress."""


Made = tuple[dict[str, Tensor], dict[int, str]]
"""The rows that a batch gave, by name of the tensor, and the sources that gave none: {index: what is wrong}."""


@dataclass
class Making:
    """What is to be made, and how.

    Attributes:
        folder: Where the shards go.
        count: Rows of the source.
        batch_size: Rows made at a time: always the same ones together, so that the same bits come out whoever makes
            them (on a CPU, with the same number of threads).
        make: Rows of the source -> what they gave.
        row_bytes: Size of what one row gives; asked once, before the first is made.
        about: JSON: what it was made from.
        what: `images`, `captions`: for messages.
        check_bad: Given what could not be read so far; raises when that is too much.
        thorough: Hash the shards that are there already; otherwise only their lengths are looked at.
    """

    folder: Path
    count: int
    batch_size: int
    make: Callable[[range], Made]
    row_bytes: Callable[[], int]
    about: dict[str, Any]
    what: str = "images"
    check_bad: Callable[[dict[int, str]], None] = lambda bad: None
    thorough: bool = False
    _rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Facts of the whole shards by their number."""

    def run(self) -> Shards:
        """Make what is missing, together with any other process that does, and wait for what others hold.

        Raises:
            UserError: When the disk is full or not writable (whole shards stay), or `check_bad` says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = max(SHARD_BATCHES, self.count // (MANY * self.batch_size))
        size = self.batch_size * max(1, min(wanted, SHARD_BYTES // (self.batch_size * self.row_bytes())))
        parts = [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        names = [f"part-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        self._note(names, range(len(names)))
        progress = _Progress(self.count, self._rows_done(), self.what)
        while left := [number for number in range(len(names)) if number not in self._rows]:
            took = [number for number in left if self._take(names[number], parts[number], number, progress)]
            if not took:  # other processes hold the rest
                time.sleep(0.2)
            self._note(names, left)
        return self._finish(names)

    def _note(self, names: list[str], numbers: Iterable[int]) -> None:
        for number in numbers:
            if number not in self._rows and (facts := facts_of(self.folder / names[number], thorough=self.thorough)):
                self._rows[number] = facts
        self._check()

    def _rows_done(self) -> int:
        return sum(facts["rows"][1] - facts["rows"][0] for facts in self._rows.values())

    def _check(self, bad: dict[int, str] | None = None) -> None:
        known = {index: name for facts in self._rows.values() for index, name in facts["bad"]}
        self.check_bad(known | (bad or {}))

    def _take(self, name: str, rows: range, number: int, progress: _Progress) -> bool:
        """Make a shard unless another process holds it, or has made it by now."""
        try:
            held = filelock.FileLock(self.folder / f".{name}.lock").acquire(blocking=False)
        except filelock.Timeout:
            return False
        except (NotImplementedError, OSError):  # a disk without locks: at worst the same bits are written twice
            held = contextlib.nullcontext()
        with held:  # the system gives the lock back when its process dies
            path = self.folder / name
            if not (facts := facts_of(path, thorough=self.thorough)):
                if path.exists():
                    logger.warning("%s is damaged and made anew", path)
                alone = not isinstance(held, contextlib.nullcontext)
                for left_over in self.folder.glob(f".writing-*-{name}") if alone else ():
                    left_over.unlink(missing_ok=True)
                self._write(path, *self._make(rows, progress), rows)
                facts = facts_of(path)
            self._rows[number] = facts
            progress.at(self._rows_done())
        return True

    def _make(self, rows: range, progress: _Progress) -> Made:
        parts: dict[str, list[Tensor]] = {}
        bad: dict[int, str] = {}
        for start in range(rows.start, rows.stop, self.batch_size):
            made, unreadable = self.make(range(start, min(start + self.batch_size, rows.stop)))
            bad |= unreadable
            self._check(bad)
            for name, tensor in made.items():
                parts.setdefault(name, []).append(tensor)
            progress.at(self._rows_done() + start + self.batch_size - rows.start)
        return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, bad

    def _write(self, path: Path, tensors: dict[str, Tensor], bad: dict[int, str], rows: range) -> None:
        facts = {"rows": [rows.start, rows.stop], "bad": list(bad.items()), "digest": digest(tensors)}
        partial = path.with_name(f".writing-{uuid.uuid4().hex[:8]}-{path.name}")
        try:
            save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
            partial.chmod(0o644)  # caches may be shared
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            done = self._rows_done()
            need = sum(tensor.nbytes for tensor in tensors.values()) / max(1, len(rows)) * (self.count - done) / 1e9
            raise UserError(
                f"{path}: could not be written ({'the disk is full' if full else error}). {len(self._rows)} whole "
                f"shards with {done:,} of {self.count:,} {self.what} are kept; about {need:.2f} GB more are needed: "
                "free some space and call the same again, or set ENTRECIPES_HOME to a larger disk."
            ) from error

    def _finish(self, names: list[str]) -> Shards:
        """Write the index (the same one, whichever process does) and remove what is left over."""
        shards = [
            {"file": name, "bytes": (self.folder / name).stat().st_size} | self._rows[number]
            for number, name in enumerate(names)
        ]
        tensors: dict[str, Tensor] = {}
        for name in names:  # one in which nothing could be read has none
            with safe_open(self.folder / name, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if tensors:
                break
        index = {
            "format": FORMAT,
            "count": self.count - sum(len(part["bad"]) for part in shards),
            "tensors": {
                name: {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
                for name, tensor in tensors.items()
            },
            "about": self.about,
            "shards": shards,
        }
        partial = self.folder / f".{uuid.uuid4().hex[:8]}-{INDEX}"
        partial.write_text(json.dumps(index, indent=1))
        os.replace(partial, self.folder / INDEX)
        for path in self.folder.iterdir():
            if path.name not in (*names, INDEX) and path.name.startswith(("part-", ".part-", ".writing-")):
                path.unlink(missing_ok=True)
        return Shards(self.folder, index)


class _Progress:
    """A line every few seconds: how much is done, by all processes together, how fast, and how long it takes."""

    def __init__(self, count: int, done: int, what: str) -> None:
        self.count, self.start, self.what = count, done, what
        self.began = self.told = time.monotonic()

    def at(self, done: int) -> None:
        now, done = time.monotonic(), min(done, self.count)
        if now - self.told < TELL_EVERY or done <= self.start:
            return
        rate = (done - self.start) / (now - self.began)
        left = (self.count - done) / rate
        logger.info(
            "%s of %s %s, %.1f a second, %s left",
            f"{done:,}",
            f"{self.count:,}",
            self.what,
            rate,
            f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min",
        )
        self.told = now
