"""What a prepared data set is made of: where it comes from, and the rows read from it. No torch, no datasets here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from entrecipes.data.fetch import Package
from entrecipes.errors import UserError

SkinTones = Literal["drop", "keep", "balance"]


@dataclass(frozen=True)
class Options:
    """What `entrecipes data prepare` lets choose."""

    size: int = 32
    """Side in pixels, for sets that are drawn at any size."""
    skin_tones: SkinTones = "drop"
    """drop: leave out skin-tone variants; keep: all; balance: one variant of each drawing, the tones in turn."""
    views: int = 6
    """Rendered videos: cameras that see each motion, every one with other colours."""


@dataclass(frozen=True)
class Source:
    """One data set that can be prepared on this machine.

    `rows(files, options)` reads the downloaded `files` (one a package, in order) and gives one dict an image: `image`
    (uint8 [H, W] or [H, W, 3]) and, where known, `label` (class name), `caption`, `group` (images of one group must not
    be split between training and held out); or one dict a sequence: `sequence` (a string), `label`, `title`; or one
    dict a frame of a video: `image`, `video` (name of the take), `frame` (its number), `keypoints` (13 joints times x,
    y, visibility, flat). It raises UserError when the files do not hold what was pinned.
    """

    name: str
    description: str
    license: str
    packages: tuple[Package, ...]
    download_mb: float
    rows: Callable[[list[Path], Options], Iterator[dict[str, Any]]]
    any_size: bool = False
    """Drawn (or cut) at the size asked for, in place of coming in one size."""
    alphabet: str | None = None
    """Sequences: their symbols, in the order of their ids; None: images."""
    independent: bool = False
    """Sequences: each is an example of its own, held out at random, not a long text whose end is held out."""
    clips: bool = False
    """Rows are frames of videos, with poses."""
    rendered: bool = False
    """Videos: seen from as many views as asked for."""
    size: int = 32
    """Side that is drawn unless another is asked for."""
    kept_private: str = ""
    """Why it must not be passed on; empty: it may be."""

    def chosen(self, options: Options) -> dict[str, Any]:
        """The options that this set depends on."""
        if not self.any_size:
            return {}
        unused = {"skin_tones"} if self.clips else {"views"}
        if self.clips and not self.rendered:
            unused.add("views")
        return {key: value for key, value in asdict(options).items() if key not in unused}


def expect(truth: bool, what: str, archive: Path) -> None:
    """Raise UserError when a package does not hold what it held when it was pinned."""
    if not truth:
        raise UserError(f"{archive.name} is not what was pinned: {what}. Delete {archive} and prepare the set again.")
