"""The end of a run: an ordinary diffusers pipeline, its numbers, its card and its report, all on disk."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import platform
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from entrecipes.diffusion.adapter_folder import FOLDER
from entrecipes.diffusion.quantised import size
from entrecipes.diffusion.space import clip_parts
from entrecipes.errors import UserError
from entrecipes.evaluation.drawing import draw
from entrecipes.recipe.masks import follows_text, given_at
from entrecipes.reference import split
from entrecipes.report.card import write_card
from entrecipes.report.plots import save_grid, save_moving
from entrecipes.report.report import write_report
from entrecipes.training.run import Run
from entrecipes.training.tracking import peak_memory_gib
from entrecipes.training.weights import evaluated

VERSIONS = ("entrecipes", "torch", "diffusers", "accelerate", "transformers", "datasets", "torchmetrics", "numpy")


def publish(run: Run, name: str, **more: Any) -> None:
    """Write `pipeline/`, `samples/final.png`, `run.json`, the card and the report into the run folder.

    Where an adapter was trained beside a base, and is not to be merged, `adapter/` stands in place of `pipeline/`.
    A noise sampler that learned something leaves it beside the pipeline and inside its folder.

    Args:
        run: A run that has seen all its images.
        name: The recipe's name.
        more: Further facts for `run.json`.
    """
    peak = run.accelerator.gather(torch.tensor([peak_memory_gib(run.device)], device=run.device)).max().item()
    with evaluated(run) as model:
        if run.accelerator.is_main_process:
            save_pipeline(run, model, run.folder)
    if run.accelerator.is_main_process:
        run.noise.publish(run.folder, run.components.scheduler)
        run.pruner.publish(run.folder)
        for path in run.grid_path.parent.glob(f"{run.grid_path.stem}.*"):
            shutil.copyfile(path, path.with_stem("final"))
        (run.folder / "run.json").write_text(json.dumps(facts(run, name, peak) | more, indent=1))
        write_card(run.folder)
        write_report(run.folder)
    run.accelerator.wait_for_everyone()


def save_pipeline(run: Run, model: nn.Module, folder: Path) -> None:
    """Save the evaluated weights, as a stock pipeline or as an adapter; what was there goes only for a whole one."""
    pipeline, adapter = folder / "pipeline", folder / FOLDER
    target, other = (adapter, pipeline) if run.adapter.published_alone else (pipeline, adapter)
    partial = target.with_name(f".writing-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if run.adapter.published_alone:
            section = run.recipe.pipeline
            run.adapter.publish(model, partial, section.pretrained, section.revision, target)
            if run.components.family.kind == "clips":  # a pipeline brings its source along, an adapter does not
                shutil.copyfile(inspect.getfile(run.components.family.pipeline_class), partial / "pipeline.py")
        else:
            run.components.pipeline(run.adapter.merged(model)).save_pretrained(partial)
        if run.components.family.kind in ("clips", "stickers"):
            leave_example(run, partial)
        run.noise.publish(partial, run.components.scheduler)
        run.pruner.publish(partial)
    except SafetensorError as error:  # a full disk, told by the library in its own way
        raise UserError(f"{partial}: {error}; the checkpoints are whole: free some space and run again") from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    shutil.rmtree(other, ignore_errors=True)


def leave_example(run: Run, folder: Path) -> None:
    """What the card's snippet needs, pictures only where nobody real can be on them.

    Of clips, `example/poses.gif` and the person, `reference.png`; of stickers, the first frame, `frame.png`.
    """
    if run.components.family.kind == "stickers":
        if run.data.images.train.rendered:
            clip, _ = example(run)
            save_grid(clip[None, :, 0], folder / "example" / "frame.png", columns=1, scale=1, gap=0)
        return
    clips, _ = run.evaluator.clips(1)
    _, poses, reference = clip_parts(clips)
    save_moving(poses[0].transpose(0, 1), folder / "example" / "poses.gif", scale=1)
    if run.data.images.train.rendered:
        save_grid(reference, folder / "example" / "reference.png", columns=1, scale=1, gap=0)


def example(run: Run) -> tuple[Tensor, str]:
    """The first sticker uint8 [3, F, H, W] that the evaluation draws, a held-out one if there is any, and its text."""
    images = run.data.images.held_out or run.data.images.train
    drawn, (index,) = draw(images, 1, run.recipe.evaluation.seed)
    return drawn[0], images.captions[index]


def facts(run: Run, name: str, peak_gib: float) -> dict[str, Any]:
    """Everything that the card and the report say about the run, as JSON."""
    recipe, components, train = run.recipe, run.components, run.data.images.train
    pipeline_class = type(components.pipeline())  # of several experts another than the family's
    rates = [row["images_per_second"] for row in run.log.rows("train") if row["images_per_second"]]
    return {
        "name": name,
        "description": recipe.description,
        "license": recipe.license,
        "plugins": list(recipe.plugins),
        "images": run.images,
        "batch_size": recipe.training.batch_size,
        "seed": recipe.training.seed,
        "world_size": run.world_size,
        "device": device_name(run.device),
        "precision": recipe.training.precision,
        "parameters": sum(size(p) for p in run.model.parameters()),
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        **run.pruner.facts(),
        "adapter": adapter_facts(run) if run.adapter.published_alone else None,
        "seconds_training": run.window.total_seconds,
        "images_per_second": statistics.median(rates) if rates else None,
        "peak_memory_gib": peak_gib,
        "data": {
            "name": train.name,
            "source": train.source,
            "license": train.license,
            "train_images": len(train),
            "held_out_images": len(run.data.images.held_out or ()),
            "label_names": list(train.label_names or ()) if run.data.num_classes else [],
            "bad_images": train.bad_images,
            "rendered": getattr(train, "rendered", False),
        },
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "pipeline": {
            "class": pipeline_class.__name__,
            "library": pipeline_class.__module__.split(".")[0],
            "model_class": components.family.model_class,
            "own_model": type(run.model).__module__ == "entrecipes",
            "scheduler_class": type(components.scheduler).__name__,
            "prediction_type": components.path.prediction_type,
            "num_classes": run.data.num_classes,
            "sample_size": run.data.sample_shape[-1],
            "channels": components.channels,
            "steps": recipe.evaluation.steps,
            "guidance_scale": recipe.evaluation.guidance_scale,
            "latent": run.space.latent,
            "kind": components.family.kind,
        },
        "stickers": sticker_facts(run) if components.family.kind == "stickers" else None,
        "metrics": final_metrics(run),
    }


def sticker_facts(run: Run) -> dict[str, Any]:
    """What the card says of clips, texts and tasks, and what its snippet asks for."""
    train, text, tasks = run.data.images.train, run.components.text, run.masks.tasks
    moving, frames = int((train.lengths > 1).sum()), train.shape[1]
    return {
        "clips": moving,
        "stills": len(train) - moving,
        "frames": frames,
        "text": text and {"id": text.id, "tokens": list(text.tokens), "channels": text.channels},
        "frame_guidance_scale": run.recipe.evaluation.frame_guidance_scale,
        "example": {
            "caption": example(run)[1] if text and any(map(follows_text, tasks)) else None,
            "frame": any(given_at(task, frames)[0] for task in tasks),
        },
    }


def adapter_facts(run: Run) -> dict[str, Any]:
    """What the adapter's card says of how to load it."""
    base, revision = split(run.recipe.pipeline.pretrained, run.recipe.pipeline.revision)
    return {
        "type": run.recipe.blocks.adapter.type,
        "base": base,
        "revision": revision,
        "component": run.components.family.component,
        "loads_itself": isinstance(run.components.model, PeftAdapterMixin),
        "quantise": getattr(run.recipe.blocks.adapter, "quantise", None),
    }


def final_metrics(run: Run) -> list[dict[str, Any]]:
    """Every metric of the final weights, each with its origin."""
    metrics = {row["name"]: row for row in run.log.rows("metric") if row["images"] == run.images}
    return [{key: value for key, value in row.items() if key not in ("kind", "images")} for row in metrics.values()]


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name, with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} thread(s)"
