"""Building a set of stickers: decode, choose key frames, lay them side by side; what is cut off goes on later."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from entrecipes.data.fetch import fetch
from entrecipes.data.key_frames import KeyFrames, key_frames, motion
from entrecipes.data.places import atomic_folder, home
from entrecipes.data.prepared import FACTS
from entrecipes.data.sources.stickers import KEYWORDS, LICENSE, NAMES, PACKS, Item, package_name, stickers
from entrecipes.data.sticker_files import BadSticker, read_sticker
from entrecipes.errors import UserError

logger = logging.getLogger(__name__)

PART = 64
"""Stickers that are decoded between two writes."""
WIDEST = 16383
"""Pixels that a WebP picture may be wide."""
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),  # a film strip: the key frames from left to right
        "id": datasets.Value("string"),
        "frames": datasets.Value("int32"),  # in the strip
        "n_frames": datasets.Value("int32"),  # of the source
        "fps": datasets.Value("float32"),  # of the source
        "keyframe_idx": datasets.Sequence(datasets.Value("int32")),
        "caption": datasets.Value("string"),
        "keywords": datasets.Sequence(datasets.Value("string")),
        "group": datasets.Value("string"),
        "base": datasets.Value("string"),
        "tone": datasets.Value("string"),
        "static": datasets.Value("bool"),
        "motion": datasets.Value("float32"),  # mean absolute difference between successive key frames, grey levels
    }
)


@dataclass(frozen=True)
class StickerOptions:
    """How stickers are made: side in pixels, frames of a clip, how those are chosen."""

    size: int = 32
    frames: int = 8
    key_frames: KeyFrames = "cluster"

    def __post_init__(self) -> None:
        """Raises UserError for what can't be made."""
        if self.size < 8:
            raise UserError(f"--size {self.size}: stickers are at least 8 pixels wide")
        if self.frames < 2:
            raise UserError(f"--frames {self.frames}: a clip has at least 2")
        if self.size * self.frames > WIDEST:
            raise UserError(
                f"--size {self.size} --frames {self.frames}: the film strip would be {self.size * self.frames} pixels "
                f"wide, and {WIDEST} is the most; take fewer frames"
            )


@dataclass(frozen=True)
class Collection:
    """Stickers to be prepared.

    Attributes:
        items: Always the same ones in the same order.
        source, license: What is said of them wherever they are used.
        key: What tells these items from others: text.
    """

    items: Iterable[Item]
    source: str
    license: str
    key: str


def from_packs(packs: str | None, archives: list[Path], *, flags: bool = False) -> Collection:
    """Animated emoji of npm's packages, which are downloaded where no archive is given.

    Args:
        packs: Numbers, such as `1,3`; None: those of which archives are given, else 1.
        archives: Packages (.tgz) that are here already.

    Raises:
        UserError: No such pack, no npm or network (with what can be done), or an archive of something else.
    """
    known = {package.name: package for package in (*PACKS.values(), NAMES, KEYWORDS)}
    here = {package_name(archive): archive for archive in archives}
    for name, archive in here.items():
        if name not in known:
            raise UserError(f"--archive: {archive} is the package {name}; what is wanted: {', '.join(known)}")
    given = [number for number, package in PACKS.items() if package.name in here]
    try:
        numbers = sorted({int(number) for number in packs.split(",")}) if packs else given or [1]
        chosen = [PACKS[number] for number in numbers]
    except (ValueError, KeyError):
        raise UserError(f"--packs {packs}: the packs are 1, 2, 3 and 4; say --packs 1,2 for the first two") from None
    packages = [*chosen, NAMES, KEYWORDS]
    files = [here.get(package.name) or fetch(package, home() / "downloads") for package in packages]
    return Collection(
        stickers(files[:-2], *files[-2:], flags=flags),
        f"Animated emoji (Fluent) from {', '.join(package.spec for package in packages)}.",
        LICENSE,
        repr(([(file.name, file.stat().st_size) for file in files], flags)),
    )


