"""A repository of the Hub as a folder here, whole or not at all."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from entrecipes.errors import UserError
from entrecipes.hub.commit import check_repo_id
from entrecipes.reference import as_folder, reaching, shown, split, steadily

PULLED = "pulled.json"
"""In the folder: what it was pulled from."""
INDEX = "model_index.json"
WEIGHTS = re.compile(r".*\.(safetensors|bin|ckpt|pth?|msgpack|h5|onnx|onnx_data|pb|gguf)")
LOADED = re.compile(r"(diffusion_pytorch_model|pytorch_lora_weights|model)(-\d+-of-\d+)?\.safetensors")
"""What diffusers and transformers load unless asked for another format or precision."""


@dataclass(frozen=True)
class Pulled:
    """What a folder was pulled from."""

    repo_id: str
    revision: str | None
    """As asked for; None: main."""
    commit: str
    files: dict[str, int]
    """Bytes of each."""


def pull(name: str, output: Path | None = None) -> tuple[Path, Pulled, bool]:
    """Download a pipeline, an adapter or a pushed run, to be used like a run folder.

    Files that stand there twice are left out: other formats and precisions of the same weights. The folder appears
    when all of it has come. Until then the files lie beside it, and the next try goes on from there.

    Args:
        name: `owner/name` or `owner/name@revision`.
        output: The folder; None: `outputs/owner--name`, or `outputs/owner--name--revision`.

    Returns:
        The folder, what is in it, and whether anything was downloaded: a folder of that commit stays as it is.

    Raises:
        UserError: When there is no such repository or revision, it may not be read, the Hub can't be reached, the disk
            is too small, or the folder holds something else.
    """
    repo_id, revision = split(name)
    check_repo_id(repo_id)
    folder = output or Path("outputs") / as_folder(name)
    if not folder.name:
        raise UserError(f"-o {folder}: give the name of a folder that is to be made, such as {as_folder(name)}")
    with reaching(repo_id, revision):
        info = steadily(lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
    files = {path: sizes[path] for path in chosen(sizes)}
    wanted = Pulled(repo_id, revision, info.sha, files)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        _check_same(folder, wanted)
        return folder, wanted, False
    partial = folder.with_name(f".pulling-{folder.name}")
    _check_space(partial, wanted)
    command = shlex.join(["entrecipes", "pull", name, *(["-o", str(output)] if output else [])])
    try:
        with reaching(repo_id, revision):
            only = [escape(path) for path in files]
            steadily(lambda: snapshot_download(repo_id, revision=info.sha, local_dir=partial, allow_patterns=only))
    except UserError as error:
        raise UserError(f"{error}; `{command}` goes on with what is in {partial}") from error
    _tidy(partial, files)
    (partial / PULLED).write_text(json.dumps(asdict(wanted), indent=1) + "\n")
    partial.rename(folder)
    return folder, wanted, True


def pulled(folder: Path) -> Pulled | None:
    """What a folder was pulled from; None: it was not."""
    try:
        return Pulled(**json.loads((folder / PULLED).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def chosen(paths: Collection[str]) -> list[str]:
    """The files of a repository but for weights that stand there twice: in other formats or precisions, or in one file
    beside a pipeline."""
    kept = {path for path in paths if not WEIGHTS.fullmatch(path) or LOADED.fullmatch(Path(path).name)}
    loaded = {str(Path(path).parent) for path in kept if WEIGHTS.fullmatch(path)} | ({"."} if INDEX in paths else set())
    return [path for path in paths if path in kept or str(Path(path).parent) not in loaded]


def _check_same(folder: Path, wanted: Pulled) -> None:
    """Raises UserError unless the folder is what would be pulled."""
    there = pulled(folder)
    if there is None:
        raise UserError(f"{folder} holds something else; give another folder with -o")
    if (there.repo_id, there.commit) != (wanted.repo_id, wanted.commit):
        raise UserError(
            f"{folder} holds {shown(there.repo_id, there.commit[:8])}, and {shown(wanted.repo_id, wanted.revision)} is "
            f"commit {wanted.commit[:8]}; remove the folder, or give another with -o"
        )
    if missing := [path for path in there.files if not (folder / path).is_file()]:
        raise UserError(f"{folder} lacks {missing[0]}, which was pulled; remove the folder and pull again")


def _check_space(partial: Path, wanted: Pulled) -> None:
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(wanted.files.values()) - there, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise UserError(
            f"{wanted.repo_id} needs {needed / 2**30:.1f} GiB and {partial.parent} has {free / 2**30:.1f} free; make "
            "room, or give a folder on another disk with -o"
        )


def _tidy(partial: Path, files: Collection[str]) -> None:
    """Remove the downloader's notes, and what an earlier try fetched of another commit."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    for path in [path for path in partial.rglob("*") if path.is_file()]:
        if path.relative_to(partial).as_posix() not in files:
            path.unlink()
