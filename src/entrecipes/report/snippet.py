"""The Python on a card that loads what was published, and samples with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entrecipes.report.experts_loading import at, routes
from entrecipes.report.stickers import KIND

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Diffusers' own name for the weights of an adapter."""
SIDE_ADAPTERS = {"simda": "A SimDA adapter", "i2v_adapter": "An I2V-Adapter"}
"""Those that diffusers' AutoModel loads with the source beside them, and what the card calls them."""


def snippet(run: dict[str, Any], folder_or_repo: str | Path, revision: str | None = None) -> str:
    """Python that loads the pipeline with diffusers and torch alone and writes `samples.png`.

    A pipeline of our own needs entrecipes too, and prints sequences. Those of clips and stickers bring their source
    along, and write `samples.gif` from the poses (or the caption) beside it, and the picture there or, where it could
    show a real person, the user's.

    Args:
        run: The facts of `run.json`.
        folder_or_repo: The pipeline folder or Hub id.
        revision: Branch, tag or commit of the Hub id; None: main.
    """
    pipeline, adapter = run["pipeline"], run.get("adapter")
    place = folder_or_repo.as_posix() if isinstance(folder_or_repo, Path) else folder_or_repo
    count = min(pipeline.get("num_classes") or 10, 10)
    on_hub = isinstance(folder_or_repo, str) and not Path(place).is_dir()
    named, target, source = [], f'"{place}"', ""
    if brings_source(run):
        example = (
            f"https://huggingface.co/{place}/resolve/{revision or 'main'}/example" if on_hub else f"{place}/example"
        )
        named, target = _named(run, place, example), "folder"
        source = f", custom_pipeline=folder, trust_remote_code=True{at(revision, 'custom_revision')}"
        loader, result = "DiffusionPipeline", "frames"
        beside = adapter and adapter["type"] in SIDE_ADAPTERS
        imports = [f"from diffusers import {'AutoModel, ' if beside else ''}{loader}"]
        if samples_stickers(run):
            last = 'pipeline.save_animation(frames[0], "samples.gif")'
            imports += ["from diffusers.utils import load_image"] if run[KIND]["example"]["frame"] else []
        else:
            last = 'export_to_gif(frames[0], "samples.gif")'
            imports += ["from diffusers.utils import export_to_gif, load_image, load_video"]
    elif pipeline.get("library") == "entrecipes" and not routes(run):
        imports = [f"from entrecipes import {pipeline['class']}"]
        loader, result, last = pipeline["class"], "sequences", 'print(*sequences, sep="\\n")'
    else:
        loader, library = (pipeline["class"], "entrecipes") if routes(run) else ("DiffusionPipeline", "diffusers")
        imports = sorted([f"from {library} import {loader}", "from diffusers.utils import make_image_grid"])
        if pipeline.get("own_model") and not routes(run):
            imports.append("import entrecipes  # the model's class")
        imports += [f"import {name}  # its classes" for name in run.get("plugins", ())]
        resize = ", resize=64" if pipeline["sample_size"] < 64 else ""
        result = "images"
        last = f'make_image_grid(images, rows=1, cols={count}{resize}).save("samples.png")'
    loading = [f"pipeline = {loader}.from_pretrained({target}{at(revision)}{source})"]
    if adapter:
        if samples_stickers(run):  # there the base brings the source along
            source = f', custom_pipeline="{_base(adapter)}", trust_remote_code=True'
        more, loading = adapter_lines(adapter, loader, place, source, on_hub, revision)
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


def _named(run: dict[str, Any], place: str, example: str) -> list[str]:
    """What the snippet of a pipeline that brings its source along names first."""
    lines, drawn = [f'folder = "{place}"', f'example = "{example}"'], run["data"].get("rendered")
    if samples_clips(run):
        return lines if drawn else [*lines, 'person = "person.png"  # your picture of the person who is to move']
    lines = [] if run.get("adapter") else lines[:1]
    if run[KIND]["example"]["frame"]:
        lines.append(f'picture = "{example}/frame.png"' if drawn else 'picture = "frame.png"  # yours, the first frame')
    return lines


