"""Data sets built on this machine: `prepare` makes an ordinary `datasets` folder, `load` trains on it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from entrecipes.data.fetch import fetch
from entrecipes.data.images import Splits
from entrecipes.data.places import atomic_folder, home
from entrecipes.data.sources import source as find_source
from entrecipes.data.sources.base import Options, Source
from entrecipes.data.tables import Table, open_table
from entrecipes.errors import UserError
from entrecipes.recipe.data import PreparedData

logger = logging.getLogger(__name__)

FACTS = "prepared.json"


def prepared_folder(name: str) -> Path:
    """Where `prepare` puts a set unless told otherwise."""
    return home() / "prepared" / name


def facts(folder: Path) -> dict[str, Any] | None:
    """What `prepare` noted of a folder: name, source, license, packages, options, images (or sequences, with their
    alphabet); None when it made none."""
    path = folder / FACTS
    return json.loads(path.read_text()) if path.exists() else None


def prepare(name: str, options: Options | None = None, *, output: Path | None = None, force: bool = False) -> Path:
    """Download what is missing, check it, and write the set as a folder that `datasets.load_from_disk` opens.

    The folder appears whole or not at all; downloads are kept, so that a second try goes on where the first stopped.

    Args:
        output: The folder to make; by default the one where `load` looks.
        force: Make it again although it is there.

    Raises:
        UserError: Unknown name, missing client or network (with what can be done), unexpected content, or the folder
            holds the set with other options or something else and `force` is off.
    """
    source = find_source(name)
    options = options or Options(size=source.size)
    folder = output or prepared_folder(name)
    chosen = source.chosen(options)
    there = facts(folder)
    if folder.exists() and any(folder.iterdir()):
        if there is None:
            raise UserError(f"{folder} holds something else; name another --output.")
        if not force:
            if (there["name"], there["options"]) == (name, chosen):
                return folder
            was = ", ".join(f"{key} {value}" for key, value in there["options"].items()) or "none"
            raise UserError(
                f"{folder} holds {there['name']} with other options ({was}). "
                f"Add --force to replace it, or --output DIR for another folder."
            )
    files = [fetch(package, home() / "downloads") for package in source.packages]
    dataset = _table(source, files, options)
    noted = {
        "name": name,
        "source": f"{source.description}; from {', '.join(package.spec for package in source.packages)}.",
        "license": source.license,
        "packages": [asdict(package) for package in source.packages],
        "options": chosen,
        "images": len(dataset),
    }
    if source.clips:
        noted["videos"] = len(set(dataset["video"]))
    if source.alphabet is not None:
        noted |= {"alphabet": source.alphabet, "independent": source.independent}
    with atomic_folder(folder) as scratch:
        dataset.save_to_disk(str(scratch))
        (scratch / FACTS).write_text(json.dumps(noted, indent=2) + "\n")
    logger.info("prepared %d rows of %s at %s", len(dataset), name, folder)
    return folder


def load(section: PreparedData, *, image_size: int, channels: int) -> Splits:
    """The set that `entrecipes data prepare NAME` has built.

    Raises:
        UserError: It has not been built, or drawn smaller than the model takes; missing columns.
    """
    if find_source(section.name).alphabet is not None:
        raise UserError(f"data.name: '{section.name}' holds sequences; say data.type: sequences")
    table = prepared_table(section.name, image_size)
    return open_table(table, section, image_size=image_size, channels=channels)


def prepared_table(name: str, image_size: int) -> Table:
    """A prepared set by its name or its folder, which holds images of at least that size.

    Raises:
        UserError: It has not been built, or drawn smaller.
    """
    there = facts(Path(name))
    source = find_source(there["name"] if there else name)
    folder = Path(name) if there else prepared_folder(name)
    noted = there or facts(folder)
    command = f"entrecipes data prepare {source.name}" + (f" --size {image_size}" if source.any_size else "")
    command += f" --output {name}" if there else ""
    if noted is None:
        raise UserError(f"data.name: '{name}' is not prepared on this machine yet: run `{command}`")
    if noted["options"].get("size", image_size) < image_size:
        raise UserError(
            f"data.name: '{name}' was drawn at {noted['options']['size']} px and the model takes {image_size}: "
            f"run `{command} --force`"
        )
    return read_prepared(folder)


def read_prepared(folder: Path) -> Table:
    """A folder that `prepare` made, as a table. Raises UserError when it is damaged."""
    noted = facts(folder)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged ({error}): run `entrecipes data prepare {noted['name']} --force`"
        ) from None
    return Table(dataset, noted["name"], noted["source"], noted["license"], f"the prepared set {noted['name']}")


def _table(source: Source, files: list[Path], options: Options) -> datasets.Dataset:
    """All rows of a source: images as PNG, classes in the order of their names, other values as they are."""
    columns: dict[str, list[Any]] = {}
    for row in _encoded(source.rows(files, options)):
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    features: dict[str, Any] = {key: _feature(values[0]) for key, values in columns.items()}
    if "image" in columns:
        features["image"] = datasets.Image()
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=sorted(set(columns["label"])))
        columns["label"] = features["label"].str2int(columns["label"])
    info = datasets.DatasetInfo(
        description=source.description,
        license=source.license,
        dataset_name=source.name,
        features=datasets.Features(features),
    )
    return datasets.Dataset.from_dict(columns, info=info)


def _feature(value: Any) -> Any:
    if isinstance(value, list):
        return datasets.Sequence(datasets.Value("float32"))
    return datasets.Value("int64" if isinstance(value, int) else "string")


def _encoded(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if "image" not in row:
            yield row
            continue
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(row["image"])).save(buffer, "PNG")
        yield row | {"image": {"bytes": buffer.getvalue(), "path": None}}
