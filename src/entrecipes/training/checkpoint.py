"""Checkpoints: safetensors and JSON, written beside their place and moved there when whole, verified when read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from entrecipes.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"


def save(folder: Path, images: int, state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint and remove the oldest beyond `keep`.

    The tensors of each top-level key go into `<key>.safetensors`; everything else, and the SHA-256 of every file, into
    `state.json`. The folder appears under its final name only when all of it is on disk, so that a crash or a full disk
    in the middle leaves the earlier checkpoints as they were.

    Args:
        folder: The run's `checkpoints/`.
        images: Images seen; names the checkpoint.
        state: Nested dicts and lists of tensors and JSON values.
        keep: Checkpoints to keep.

    Raises:
        UserError: When the disk is full or not writable.
    """
    target = folder / f"images-{images:012d}"
    partial = folder / f".writing-{target.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        values, files = {}, {}
        for key, part in state.items():
            tensors: dict[str, torch.Tensor] = {}
            values[key] = _split(part, tensors, "")
            if tensors:
                name = f"{key}.safetensors"
                save_file(tensors, partial / name)
                files[name] = {"sha256": _sync_and_hash(partial / name), "bytes": (partial / name).stat().st_size}
        record = {"format": FORMAT, "images": images, "files": files, "values": values}
        (partial / STATE_FILE).write_text(json.dumps(record, indent=1))
        _sync_and_hash(partial / STATE_FILE)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        left = listed(folder)
        raise UserError(
            f"{target}: the checkpoint could not be written ({'the disk is full' if full else error}). "
            + (f"{left[-1].name} is intact: " if left else "There is none before it: ")
            + "free some space (or set training.output) and run the same command to go on from there."
        ) from error
    for old in listed(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint back as the nested state that was saved, tensors on the CPU.

    Raises:
        UserError: When it is no checkpoint, or any of its files is missing, cut short or changed.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder; `training.resume=auto` finds the newest one")
    try:
        record = json.loads((path / STATE_FILE).read_text())
        files, values = record["files"], record["values"]
    except FileNotFoundError:
        raise UserError(f"{path}: {STATE_FILE} is missing, so this is no checkpoint; name another folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / STATE_FILE}: damaged ({error}); remove {path} and resume from an older one"
        ) from error
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: written in format {record.get('format')}, this version reads format {FORMAT}")
    for name, facts in files.items():
        if not (path / name).exists():
            raise UserError(f"{path / name}: missing; remove {path} and resume from an older checkpoint")
        if _sha256(path / name) != facts["sha256"]:
            raise UserError(
                f"{path / name}: damaged (its SHA-256 has changed); remove {path} and resume from an older one"
            )
    tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in files}
    return {key: _join(value, tensors.get(key, {})) for key, value in values.items()}


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("images-*") if path.is_dir())


def set_aside(folder: Path, beyond: int) -> None:
    """Rename the checkpoints with more images than a run goes on from: they are another future of it.

    Rotation and `newest` no longer see them.
    """
    for path in listed(folder):
        if int(path.name.split("-")[1]) > beyond:
            aside = folder / f"abandoned-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its state; damaged newer ones are named in a warning.

    Raises:
        UserError: When there are checkpoints and none is whole: nothing is overwritten without being asked.
    """
    problems = []
    for path in reversed(listed(folder)):
        try:
            state = load(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("skipped a damaged checkpoint: %s", problem)
        return path, state
    if problems:
        raise UserError(
            f"{folder}: no checkpoint is usable: {problems[0]}. To start afresh: training.resume=never, or another "
            "training.output."
        )
    return None


def _split(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Move the tensors of a nested value into `tensors`, leaving their names."""
    if isinstance(value, torch.Tensor):
        # clone: safetensors refuses tensors that share memory, and the copy is off the device anyway
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"__tensor__": name}
    if isinstance(value, dict):
        pairs = [[key, _split(item, tensors, f"{name}.{key}" if name else str(key))] for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else {"__pairs__": pairs}
    if isinstance(value, (list, tuple)):
        items = [_split(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo [`_split`]."""
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_join(item, tensors) for item in value["__tuple__"])
    if "__pairs__" in value:
        return {key: _join(item, tensors) for key, item in value["__pairs__"]}
    return {key: _join(item, tensors) for key, item in value.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_hash(path: Path) -> str:
    """Make sure that a file has reached the disk, then hash what is there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)
