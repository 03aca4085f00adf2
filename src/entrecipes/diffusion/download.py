"""Pipelines and adapters of the Hub as folders of its cache: what loads them, and the records of their run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, WanPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

import entrecipes
from entrecipes.diffusion.adapter_folder import BASE_FILE
from entrecipes.diffusion.families import FAMILIES
from entrecipes.errors import UserError
from entrecipes.reference import is_local, reaching, shown, split, steadily

INDEX = DiffusionPipeline.config_name
RECORDS = ["recipe.yaml", "recipe.source.yaml", "run.json", "metrics.jsonl", "pruning.json", "infonoise/*"]
"""What a pushed run has beside its pipeline, and verbs look for in a run folder."""
TO_LOOK_AT = ["samples/*", "report.html"]
"""What it has for people alone."""


def records(name: str) -> Path:
    """Where the files of the run behind a pipeline lie, if it is known: its folder, or one of the Hub's cache.

    Raises:
        UserError: When it is on the Hub, and can't be had.
    """
    source, revision = split(name)
    return Path(source) if is_local(source) else _records(source, revision)


def fetch(source: str, revision: str | None) -> Path:
    """A pipeline or an adapter of the Hub, with the records of its run, as a folder of the Hub's cache.

    What is there already is not fetched again; where it is whole, no network is needed.

    Args:
        source: Hub id.
        revision: Branch, tag or commit; None: main.

    Raises:
        UserError: When there is no such repository or revision, neither pipeline nor adapter in it, it may not be read,
            or the Hub can't be reached and it is not whole in the cache.
        ValueError: When its pipeline is of a class that diffusers would have to run foreign source for.
    """
    folder = _records(source, revision)
    index = json.loads((folder / INDEX).read_text()) if (folder / INDEX).is_file() else None
    if index is None and not (folder / BASE_FILE).is_file():
        raise UserError(
            f"{shown(source, revision)}: neither a pipeline ({INDEX}) nor an adapter of ours ({BASE_FILE}) is in it; "
            "check the id"
        )
    with reaching(source, revision):
        if index is None or _is_ours(index):  # diffusers' own choice of files would leave some out
            return _snapshot(source, folder.name, ignore_patterns=TO_LOOK_AT)
        if index["_class_name"] in {name for family in FAMILIES.values() for name in family.bases}:
            return _download(WanPipeline, source, folder.name, text_encoder=None, tokenizer=None)  # of 11 GB
        return _download(DiffusionPipeline, source, folder.name)


def _records(source: str, revision: str | None) -> Path:
    with reaching(source, revision):
        return _snapshot(source, revision, allow_patterns=[*RECORDS, INDEX, BASE_FILE])


def _snapshot(source: str, revision: str | None, **patterns: list[str]) -> Path:
    return Path(steadily(lambda: snapshot_download(source, revision=revision, **patterns)))


def _is_ours(index: dict[str, Any]) -> bool:
    """Whether the pipeline's class, or that of a part, comes from here."""
    libraries = [part[0] for part in index.values() if isinstance(part, list)]
    return index.get("_class_name") in entrecipes._LAZY or "entrecipes" in libraries


def _download(cls: type[DiffusionPipeline], source: str, commit: str, **without: None) -> Path:
    try:
        return Path(steadily(lambda: cls.download(source, revision=commit, **without)))
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        return Path(cls.download(source, revision=commit, local_files_only=True, **without))  # which it would not try
