"""A folder of images, read with the `imagefolder` builder after the checks that it does not make."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import datasets
import pandas
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from entrecipes.data.images import Splits
from entrecipes.data.tables import Table, open_table
from entrecipes.errors import UserError, nearest
from entrecipes.recipe.data import FolderData

METADATA = {"metadata.jsonl": lambda path: pandas.read_json(path, lines=True), "metadata.csv": pandas.read_csv}


def load(section: FolderData, *, image_size: int, channels: int) -> Splits:
    """The images under `section.path` (all levels, hidden files left out), labelled by sub-folder or by metadata.

    Raises:
        UserError: No such folder, no images, a misspelt or contradicting metadata file, missing columns, bad images.
    """
    return open_table(read_folder(section.path), section, image_size=image_size, channels=channels)


def read_folder(path: str | Path) -> Table:
    """The folder as a table with `image`, and `label` or the columns of metadata.jsonl (.csv) where they exist."""
    folder = Path(path).expanduser()
    place = f"the folder {folder}"
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"data.path: {place} does not exist{nearest(folder.name, siblings) or f' under {folder.parent.resolve()}.'}"
        )
    files = [Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
    images = {file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS}
    if not images:
        raise UserError(
            f"data.path: {place} holds no images (of {len(files)} files). Images end in .png, .jpg, .webp, ...; "
            f"a data set saved by `datasets` is opened with type: hub, id: {folder}."
        )
    _check_metadata([file for file in files if file not in images])
    try:
        # one split by name: by default `datasets` would make splits of sub-folders called train, test or validation
        dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), data_files={"train": "**"}, split="train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise UserError(f"data.path: {place} can't be read as an image folder: {reason}") from None
    return Table(dataset, folder.resolve().name, f"Images of the folder {folder.resolve().name}.", "not stated", place)


def _check_metadata(others: list[Path]) -> None:
    """Find what `imagefolder` passes over in silence: a misspelt metadata file, rows that name no file."""
    for file in others:
        if file.name in METADATA or file.name == "metadata.parquet":
            continue
        if difflib.get_close_matches(file.name.lower(), METADATA, n=1, cutoff=0.85):
            raise UserError(
                f"data.path: {file} would be ignored: a metadata file is called metadata.jsonl or metadata.csv"
                f"{nearest(file.name.lower(), METADATA) or '.'} Rename it (or give it an unlike name)."
            )
    for file in others:
        if file.name not in METADATA:
            continue
        try:
            rows = METADATA[file.name](file)
        except ValueError as error:
            raise UserError(f"data.path: {file} can't be read ({error}). It needs one row an image.") from None
        if "file_name" not in rows:
            columns = ", ".join(map(str, rows.columns))
            raise UserError(
                f"data.path: {file} has no column 'file_name'{nearest('file_name', rows.columns) or '.'} "
                f"Its columns: {columns}"
            )
        missing = [str(name) for name in rows["file_name"] if not (file.parent / str(name)).is_file()]
        if missing:
            listed = "\n".join(f"  {name}" for name in missing[:20]) + ("\n  ..." if len(missing) > 20 else "")
            raise UserError(
                f"data.path: {file} names {len(missing)} files that are not there:\n{listed}\n"
                f"Add the images or remove those rows; names are relative to {file.parent}."
            )