def _arguments(run: dict[str, Any], count: int) -> list[str]:
    """What the pipeline is called with to get `count` samples."""
    pipeline = run["pipeline"]
    labels = [f"class_labels={list(range(count))}"] if pipeline.get("num_classes") else []
    if samples_clips(run):
        reference = 'f"{example}/reference.png"' if run["data"].get("rendered") else "person"
        asked = [f"load_image({reference})", 'load_video(f"{example}/poses.gif")']
    elif samples_stickers(run):
        asked, about = [], run[KIND]
        if about["example"]["caption"] is not None:
            asked.append(f"prompt={json.dumps(about['example']['caption'], ensure_ascii=False)}")
        asked += ["frames={0: load_image(picture)}"] if about["example"]["frame"] else []
        asked += [f"num_frames={about['frames']}"]
        scales = {"guidance_scale": pipeline["guidance_scale"], "frame_guidance_scale": about["frame_guidance_scale"]}
        asked += [f"{name}={scale}" for name, scale in scales.items() if scale != 1]
    elif pipeline["class"] == "DiTPipeline":
        asked = [*labels, f"guidance_scale={pipeline['guidance_scale']}"]
    else:
        asked = [f"batch_size={count}", *labels]
        if routes(run) and pipeline["guidance_scale"] != 1:
            asked += [f"guidance_scale={pipeline['guidance_scale']}"]
    return [*asked, f"num_inference_steps={pipeline['steps']}", "generator=torch.Generator().manual_seed(0)"]


def adapter_lines(
    adapter: dict[str, Any],
    loader: str,
    place: str,
    options: str = "",
    on_hub: bool = False,
    revision: str | None = None,
) -> tuple[list[str], list[str]]:
    """Imports and lines that load the base with `loader`, and on it the adapter in a folder or Hub id, `place`."""
    lines = [f'pipeline = {loader}.from_pretrained("{_base(adapter)}"{at(adapter["revision"])}{options})']
    model, where = f"pipeline.{adapter['component']}", f'"{place}"{at(revision)}'
    if adapter["type"] in SIDE_ADAPTERS:
        return [], [*lines, f"AutoModel.from_pretrained({where}, trust_remote_code=True).attach({model})"]
    if adapter["loads_itself"]:
        return [], [*lines, f'{model}.load_lora_adapter({where}, prefix=None, weight_name="{LORA_FILE}")']
    imports = [
        "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
        "from safetensors import safe_open",
        "from safetensors.torch import load_file",
        *["from huggingface_hub import hf_hub_download"] * on_hub,
    ]
    weights = f'hf_hub_download("{place}", "{LORA_FILE}"{at(revision)})' if on_hub else f'"{place}/{LORA_FILE}"'
    return imports, [
        *lines,
        f"weights = {weights}",
        'with safe_open(weights, "pt") as file:',
        '    config = LoraConfig(**json.loads(file.metadata()["lora_adapter_metadata"]))',
        f"inject_adapter_in_model(config, {model})",
        f"set_peft_model_state_dict({model}, load_file(weights))",
    ]


def _base(adapter: dict[str, Any]) -> str:
    """The pipeline that an adapter belongs to, as the card's reader names it."""
    base = Path(adapter["base"])
    if not base.is_dir():
        return adapter["base"]
    return as_seen(base / "pipeline" if (base / "pipeline").is_dir() else base)


def needed(run: dict[str, Any]) -> str:
    """What must be installed for the snippet."""
    if needs_entrecipes(run):
        return "Besides diffusers and torch, entrecipes is needed."
    adapter, texts = run.get("adapter"), (run.get(KIND) or {}).get("text")
    more = ["peft"] * bool(adapter and adapter["type"] not in SIDE_ADAPTERS) + ["transformers"] * bool(texts)
    return f"Only {', '.join(['diffusers', *more])} and torch are needed."


def needs_entrecipes(run: dict[str, Any]) -> bool:
    """Whether the pipeline's class or its model's is one of ours, not of diffusers, and its source is not beside it."""
    pipeline = run["pipeline"]
    return (pipeline.get("library") == "entrecipes" or pipeline.get("own_model", False)) and not brings_source(run)


def brings_source(run: dict[str, Any]) -> bool:
    """Whether the pipeline makes videos, with a class of ours whose source it brings along."""
    return samples_clips(run) or samples_stickers(run)


def samples_clips(run: dict[str, Any]) -> bool:
    """Whether it makes videos from poses."""
    return run["pipeline"]["class"] == "PoseVideoPipeline"


def samples_stickers(run: dict[str, Any]) -> bool:
    """Whether it makes videos from texts and given frames."""
    return run["pipeline"]["class"] == "StickerPipeline"


def as_seen(path: Path) -> str:
    """The path relative to the working directory where it lies inside it."""
    path, here = path.resolve(), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
