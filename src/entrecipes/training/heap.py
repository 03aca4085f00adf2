"""What glibc's allocator holds of a process' memory for what the process has asked for: holes count, too."""

from __future__ import annotations

import os
from bisect import bisect_left, insort

LARGEST = 32 * 2**20
"""Bytes above which every block is a mapping of its own (DEFAULT_MMAP_THRESHOLD_MAX)."""
ALIGNED, SMALLEST, PAGE = 64, 32, 4096
"""Bytes: torch's alignment of a tensor, the allocator's smallest block, and of a page."""
SLACK = ALIGNED + SMALLEST
"""Bytes by which a hole must be larger than an aligned block, so that the hole of an equal one may not do."""


class Heap:
    """Aligned blocks on one heap, best fit, freed neighbours joined; large ones are mappings, which go back at once.

    As in glibc, freeing a mapping lets blocks of its size come from the heap from then on, and the end of the heap goes
    back to the system when enough of it is free; MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ fix both.
    """

    def __init__(self) -> None:
        fixed = {name: os.environ.get(f"MALLOC_{name}_THRESHOLD_") for name in ("MMAP", "TRIM")}
        self.dynamic = not any(fixed.values())
        self.mapped_from = int(fixed["MMAP"] or 128 * 2**10)
        self.trimmed_from = int(fixed["TRIM"] or 128 * 2**10)
        self.free: list[tuple[int, int]] = []  # (size, start), sorted
        self.starts: dict[int, int] = {}  # of free blocks: start -> size
        self.ends: dict[int, int] = {}  # of free blocks: end -> size
        self.top = self.extent = self.mapped = self.most = 0

    @property
    def held(self) -> int:
        """Bytes that the process holds."""
        return self.extent + self.mapped

    def take(self, size: int) -> tuple[int, int]:
        """A block of so many bytes: its start (-1: a mapping) and its size."""
        size = (size + 8 + 15) // 16 * 16  # with the allocator's own note
        if size + SLACK >= self.mapped_from:
            start, size = -1, size + PAGE
            self.mapped += size
        else:
            found = self._place(size + SLACK)
            start = -(-(found + 16) // ALIGNED) * ALIGNED - 16
            if 0 < start - found < SMALLEST:
                start += ALIGNED
            self._leave(start + size, found + SLACK - start)
            self._leave(found, start - found)
        self.most = max(self.most, self.held)
        return start, size

    def give(self, block: tuple[int, int]) -> None:
        """Free a block."""
        start, size = block
        if start < 0:
            self.mapped -= size
            if self.dynamic and self.mapped_from < size <= LARGEST:
                self.mapped_from, self.trimmed_from = size, 2 * size
            return
        if before := self.ends.get(start):
            self._unlist(start - before, before)
            start, size = start - before, size + before
        if after := self.starts.get(start + size):
            self._unlist(start + size, after)
            size += after
        if start + size == self.top:
            self.top = start
            if self.extent - self.top >= self.trimmed_from:
                self.extent = self.top
        else:
            self._list(start, size)

    def _leave(self, start: int, size: int) -> None:
        """A rest too small to be joined at once: it waits in a list of its own until a neighbour is freed."""
        if start + size == self.top:
            self.top = start
        elif size:
            self._list(start, size)

    def _place(self, size: int) -> int:
        place = bisect_left(self.free, (size, 0))
        if place < len(self.free):
            found, start = self.free[place]
            self._unlist(start, found)
            if found > size:
                self._list(start + size, found - size)
            return start
        start, self.top = self.top, self.top + size
        self.extent = max(self.extent, self.top)
        return start

    def _list(self, start: int, size: int) -> None:
        insort(self.free, (size, start))
        self.starts[start] = self.ends[start + size] = size

    def _unlist(self, start: int, size: int) -> None:
        del self.free[bisect_left(self.free, (size, start))]
        del self.starts[start], self.ends[start + size]
