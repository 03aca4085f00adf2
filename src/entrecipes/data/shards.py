"""Tensors in shards of safetensors that `data.making` made: found again, and read whole or row by row."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entrecipes.fingerprint import fingerprint

FORMAT = 1
INDEX = "index.json"


class LazyTensor:
    """A tensor [N, ...] in shards on disk, memory-mapped: only the rows asked for are read, and none is held.

    Args:
        files: The shards.
        name: The tensor's name in each.
        counts: Its rows in each.
        row_shape, dtype: Of one row.
        rows: Which rows of the shards, in which order; None: all.
    """

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        counts: Sequence[int],
        row_shape: Sequence[int],
        dtype: torch.dtype,
        rows: Tensor | None = None,
    ) -> None:
        self.files, self.name, self.counts, self.dtype = list(files), name, list(counts), dtype
        self.rows = torch.arange(sum(counts)) if rows is None else rows
        self.shape = torch.Size([len(self.rows), *row_shape])
        self._starts = [0, *accumulate(self.counts)]
        self._mapped: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Tensor:
        """Row `index` [...], or rows [n, ...], in memory."""
        chosen = self.rows[index]
        if chosen.dim() == 0:
            shard = bisect.bisect_right(self._starts, int(chosen)) - 1
            return self._open(shard)[int(chosen) - self._starts[shard]].clone()
        found = torch.empty(len(chosen), *self.shape[1:], dtype=self.dtype)
        shards = torch.searchsorted(torch.tensor(self._starts), chosen, right=True) - 1
        for shard in shards.unique().tolist():
            here = shards == shard
            found[here] = self._open(shard)[chosen[here] - self._starts[shard]]
        return found

    def whole(self) -> Tensor:
        """All rows of all shards, [N, ...] in memory, copied once."""
        return torch.cat([self._open(shard) for shard, count in enumerate(self.counts) if count])

    def select(self, index: Sequence[int] | Tensor) -> LazyTensor:
        """Only those rows, in that order; nothing is read."""
        rows = self.rows[torch.as_tensor(index)]
        return LazyTensor(self.files, self.name, self.counts, self.shape[1:], self.dtype, rows)

    def _open(self, shard: int) -> Tensor:
        if shard not in self._mapped:
            with safe_open(self.files[shard], "pt") as file:  # the tensor is a view of the mapped file
                self._mapped[shard] = file.get_tensor(self.name)
        return self._mapped[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Each process maps the files itself."""
        return self.__dict__ | {"_mapped": {}}


@dataclass(frozen=True)
class Shards:
    """A finished cache."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, *, thorough: bool = False) -> Shards | None:
        """What is in the folder, or None where anything is missing or damaged.

        The lengths of all files are compared with what they should be; `thorough` hashes all that they hold, too.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
            whole = all((folder / part["file"]).stat().st_size == part["bytes"] for part in index["shards"])
            if index["format"] != FORMAT or not whole:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if thorough and not all(facts_of(folder / part["file"], thorough=True) for part in index["shards"]):
            return None
        return cls(folder, index)

    def __len__(self) -> int:
        """Rows of each tensor."""
        return self.index["count"]

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(part["bytes"] for part in self.index["shards"])

    @property
    def bad(self) -> dict[int, str]:
        """Sources that could not be read: {index: what is wrong}."""
        return {index: name for part in self.index["shards"] for index, name in part["bad"]}

    def __str__(self) -> str:
        count = len(self.index["shards"])
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes > 1e8 else f"{self.bytes / 1e6:.1f} MB"
        return f"{self.folder} ({count} shard{'s' * (count > 1)}, {size})"

    def lazy(self, name: str) -> LazyTensor | None:
        """A tensor of which rows are read when asked for; None where the shards hold none of that name."""
        if name not in self.index["tensors"]:
            return None
        about = self.index["tensors"][name]
        files = [self.folder / part["file"] for part in self.index["shards"]]
        counts = [part["rows"][1] - part["rows"][0] - len(part["bad"]) for part in self.index["shards"]]
        return LazyTensor(files, name, counts, about["shape"], getattr(torch, about["dtype"]))

    def read(self, name: str) -> Tensor | None:
        """The same tensor in memory, [N, ...]."""
        lazy = self.lazy(name)
        return None if lazy is None else lazy.whole()


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of a shard's tensors with their names."""
    return fingerprint(*(part for pair in sorted(tensors.items()) for part in pair))


def facts_of(path: Path, *, thorough: bool = False) -> dict[str, Any] | None:
    """What a shard says of itself; None where there is none, its length is wrong or (`thorough`) its content."""
    try:
        with safe_open(path, "pt") as file:  # compares the length with what the header says
            facts = json.loads(file.metadata()["facts"])
            if thorough and digest({name: file.get_tensor(name) for name in file.keys()}) != facts["digest"]:  # noqa: SIM118
                return None
            return facts
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
