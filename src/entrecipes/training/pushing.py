"""Pushing what a run left: its results, and its checkpoints as pipelines."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from huggingface_hub import ModelCardData

from entrecipes.blocks.pruning import Subject
from entrecipes.diffusion.adapter_folder import FOLDER
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.pipelines import load_components
from entrecipes.errors import UserError
from entrecipes.hub import Pushed, commit_files, push
from entrecipes.hub.push import PARTS, asked_for, base_on_hub, command
from entrecipes.hub.refusals import Refused
from entrecipes.recipe.base import build
from entrecipes.recipe.load import load
from entrecipes.recipe.schema import Recipe
from entrecipes.reference import split
from entrecipes.report.run_folder import RunFolder
from entrecipes.training import checkpoint

logger = logging.getLogger(__name__)


def push_when_asked(recipe: Recipe, folder: Path) -> None:
    """Push a finished run where its recipe names a repository; whatever keeps that from working is only told.

    Everything is on disk by then. Called in one process alone, with no work left that the others would wait in.
    """
    if recipe.hub.repo_id is None:
        return
    retry = command(folder, recipe.hub.repo_id) + " --checkpoints" * recipe.hub.checkpoints
    try:
        for pushed in push_all(folder):
            logger.info(
                "pushed to %s (commit %s)%s", pushed.url, pushed.commit, "" if pushed.changed else ", as before"
            )
    except UserError as error:
        logger.warning("not pushed: %s", error)
    except Exception as error:  # the run is whole, and must not look as if it had failed
        logger.warning("not pushed (%s); the run folder is whole: try again with `%s`", type(error).__name__, retry)


def push_all(
    folder: str | Path,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    what: Collection[str] = (),
    checkpoints: bool | None = None,
    base: str | None = None,
) -> Iterator[Pushed]:
    """Push a run's results, then its checkpoints where these are asked for; see `hub.push`.

    Args:
        checkpoints: Push each kept checkpoint, too; None: as the recipe says.

    Raises:
        UserError: As `hub.push`; or when checkpoints are asked for and the run keeps none.
    """
    folder = Path(folder)
    yield push(folder, repo_id, private, revision, what, base)
    hub = asked_for(RunFolder(folder))
    if hub.checkpoints if checkpoints is None else checkpoints:
        private = hub.private if private is None else private
        yield from push_checkpoints(folder, repo_id or hub.repo_id, private, base)


def push_checkpoints(folder: Path, repo_id: str, private: bool = False, base: str | None = None) -> Iterator[Pushed]:
    """Push the averaged weights of every kept checkpoint as a pipeline (or adapter) on a branch `images-N`.

    Raises:
        UserError: When there are none, one is damaged, or the Hub does not take it.
    """
    recipe, run = load(folder / "recipe.yaml").recipe, RunFolder(folder)
    base = base_on_hub(run, base)
    found = checkpoint.listed(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: keeps no checkpoints; leave --checkpoints out, or push the folder that has them")
    for path in found:
        with tempfile.TemporaryDirectory() as made:
            saved = save_checkpoint(path, recipe, folder, Path(made), base)
            files = {str(file.relative_to(saved)): file for file in sorted(saved.rglob("*")) if file.is_file()}
            records: dict[str, Path | bytes] = {name: folder / name for name in ("recipe.yaml", "recipe.source.yaml")}
            records["README.md"] = _card(run, repo_id, path.name).encode()
            # what the branch takes over from main is of the finished run
            parts = {part: {} for part in PARTS} | {saved.name: files, "records": records}
            message = f"Push {run.run['name']} at image {_images(path.name):,}"
            try:
                yield commit_files(parts, repo_id, message, private=private, revision=path.name)
            except Refused as refused:
                raise refused.naming(f"{command(folder, repo_id, private, base=base)} --checkpoints") from None


def _images(name: str) -> int:
    return int(name.split("-")[1])


def _card(run: RunFolder, repo_id: str, branch: str) -> str:
    """The card of a checkpoint: what it is of, and how it is had; all else stands on the run's."""
    data = ModelCardData(library_name="diffusers", license=run.run["license"], tags=["entrecipes"])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {run.run['name']} at image {_images(branch):,}\n\n"
        f"The weights of `{repo_id}` after {_images(branch):,} of {run.run['images']:,} images of training. They load "
        f'as the card of its main branch says, with `revision="{branch}"`.\n'
    )


def save_checkpoint(path: Path, recipe: Recipe, folder: Path, output: Path, base: str | None = None) -> Path:
    """The evaluated weights of a checkpoint as the run would publish them, below `output`; returns that folder.

    Neither data nor a device is needed.

    Args:
        path: The checkpoint.
        recipe: Of the run.
        folder: Its folder, finished.
        output: Where `pipeline/` or `adapter/` is written.
        base: Hub id of what an adapter lies on, in place of what the recipe names.

    Raises:
        UserError: When the checkpoint is damaged, or what it starts from has changed.
    """
    state, section = checkpoint.load(path), recipe.pipeline
    components = load_components(section, recipe.training.seed)
    model = components.model
    adapter = build("adapter", recipe.blocks.adapter, model=model, seed=recipe.training.seed)
    adapter.check_continues(state.get("adapter", {}), path)
    subject = Subject(
        components=components,
        copies=(),
        images=recipe.training.images,
        seed=recipe.training.seed,
        objective=Objective(recipe.objective, components.path),
        noise=None,
        scoring=None,
        agree=lambda value: value,
    )
    build("prune", recipe.prune, subject=subject).load_state_dict(state.get("prune", {}))
    adapter.load_state_dict(model, state["ema"] or state["model"])
    target = output / (FOLDER if adapter.published_alone else "pipeline")
    published = folder / target.name
    if adapter.published_alone:
        source, revision = split(base) if base else (section.pretrained, section.revision)
        adapter.publish(model, target, source, revision, published)
        if (published / "pipeline.py").is_file():
            shutil.copyfile(published / "pipeline.py", target / "pipeline.py")
    else:
        components.pipeline(adapter.merged(model)).save_pretrained(target)
    if (published / "example").is_dir():
        shutil.copytree(published / "example", target / "example")
    return target
