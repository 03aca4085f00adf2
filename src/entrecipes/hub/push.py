"""What a run folder publishes, and how it gets to the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from entrecipes import __version__
from entrecipes.diffusion.adapter_folder import BASE_FILE, FOLDER, read_base
from entrecipes.errors import UserError, nearest
from entrecipes.hub.commit import Files, Pushed, check_repo_id, commit_files
from entrecipes.hub.pull import pulled
from entrecipes.hub.refusals import Refused
from entrecipes.recipe.hub import Hub, Part
from entrecipes.reference import split
from entrecipes.report.card import card_on_hub, published
from entrecipes.report.experts_loading import STOCK
from entrecipes.report.run_folder import RunFolder

PARTS: tuple[str, ...] = get_args(Part)
RECORDS = ("recipe.yaml", "recipe.source.yaml", "run.json", "metrics.jsonl", "pruning.json")
"""What goes along with every part, besides the card and its pictures."""
LEARNED = "infonoise"


def push(
    folder: str | Path,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    what: Collection[str] = (),
    base: str | None = None,
) -> Pushed:
    """Push what a finished run publishes, in one commit: a push of what is there already makes none.

    The pipeline's files (or the adapter's) lie at the repository's root, so that `DiffusionPipeline.from_pretrained`
    takes its id; beside them the model card, which names that id, the recipe, the records, samples and report.
    Files that an earlier push left and that the run lacks are removed; files of others stay. Nothing on disk changes.

    Args:
        folder: The run folder.
        repo_id: `owner/name`; None: the recipe's `hub.repo_id`.
        private: Make a new repository private; None: as the recipe says.
        revision: Branch, made where it is missing; None: the recipe's, or main.
        what: Of `pipeline`, `adapter`, `infonoise`, `samples`, `report`; empty: what the recipe says, or all.
        base: Hub id of the pipeline that an adapter lies on, where it was trained on a folder; None: where that run's
            recipe pushes it to.

    Raises:
        UserError: For a run that has not finished, an id or part that is none, or when the Hub does not take it; the
            message names the command that tries again.
    """
    run = RunFolder(folder)
    check_finished(run)
    hub = asked_for(run)
    repo_id, revision = repo_id or hub.repo_id, revision or hub.revision
    if repo_id is None:
        raise UserError(f"{run.path}: push it where? Give --repo-id owner/name, or set hub.repo_id in the recipe")
    check_repo_id(repo_id)
    private = hub.private if private is None else private
    parts = files_of(run, repo_id, revision, tuple(what) or hub.what, base_on_hub(run, base))
    message = f"Push {run.run['name']} ({run.run['images']:,} images) with entrecipes {__version__}"
    try:
        return commit_files(parts, repo_id, message, private=private, revision=revision)
    except Refused as refused:
        raise refused.naming(command(run.path, repo_id, private, revision, what, base)) from None


def asked_for(run: RunFolder) -> Hub:
    """The section `hub:` of a run's recipe."""
    return Hub.model_validate(run.recipe.get("hub") or {})


def check_finished(run: RunFolder) -> None:
    """Raises UserError for a run that has left no `run.json` yet, or lacks what it publishes, or came from the Hub."""
    if run.has("pulled.json"):
        raise UserError(f"{run.path}: this was pulled from the Hub, where it is already; push the run folder itself")
    if not run.has("run.json") or not (run.path / published(run.run)).is_dir():
        raise UserError(
            f"{run.path}: this run has not finished, so there is nothing to push yet; "
            f"`entrecipes run {run.path / 'recipe.yaml'}` goes on with it, then push again"
        )


def base_on_hub(run: RunFolder, given: str | None = None) -> str | None:
    """Where those who load an adapter find its base; None where the adapter says so itself, or for a pipeline.

    Raises:
        UserError: When the base is a folder here, and nothing says where it is on the Hub.
    """
    if published(run.run) == "pipeline":
        return None
    base = read_base(run.path / FOLDER)
    if given or not base.local:
        return given
    folder = Path(base.found_from(run.path / FOLDER))
    for place in (folder, folder.parent):
        if came := pulled(place):
            return f"{came.repo_id}@{came.commit}"
        if (place / "recipe.yaml").is_file() and (place / "run.json").is_file():
            hub = asked_for(RunFolder(place))
            if hub.repo_id:
                return f"{hub.repo_id}@{hub.revision}" if hub.revision else hub.repo_id
    raise UserError(
        f"{run.path}: this adapter lies on {folder}, which nobody else has; push that first, then name it here with "
        "--base owner/name"
    )


def files_of(
    run: RunFolder, repo_id: str, revision: str | None, what: Collection[str] = (), base: str | None = None
) -> dict[str, Files]:
    """What a run publishes, by part: each path in the repository with its file, or content where that is made up.

    A part without files is one that the run does not have. Where all is asked for, all parts are named.

    Raises:
        UserError: For a part that there is not, or that this run does not have.
    """
    root, other = published(run.run), {"adapter": "pipeline", "pipeline": "adapter"}[published(run.run)]
    main = run.path / root
    found: dict[str, Files] = {
        root: dict(_inside(main, ("assets", LEARNED, "README.md", "recipe.yaml"))) | dict(_beside(run.path / STOCK)),
        LEARNED: dict(_beside(main / LEARNED)) or dict(_beside(run.path / LEARNED)),
        "samples": dict(_beside(run.path / "samples")),
        "report": {"report.html": run.path / "report.html"} if run.has("report.html") else {},
    }
    for part in what:
        if not found.get(part):
            if part not in PARTS:
                raise UserError(
                    f"--what {part}: no such part{nearest(part, PARTS) or '.'} There are {', '.join(PARTS)}"
                )
            has = ", ".join(part for part in PARTS if found.get(part))
            raise UserError(f"--what {part}: {run.path} has none; it has {has}")
    parts = {part: files for part, files in found.items() if not what or part in what}
    if root in parts:
        parts[other] = {}
        if base:
            source, at = split(base)
            moved = replace(read_base(main), source=source, revision=at, local=False)
            parts[root] = {**parts[root], BASE_FILE: moved.to_json().encode()}
    records = {name: run.path / name for name in RECORDS if run.has(name)}
    card = {"README.md": card_on_hub(run.path, repo_id, revision, base).encode()}
    return {**parts, "records": records | card | dict(_beside(main / "assets"))}


def command(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    what: Collection[str] = (),
    base: str | None = None,
) -> str:
    """The command line that pushes it."""
    options = ["--repo-id", repo_id, *["--private"] * private, *(["--revision", revision] if revision else [])]
    options += [*(["--what", ",".join(what)] if what else []), *(["--base", base] if base else [])]
    return shlex.join(["entrecipes", "push", str(folder), *options])


def _inside(folder: Path, without: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """The files of a folder by their paths in it, but for hidden ones and these at its top."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in without and not any(part.startswith(".") for part in parts):
            yield "/".join(parts), path


def _beside(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder by their paths beside it; none where it is missing."""
    return ((f"{folder.name}/{path}", file) for path, file in _inside(folder))
