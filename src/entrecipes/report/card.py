"""The model card: metadata with `model-index` results for leaderboards, and everything needed to judge them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from entrecipes.evaluation.result import Metric
from entrecipes.reference import split
from entrecipes.report import facts
from entrecipes.report.assets import draw_assets
from entrecipes.report.blocks import BlockRun
from entrecipes.report.experts import experts
from entrecipes.report.experts_loading import STOCK, routes, ways_to_load
from entrecipes.report.pruning import pruned
from entrecipes.report.run_folder import RunFolder
from entrecipes.report.snippet import (
    SIDE_ADAPTERS,
    as_seen,
    brings_source,
    needed,
    needs_entrecipes,
    samples_clips,
    snippet,
)
from entrecipes.report.stickers import KIND, kind, stickers

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "unconditional-image-generation"
"""The Hub's only task for images without a prompt; class-conditional models carry it too."""
OTHER_TASK = "other"
"""What stands for sequences, for which the Hub has no task."""
CLIPS_TASK, STICKERS_TASK = "image-to-video", "text-to-video"


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write the model card of a finished run as `README.md`, and again into `pipeline/`, with all that it shows.

    `pipeline/` (or `adapter/`, where a run leaves that) becomes the whole of what is published: beside the pipeline it
    holds the card, `assets/` (sample grid and curves) and `recipe.yaml` (the resolved recipe).

    Args:
        folder: The run folder.
        repo_id: Hub id that the card's snippet loads; null: the local pipeline folder.

    Returns:
        The path of the card in the run folder.

    Raises:
        UserError: When a file that the card needs is missing or damaged, or a metric is not finite (named).
    """
    folder = RunFolder(folder)
    pipeline = folder.path / published(folder.run)
    plots = draw_assets(folder)
    shown = {"samples": folder.samples[-1][1]} if folder.samples else {}
    shown |= {"moving": folder.moving} if folder.moving else {}
    for name, path in shown.items():
        (folder.path / "assets").mkdir(exist_ok=True)
        plots[name] = Path(shutil.copyfile(path, folder.path / "assets" / f"samples{path.suffix}"))
    path = folder.path / "README.md"
    _card(folder, plots, repo_id).save(path)
    if pipeline.is_dir():
        shutil.copyfile(path, pipeline / "README.md")
        shutil.copyfile(folder.path / "recipe.yaml", pipeline / "recipe.yaml")
        if plots:
            shutil.copytree(folder.path / "assets", pipeline / "assets", dirs_exist_ok=True)
    return path


def card_on_hub(folder: str | Path, repo_id: str, revision: str | None = None, base: str | None = None) -> str:
    """The model card of a finished run as it reads on the Hub, with the pictures that `write_card` has left.

    Args:
        folder: The run folder, which stays as it is.
        repo_id: Hub id that the card's snippets load.
        revision: The branch that they name; None: main.
        base: Hub id of what an adapter lies on, in place of a folder here.

    Raises:
        UserError: As `write_card`.
    """
    folder = RunFolder(folder)
    if base is not None:
        folder.run["adapter"] |= dict(zip(("base", "revision"), split(base), strict=True))
        folder.recipe["pipeline"]["pretrained"] = base
    drawn = (folder.path / published(folder.run) / "assets").glob("*.*")
    names = {"samples.gif": "moving"}
    return str(_card(folder, {names.get(path.name, path.stem): path for path in drawn}, repo_id, revision))


def _card(
    folder: RunFolder, plots: dict[str, Path], repo_id: str | None = None, revision: str | None = None
) -> ModelCard:
    run, metrics, blocks = folder.run, facts.metrics(folder), BlockRun(folder)
    pipeline, stock = folder.path / published(run), folder.path / STOCK
    place = repo_id or as_seen(pipeline)
    return ModelCard.from_template(
        _card_data(folder, metrics),
        template_path=str(TEMPLATE),
        run=run,
        metrics=metrics,
        facts=facts,
        plots={name: f"assets/{path.name}" for name, path in plots.items()},
        own=needs_entrecipes(run),
        own_source=brings_source(run),
        needed=needed(run),
        adapter_name=SIDE_ADAPTERS.get((run.get("adapter") or {}).get("type"), "A LoRA adapter"),
        snippet=snippet(run, place, revision),
        shows_people=brings_source(run) and not run["data"].get("rendered"),
        base=folder.recipe["pipeline"].get("pretrained"),
        infonoise=place if (pipeline / "infonoise").is_dir() else None,
        revision=revision,
        local=repo_id is None,
        held_out=facts.held_out_text(folder),
        noise_schedule=facts.noise_schedule_text(folder),
        pruning=pruned(folder),
        blocks=blocks,
        experts=experts(folder),
        stickers=stickers(folder),
        kind=kind(folder),
        captions=facts.captions(folder) if kind(folder) == KIND else [],
        ways=ways_to_load(pipeline, stock, place, None if repo_id else as_seen(stock), revision) if routes(run) else [],
        tables={
            "Data": facts.data_rows(run),
            "Speed and memory": facts.speed_rows(run) + blocks.speed_rows(),
            "Seed and versions": facts.environment_rows(run),
        },
        recipe=folder.recipe_text.strip(),
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )


def published(run: dict[str, Any]) -> str:
    """The folder of a run folder that holds what the run publishes."""
    return "adapter" if run.get("adapter") else "pipeline"


def _card_data(folder: RunFolder, metrics: list[Metric]) -> ModelCardData:
    run, recipe = folder.run, folder.recipe
    data = recipe["data"]
    makes_images = routes(run) or run["pipeline"].get("library") != "entrecipes"
    task = TASK if makes_images else OTHER_TASK
    if brings_source(run):
        task = CLIPS_TASK if samples_clips(run) else STICKERS_TASK
    adapter = (run.get("adapter") or {}).get("type")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=run["data"]["name"],
            dataset_name=run["data"]["name"],
            dataset_split=metric.origin.get("split"),
            metric_type=metric.name,
            metric_name=metric.name,
            metric_value=metric.value,
            metric_args={"origin": metric.origin} | ({} if metric.spread is None else {"spread": metric.spread}),
        )
        for metric in metrics
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=[
            "entrecipes",
            "diffusion",
            run["pipeline"]["class"],
            *([] if adapter is None else [adapter if adapter in SIDE_ADAPTERS else "lora"]),
        ],
        license=run["license"],
        base_model=_hub_id(recipe["pipeline"].get("pretrained")),
        datasets=_hub_id(data["id"]) if data["type"] == "hub" else None,
        model_name=run["name"],
        eval_results=results or None,
    )


def _hub_id(name: str | None) -> str | None:
    """The name, if it is one of the Hub and not a folder."""
    if name is None or Path(name).exists():
        return None
    name, _ = split(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
