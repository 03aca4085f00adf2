"""A TDC run: a base, the search, the experts, and all of them in one published pipeline.

Base and experts are ordinary runs in sub-folders, so that each resumes exactly, and each expert can be launched by
itself from its own recipe, `experts/NUMBER.yaml`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import ModelMixin

from entrecipes.diffusion.pipelines import best_device, load_components, load_pipeline
from entrecipes.errors import UserError
from entrecipes.experts.grouping import boundaries
from entrecipes.experts.proxy_pruning import MemoryBank
from entrecipes.experts.tdc import MEMORY, PLAN, base_recipe, member_recipe, read_plan, write_plan
from entrecipes.models.experts import TimestepExperts
from entrecipes.models.slim import to_stock
from entrecipes.recipe.base import build
from entrecipes.recipe.changes import HARMLESS, differences
from entrecipes.recipe.load import LoadedRecipe, dump, load
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.schema import Recipe
from entrecipes.training.dry_run import Estimate, dry_run
from entrecipes.training.expert_costs import costs_of, expected
from entrecipes.training.expert_search import ExpertSearch
from entrecipes.training.launch import Interrupted, make_room, run_folder, run_recipe, stopping_at_signals
from entrecipes.training.launched import LONGEST_WAIT
from entrecipes.training.memory import Prediction
from entrecipes.training.planning import said
from entrecipes.training.publish import publish
from entrecipes.training.pushing import push_when_asked
from entrecipes.training.run import Run
from entrecipes.training.telling import measure_when_due
from entrecipes.training.tracking import Listener

logger = logging.getLogger(__name__)

FREE = (*HARMLESS, "experts.stop_after", "experts.stock", "experts.base")
"""Beginnings of the keys that may change while a TDC run goes on."""


def run_experts(loaded: LoadedRecipe, listener: Listener | None = None) -> Path | None:
    """Carry out a TDC recipe, or go on with it.

    Args:
        loaded: The recipe with its name and text.
        listener: Called with every log row of every part, which it names by `part`.

    Returns:
        The run folder; None when `experts.stop_after` ended it before the last stage.

    Raises:
        UserError: For whatever does not fit.
        Interrupted: On SIGINT or SIGTERM; the same command goes on.
    """
    return TdcRun(loaded, listener).go()


def dry_run_experts(
    recipe: Recipe, seconds: float = 0.0, predicted: Prediction | None = None
) -> tuple[Estimate, list[str]]:
    """Try the base out, and say what the whole would cost. Raises UserError for all that a real run would refuse."""
    told = expected(recipe)
    if recipe.experts.base:
        check_base(recipe, Path(recipe.experts.base))
    tried = dry_run(base_recipe(recipe, Path("base")), seconds, predicted)
    return replace(tried, training_seconds=recipe.training.images / tried.images_per_second), told


def check_base(recipe: Recipe, folder: Path) -> None:
    """Raises UserError unless the folder holds the finished base of a recipe."""
    if why := _missing(base_recipe(recipe, folder), folder):
        inner = f" (did you mean {folder / 'base'}?)" if (folder / "base" / "run.json").exists() else ""
        raise UserError(
            f"experts.base: {folder} is no run of this recipe's base{inner}: {why}; leave the key out to train it"
        )


def _missing(recipe: Recipe, folder: Path) -> str:
    """What a folder lacks of being this run to its end, measured in whatever way; empty when it lacks nothing."""
    try:
        held = load(folder / "recipe.yaml").recipe.model_dump(mode="json", by_alias=True)
        images = json.loads((folder / "run.json").read_text())["images"]
    except (UserError, OSError, ValueError, KeyError):
        return "it holds no finished run" if folder.exists() else "no such folder"
    found = differences(held, recipe.model_dump(mode="json", by_alias=True))
    if changes := [change for change in found if not change[0].startswith((*HARMLESS, "pipeline.pretrained"))]:
        return said(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    whole = images >= recipe.training.images and (folder / "pipeline" / "model_index.json").exists()
    return "" if whole else "it has not finished"


class TdcRun:
    """One TDC run folder on its way."""

    def __init__(self, loaded: LoadedRecipe, listener: Listener | None) -> None:
        self.loaded, self.recipe, self.listener = loaded, loaded.recipe, listener
        self.section, self.folder = loaded.recipe.experts, run_folder(loaded)
        self.state = PartialState(cpu=best_device().type == "cpu", timeout=LONGEST_WAIT)
        if self.recipe.training.cpu_threads:  # a search that goes on must round as the one that began in a run
            torch.set_num_threads(self.recipe.training.cpu_threads)
        self.stop_requested = False
        self.world_size = self.state.num_processes

    def go(self) -> Path | None:
        """All stages, each skipped that is finished already."""
        self._begin()
        base = self._base()
        if self.section.stop_after == "base":
            return self._stop("the base", "the search")
        found = self.agree((self.folder / PLAN).exists)
        plan = read_plan(self.folder) if found else self._search(base)
        recipes = [self.folder / "experts" / f"{group['number']}.yaml" for group in plan["groups"]]
        if self.section.stop_after == "search":
            for path in recipes:
                logger.info("an expert by itself: entrecipes run %s", path)
            return self._stop("the search", "the experts")
        for path in recipes:
            start = self.folder / "search" / f"start-{path.stem}"  # wherever the folder has been moved to
            if not (start / "model_index.json").exists():
                raise UserError(
                    f"{start}: missing; bring it from where the search ran, or remove {self.folder / PLAN}: the search "
                    "is then repeated from its memory bank"
                )
            here = [f"training.output={path.with_suffix('')}", f"pipeline.pretrained={start}"]
            self._stage(load(path, here), f"expert {path.stem}")
        if self.section.stop_after == "experts":
            return self._stop("the experts", "their pipeline")
        self._publish(plan, base)
        return self.folder

    def agree(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, or the mistake that it finds, in all processes."""
        made: Any = None
        if self.state.is_main_process:
            try:
                made = make()
            except UserError as error:
                made = error
        made = broadcast_object_list([made])[0]
        if isinstance(made, UserError):
            raise made
        return made

    def each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """`work` of every item, one in each process at a time, in order and in all processes."""
        for start in range(0, len(items), self.world_size):
            mine = items[start : start + self.world_size][self.state.process_index :][:1]
            yield from gather_object([work(item) for item in mine])

    # -- stages -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Check the folder, write the recipe, and say what is to come. Raises UserError for another run's folder."""
        expectations = expected(self.recipe)
        if self.state.is_main_process:
            self._prepare_folder()
            for line in expectations:
                logger.info(line)
        self.state.wait_for_everyone()

    def _prepare_folder(self) -> None:
        begun = any((self.folder / name).exists() for name in ("base", "search"))
        if begun and self.recipe.training.resume != "never":
            self._check_continues()
        else:
            make_room(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(self.loaded.resolved_yaml())
            (self.folder / "recipe.source.yaml").write_text(self.loaded.text)
        except OSError as error:
            raise UserError(f"{self.folder}: can't write there ({error}); set training.output") from error

    def _check_continues(self) -> None:
        old = load(self.folder / "recipe.yaml").recipe.model_dump(mode="json", by_alias=True)
        found = differences(old, self.recipe.model_dump(mode="json", by_alias=True))
        if changes := [change for change in found if not change[0].startswith(FREE)]:
            raise UserError(
                f"{self.folder}: holds another run ({said(changes)}). Give this one another training.output, or start "
                "it afresh there with training.resume=never, which moves the other aside"
            )

    def _base(self) -> Path:
        """The run folder of the trained base."""
        path = self.folder / "base"
        recipe = base_recipe(self.recipe, path)
        if self.section.base is None:
            self._stage(self._written(recipe, self.folder / "base.yaml"), "base")
            return path
        given = Path(self.section.base)
        check_base(self.recipe, given)
        return given

    def _stage(self, loaded: LoadedRecipe, part: str) -> None:
        """Train a part, unless it is finished already."""
        loaded = replace(loaded, name=f"{self.loaded.name} ({part})")
        if self.agree(lambda: not _missing(loaded.recipe, run_folder(loaded))):
            return
        total = loaded.recipe.training.images
        tell = self.listener and (lambda row: self.listener({"part": part, "of": total, **row}))
        run_recipe(loaded, tell, last=False)

    def _search(self, base: Path) -> dict[str, Any]:
        """Find the networks, share out the budget, write the plan and the experts' recipes."""
        finder = ExpertSearch(self.recipe, base, self.folder / "search", self.state.device, self.agree, self.each)
        proposer = build("proposer", self.section.search.proposer)
        bank = MemoryBank(self.folder / MEMORY if self.state.is_main_process else None)
        with stopping_at_signals(self):
            found = [finder.find(group, bank, proposer, self._check_stop) for group in finder.groups]
        trials = [trial for group in finder.groups for trial in bank.trials(group.number)]
        searched = self.agree(lambda: finder.flops + sum(trial.compute for trial in trials))
        networks = [one.best.flops for one in found]
        costs = costs_of(self.recipe, finder.components, finder.groups, finder.units.base_flops, searched, networks)
        for group, images in zip(finder.groups, costs.images, strict=True):
            start = self.folder / "search" / f"start-{group.number}"
            recipe = member_recipe(self.recipe, group, images, start, self.folder / "experts" / str(group.number))
            self._written(recipe, self.folder / "experts" / f"{group.number}.yaml")
        if self.state.is_main_process:
            borders = boundaries(finder.groups, finder.path)
            units = [{"path": unit.path, "kind": unit.kind, "atoms": unit.atoms} for unit in finder.units.units]
            seconds = sum(trial.seconds for trial in trials)
            write_plan(self.folder, self.section, found, borders, finder.units.base_flops, costs, units, seconds)
        self.state.wait_for_everyone()
        return read_plan(self.folder)

    def _publish(self, plan: dict[str, Any], base: Path) -> None:
        """One pipeline of all experts: measured, with its card and report."""
        folders = [self.folder / "experts" / str(group["number"]) for group in plan["groups"]]
        parts = load_components(Pipeline(pretrained=str(base)), self.recipe.training.seed)
        networks = [parts.family.denoiser(load_pipeline(str(folder))) for folder in folders]
        parts.model = TimestepExperts(networks, plan["boundaries"])
        if self.state.is_main_process:
            shutil.copyfile(base / "metrics.jsonl", self.folder / "metrics.jsonl")
            self._save_stock(networks)
        self.state.wait_for_everyone()
        run = Run(self.recipe, self.folder, self.listener, parts)
        run.images = self.recipe.training.images
        records = [json.loads((folder / "run.json").read_text()) for folder in (base, *folders)]
        run.window.total_seconds = sum(record["seconds_training"] for record in records) + plan["seconds"]
        measure_when_due(run, 0)
        publish(run, self.loaded.name, experts={key: plan[key] for key in plan if key not in ("format", "units")})
        run.accelerator.end_training()
        if self.state.is_main_process:
            push_when_asked(self.recipe, self.folder)

    def _save_stock(self, networks: Sequence[ModelMixin]) -> None:
        """Each expert as a stock model of the base's size."""
        shutil.rmtree(self.folder / "stock", ignore_errors=True)
        if self.section.stock:
            for number, network in enumerate(networks):
                to_stock(network).save_pretrained(self.folder / "stock" / f"expert_{number}")

    # -- small things -----------------------------------------------------------------------------------------------

    def _written(self, recipe: Recipe, path: Path) -> LoadedRecipe:
        """A part's recipe, as a file that can be run by itself."""
        if self.state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {recipe.description}\n#   entrecipes run {path}\n{dump(recipe)}")
        self.state.wait_for_everyone()
        return load(path)

    def _check_stop(self) -> None:
        if self.stop_requested:
            raise Interrupted("stopped in the search; the same command goes on with the trials so far")

    def _stop(self, done: str, following: str) -> None:
        self.state.destroy_process_group()
        logger.info(
            "stopped after %s, as experts.stop_after asks; without it the same command goes on with %s", done, following
        )
