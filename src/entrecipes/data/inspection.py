"""A look at a data set before training on it: counts, sizes, captions and a grid of its images."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from entrecipes.data.folder import read_folder
from entrecipes.data.images import why_unreadable
from entrecipes.data.prepared import facts, prepared_folder, read_prepared
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.tables import Table, label_names
from entrecipes.errors import UserError, nearest

CELL = 64
"""Side of a grid's cells in pixels."""
SIZED = 2000
CAPTIONS = 5


@dataclass(frozen=True)
class Inspection:
    """What can be said of a set."""

    name: str
    source: str
    license: str
    images: int
    columns: tuple[str, ...]
    sizes: dict[str, int]
    """`28x28 L` -> how many, of the first 2,000 images; most frequent first."""
    labels: dict[str, int]
    """Class -> images, in class order; empty without a `label` column."""
    captions: tuple[str, ...]
    """A few, where there is a column `caption` or `text`."""
    groups: int | None
    """Distinct groups (of images that stay on one side of the split)."""
    bad_images: tuple[str, ...]
    """Names of unreadable ones among the first 2,000 and those drawn for the grid."""
    grid: Image.Image


def inspect(name_or_folder: str, *, count: int = 64, seed: int = 0) -> Inspection:
    """Describe a prepared set (by name or folder), a folder of images, or a folder saved by `datasets`.

    Args:
        count: Images in the grid, drawn by `seed`.

    Raises:
        UserError: When it is none of these, or no image can be read.
    """
    table = _open(name_or_folder)
    if "image" not in table.dataset.column_names:
        raise UserError(f"{table.place} holds no images; its columns: {', '.join(table.dataset.column_names)}")
    cells = table.dataset.cast_column("image", datasets.Image(decode=False))["image"]
    sizes, bad, shown = Counter(), {}, []
    drawn = random.Random(seed).sample(range(len(cells)), min(count, len(cells)))
    for index in dict.fromkeys([*range(min(SIZED, len(cells))), *drawn]):
        try:
            with Image.open(_file(cells[index])) as image:
                if index < SIZED:
                    sizes[f"{image.width}x{image.height} {image.mode}"] += 1
                if index in drawn:
                    shown.append(_thumbnail(image))
        except Exception as error:  # as in images.decode_cell: PIL's decoders have no common error
            bad[index] = f"{cells[index].get('path') or f'row {index}'} ({why_unreadable(error)})"
    if not shown:
        raise UserError(f"{table.place}: none of {len(drawn)} images drawn at random can be read.")
    columns = table.dataset.column_names
    text = next((column for column in ("caption", "text") if column in columns), None)
    return Inspection(
        name=table.name,
        source=table.source,
        license=table.license,
        images=len(cells),
        columns=tuple(columns),
        sizes=dict(sizes.most_common()),
        labels=_label_counts(table) if "label" in columns else {},
        captions=tuple(str(table.dataset[text][index]) for index in drawn[:CAPTIONS]) if text else (),
        groups=len(set(table.dataset["group"][:])) if "group" in columns else None,
        bad_images=tuple(bad.values()),
        grid=_grid(shown),
    )


def _open(name_or_folder: str) -> Table:
    folder = prepared_folder(name_or_folder) if name_or_folder in CATALOGUE else Path(name_or_folder).expanduser()
    if facts(folder) is not None:
        return read_prepared(folder)
    if name_or_folder in CATALOGUE:
        raise UserError(f"'{name_or_folder}' is not prepared yet: run `entrecipes data prepare {name_or_folder}`")
    if not folder.exists():
        hint = nearest(name_or_folder, CATALOGUE) or "."
        raise UserError(f"'{name_or_folder}' is neither a folder nor a prepared set{hint} See `entrecipes data ls`.")
    if (folder / "dataset_dict.json").exists():
        raise UserError(f"{folder} holds several splits; name one of the folders in it.")
    if (folder / "state.json").exists():
        dataset = datasets.load_from_disk(str(folder))
        if not isinstance(dataset.features.get("image"), datasets.Image):
            raise UserError(f"{folder} has no column 'image' with images; its columns: {dataset.column_names}")
        return Table(dataset, folder.name, f"The data set saved in {folder}.", "not stated", f"the data set {folder}")
    return read_folder(folder)


def _label_counts(table: Table) -> dict[str, int]:
    feature, values = table.dataset.features["label"], table.dataset["label"][:]
    names = label_names([table.dataset], "label", table.place)
    if isinstance(feature, datasets.ClassLabel):
        values = feature.int2str(values)
    counts = Counter(map(str, values))
    return {name: counts[name] for name in names}


def _file(cell: dict) -> io.BytesIO | str:
    return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]


def _thumbnail(image: Image.Image) -> Image.Image:
    """The whole picture in a cell of the grid; small ones are enlarged pixel by pixel, as they are."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    small = max(image.size) <= CELL
    image = ImageOps.contain(image, (CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
    cell = Image.new("RGBA", (CELL + 2, CELL + 2), "white")
    cell.alpha_composite(image, ((CELL + 2 - image.width) // 2, (CELL + 2 - image.height) // 2))
    return cell.convert("RGB")


def _grid(cells: list[Image.Image]) -> Image.Image:
    """The cells in rows of about equal length."""
    columns = round(len(cells) ** 0.5)
    rows = -(-len(cells) // columns)
    blank = Image.new("RGB", cells[0].size, "white")
    return make_image_grid(cells + [blank] * (rows * columns - len(cells)), rows, columns)
