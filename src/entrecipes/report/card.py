"""The model card: metadata with `model-index` results for leaderboards, and everything needed to judge them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from entrecipes.evaluation.result import Metric
from entrecipes.report import facts
from entrecipes.report.assets import draw_assets
from entrecipes.report.blocks import BlockRun
from entrecipes.report.experts import experts
from entrecipes.report.experts_loading import STOCK, routes, ways_to_load
from entrecipes.report.pruning import pruned
from entrecipes.report.run_folder import RunFolder

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TASK = "unconditional-image-generation"
"""The Hub's only task for images without a prompt; class-conditional models carry it too."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Diffusers' own name for the weights of an adapter."""
OTHER_TASK = "other"
"""What stands for sequences, for which the Hub has no task."""
CLIPS_TASK = "image-to-video"


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
    run, metrics = folder.run, facts.metrics(folder)
    pipeline = folder.path / published(run)
    plots = draw_assets(folder)
    shown = {"samples": folder.samples[-1][1]} if folder.samples else {}
    shown |= {"moving": folder.moving} if folder.moving else {}
    for name, path in shown.items():
        (folder.path / "assets").mkdir(exist_ok=True)
        plots[name] = Path(shutil.copyfile(path, folder.path / "assets" / f"samples{path.suffix}"))
    blocks = BlockRun(folder)
    card = ModelCard.from_template(
        _card_data(folder, metrics),
        template_path=str(TEMPLATE),
        run=run,
        metrics=metrics,
        facts=facts,
        plots={name: f"assets/{path.name}" for name, path in plots.items()},
        own=needs_entrecipes(run),
        own_source=samples_clips(run),
        snippet=snippet(run, repo_id or _shown(pipeline)),
        shows_people=samples_clips(run) and not run["data"].get("rendered"),
        base=folder.recipe["pipeline"].get("pretrained"),
        infonoise=(repo_id or _shown(pipeline)) if (pipeline / "infonoise").is_dir() else None,
        local=repo_id is None,
        held_out=facts.held_out_text(folder),
        noise_schedule=facts.noise_schedule_text(folder),
        pruning=pruned(folder),
        blocks=blocks,
        experts=experts(folder),
        ways=ways_to_load(pipeline, folder.path / STOCK, repo_id or _shown(pipeline), _shown(folder.path / STOCK)),
        tables={
            "Data": facts.data_rows(run),
            "Speed and memory": facts.speed_rows(run) + blocks.speed_rows(),
            "Seed and versions": facts.environment_rows(run),
        },
        recipe=folder.recipe_text.strip(),
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    path = folder.path / "README.md"
    card.save(path)
    if pipeline.is_dir():
        shutil.copyfile(path, pipeline / "README.md")
        shutil.copyfile(folder.path / "recipe.yaml", pipeline / "recipe.yaml")
        if plots:
            shutil.copytree(folder.path / "assets", pipeline / "assets", dirs_exist_ok=True)
    return path


def snippet(run: dict[str, Any], folder_or_repo: str | Path) -> str:
    """Python that loads the pipeline with diffusers and torch alone and writes `samples.png`.

    A pipeline of our own needs entrecipes too, and prints sequences; that of clips brings its source along, and writes
    `samples.gif` from the poses beside it, and the reference there or, where it would show a real person, the user's.

    Args:
        run: The facts of `run.json`.
        folder_or_repo: The pipeline folder or Hub id.
    """
    pipeline, adapter = run["pipeline"], run.get("adapter")
    place = folder_or_repo.as_posix() if isinstance(folder_or_repo, Path) else folder_or_repo
    count = min(pipeline.get("num_classes") or 10, 10)
    named, target, options = [], f'"{place}"', ""
    if samples_clips(run):
        on_hub = isinstance(folder_or_repo, str) and not Path(place).is_dir()
        example = f"https://huggingface.co/{place}/resolve/main/example" if on_hub else f"{place}/example"
        named = [f'folder = "{place}"', f'example = "{example}"']
        if not run["data"].get("rendered"):
            named.append('person = "person.png"  # your picture of the person who is to move')
        target, options = "folder", ", custom_pipeline=folder, trust_remote_code=True"
        imports = [
            "from diffusers import DiffusionPipeline",
            "from diffusers.utils import export_to_gif, load_image, load_video",
        ]
        loader, result, last = "DiffusionPipeline", "frames", 'export_to_gif(frames[0], "samples.gif")'
    elif pipeline.get("library") == "entrecipes" and not routes(run):
        imports = [f"from entrecipes import {pipeline['class']}"]
        loader, result, last = pipeline["class"], "sequences", 'print(*sequences, sep="\\n")'
    else:
        loader, library = (pipeline["class"], "entrecipes") if routes(run) else ("DiffusionPipeline", "diffusers")
        imports = sorted([f"from {library} import {loader}", "from diffusers.utils import make_image_grid"])
        if pipeline.get("own_model") and not routes(run):
            imports.append("import entrecipes  # the model's class")
        resize = ", resize=64" if pipeline["sample_size"] < 64 else ""
        result = "images"
        last = f'make_image_grid(images, rows=1, cols={count}{resize}).save("samples.png")'
    loading = [f"pipeline = {loader}.from_pretrained({target}{options})"]
    if adapter:
        more, loading = adapter_lines(adapter, loader, place, options)
        imports = sorted([*imports, *more])
    return "\n".join(
        [
            *(["import json", ""] if any("json" in line for line in loading) else []),
            "import torch",
            *imports,
            "",
            *named,
            *loading,
            'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
            f"{result} = pipeline(",
            *(f"    {argument}," for argument in _arguments(run, count)),
            f").{result}",
            last,
        ]
    )


def _arguments(run: dict[str, Any], count: int) -> list[str]:
    """What the pipeline is called with to get `count` samples."""
    pipeline = run["pipeline"]
    labels = [f"class_labels={list(range(count))}"] if pipeline.get("num_classes") else []
    if samples_clips(run):
        reference = 'f"{example}/reference.png"' if run["data"].get("rendered") else "person"
        asked = [f"load_image({reference})", 'load_video(f"{example}/poses.gif")']
    elif pipeline["class"] == "DiTPipeline":
        asked = [*labels, f"guidance_scale={pipeline['guidance_scale']}"]
    else:
        asked = [f"batch_size={count}", *labels]
        if routes(run) and pipeline["guidance_scale"] != 1:
            asked += [f"guidance_scale={pipeline['guidance_scale']}"]
    return [*asked, f"num_inference_steps={pipeline['steps']}", "generator=torch.Generator().manual_seed(0)"]


def published(run: dict[str, Any]) -> str:
    """The folder of a run folder that holds what the run publishes."""
    return "adapter" if run.get("adapter") else "pipeline"


def adapter_lines(adapter: dict[str, Any], loader: str, place: str, options: str = "") -> tuple[list[str], list[str]]:
    """Imports and lines that load the base with `loader`, and the adapter in the folder `place` on it."""
    base = Path(adapter["base"])
    base = _shown(base / "pipeline" if (base / "pipeline").is_dir() else base) if base.is_dir() else adapter["base"]
    revision = f', revision="{adapter["revision"]}"' if adapter["revision"] else ""
    lines = [f'pipeline = {loader}.from_pretrained("{base}"{revision}{options})']
    model = f"pipeline.{adapter['component']}"
    if adapter["loads_itself"]:
        return [], [*lines, f'{model}.load_lora_adapter("{place}", prefix=None, weight_name="{LORA_FILE}")']
    imports = [
        "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
        "from safetensors import safe_open",
        "from safetensors.torch import load_file",
    ]
    return imports, [
        *lines,
        f'weights = "{place}/{LORA_FILE}"',
        'with safe_open(weights, "pt") as file:',
        '    config = LoraConfig(**json.loads(file.metadata()["lora_adapter_metadata"]))',
        f"inject_adapter_in_model(config, {model})",
        f"set_peft_model_state_dict({model}, load_file(weights))",
    ]


def needs_entrecipes(run: dict[str, Any]) -> bool:
    """Whether the pipeline's class or its model's is one of ours, not of diffusers, and its source is not beside it."""
    pipeline = run["pipeline"]
    return (pipeline.get("library") == "entrecipes" or pipeline.get("own_model", False)) and not samples_clips(run)


def samples_clips(run: dict[str, Any]) -> bool:
    """Whether the pipeline makes videos, with a class of ours whose source it brings along."""
    return run["pipeline"]["class"] == "PoseVideoPipeline"


def _card_data(folder: RunFolder, metrics: list[Metric]) -> ModelCardData:
    run, recipe = folder.run, folder.recipe
    data = recipe["data"]
    makes_images = routes(run) or run["pipeline"].get("library") != "entrecipes"
    task = CLIPS_TASK if samples_clips(run) else TASK if makes_images else OTHER_TASK
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
        tags=["entrecipes", "diffusion", run["pipeline"]["class"], *(["lora"] if run.get("adapter") else [])],
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
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _shown(path: Path) -> str:
    """The path relative to the working directory where it lies inside it."""
    path, here = path.resolve(), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