def from_folder(folder: Path, license: str) -> Collection:
    """The files that `folder`/metadata.jsonl names, in its order.

    Raises:
        UserError: No such file, or a line of it that is no JSON object or lacks file_name or caption.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(
            f"--folder: {metadata} is not there; write one line a file: "
            '{"file_name": "cat.gif", "caption": "a cat that waves"}'
        )
    try:
        text = metadata.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--folder: {metadata} is no UTF-8 text; save it as such") from None
    items, stats = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], entry["caption"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError("both must be text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--folder: {metadata}:{number}: {type(error).__name__}: {error}; a line is a JSON object "
                "with file_name and caption"
            ) from None
        path, suffix = folder / name, Path(name).suffix.lower()
        base = str(entry.get("base") or name)
        items.append(Item(name, path, suffix, caption, group=str(entry.get("group") or ""), base=base))
        stats.append((path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None)
    return Collection(
        items,
        f"Stickers of the folder {folder.resolve().name}.",
        license,
        repr((str(folder.resolve()), text, stats)),
    )


def row(item: Item, options: StickerOptions) -> dict[str, Any]:
    """One sticker as a row of the table. Raises BadSticker."""
    sticker = read_sticker(item.file, item.suffix, options.size)
    static = len(sticker.frames) == 1 or not np.ptp(sticker.frames, axis=0).any()
    chosen = [0] if static else key_frames(sticker.frames, options.frames, options.key_frames)
    frames = sticker.frames[chosen]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(
        buffer, "WEBP", lossless=True, quality=100, method=6 if options.size <= 64 else 4
    )
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "id": item.id,
        "frames": len(frames),
        "n_frames": len(sticker.frames),
        "fps": sticker.fps,
        "keyframe_idx": chosen,
        "caption": item.still_caption if static and item.still_caption else item.caption,
        "keywords": list(item.keywords),
        "group": item.group,
        "base": item.base or item.id,
        "tone": item.tone,
        "static": static,
        "motion": motion(frames),
    }


def prepare_stickers(collection: Collection, folder: Path, options: StickerOptions) -> tuple[dict[str, Any], list[str]]:
    """Make `folder`, which `datasets.load_from_disk` opens, or go on where an earlier call was cut off.

    What is done is kept beside it in `.NAME-parts` until the folder is there, whole; parts made from other items or
    with other options are thrown away.

    Returns:
        What was noted of the set, and the name and reason of each file that is left out.

    Raises:
        UserError: `folder` holds something else, or no file can be used.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; remove it, or name another folder with --output.")
    parts = folder.with_name(f".{folder.name}-parts")
    bad = [name for part in _parts(collection, parts, options) for name in part]
    files = [str(file) for file in sorted(parts.glob("*.parquet"))]
    dataset = datasets.Dataset.from_parquet(files, features=FEATURES, cache_dir=str(parts / "cache"))
    if not len(dataset):
        listed = "".join(f"\n  {name}" for name in bad[:20])
        raise UserError(f"None of the files can be used:{listed}")
    static = np.array(dataset["static"][:])
    noted = {
        "name": "stickers",
        "source": collection.source,
        "license": collection.license,
        "packages": [],
        "options": asdict(options),
        "images": len(dataset),
        "animated": int((~static).sum()),
        "bad": bad,
    }
    with atomic_folder(folder) as scratch:
        dataset.save_to_disk(str(scratch))
        (scratch / FACTS).write_text(json.dumps(noted, indent=2, ensure_ascii=False) + "\n")
        (scratch / "LICENSE.txt").write_text(collection.license + "\n")
        (scratch / "README.md").write_text(card(noted, dataset))
    shutil.rmtree(parts)
    return noted, bad


def _parts(collection: Collection, parts: Path, options: StickerOptions) -> Iterator[list[str]]:
    """Write what is not written yet; yields the bad files of each part."""
    made_of = json.dumps({"options": asdict(options), "key": collection.key, "part": PART}, sort_keys=True)
    if parts.exists() and (not (parts / "key.json").exists() or (parts / "key.json").read_text() != made_of):
        logger.warning("%s was made from other files or with other options, and is begun anew", parts)
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    (parts / "key.json").write_text(made_of)
    items = iter(collection.items)
    for number, batch in enumerate(iter(lambda: list(islice(items, PART)), [])):
        table, named = parts / f"{number:06}.parquet", parts / f"{number:06}.json"
        if not table.exists():
            rows, bad = _rows(batch, options)
            named.write_text(json.dumps(bad))
            scratch = table.with_suffix(".writing")
            pq.write_table(pa.Table.from_pylist(rows, FEATURES.arrow_schema), scratch)
            os.replace(scratch, table)  # a table that has its name is whole
            logger.info("%d stickers done", number * PART + len(batch))
        yield json.loads(named.read_text())


def _rows(items: Iterable[Item], options: StickerOptions) -> tuple[list[dict[str, Any]], list[str]]:
    rows, bad = [], []
    for item in items:
        try:
            rows.append(row(item, options))
        except BadSticker as error:
            bad.append(f"{item.id} ({error})")
            logger.warning("left out: %s", bad[-1])
    return rows, bad


def card(noted: dict[str, Any], dataset: datasets.Dataset) -> str:
    """The set's README: what it is, from where, under which licence, what the columns hold."""
    options = noted["options"]
    captions = "".join(f"- {caption}\n" for caption in dataset["caption"][: min(5, len(dataset))])
    return f"""---
pretty_name: Animated stickers
tags: [animation, stickers]
---
# {noted["animated"]:,} moving and {noted["images"] - noted["animated"]:,} still stickers, {options["size"]} px

{noted["source"]}

Licence: {noted["license"]}

A row is a sticker. `image` is a film strip: {options["frames"]} frames of a moving one (key frames:
`{options["key_frames"]}`), laid over white, from left to right; one of a still. `keyframe_idx` says which of the
source's `n_frames` frames (at `fps` a second) they are; shorter clips run to and fro. `motion` is the mean absolute
difference between successive frames of the strip in grey levels. Variants of one drawing share `base`: keep them on
one side of a split. {len(noted["bad"])} files could not be used (`prepared.json` names them).

In a recipe: `data: {{type: stickers, name: FOLDER}}`. Some captions:

{captions}"""
