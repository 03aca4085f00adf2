"""From a recipe's `pipeline:` section to the parts that are trained, and back to an ordinary diffusers pipeline."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, ModelMixin, SchedulerMixin

import entrecipes
from entrecipes.data.text import TextEncoders
from entrecipes.diffusion import lora, side
from entrecipes.diffusion.adapter_folder import adapter_folder, read_base
from entrecipes.diffusion.download import INDEX, fetch
from entrecipes.diffusion.families import FAMILIES, Family, family_of, family_of_pipeline
from entrecipes.diffusion.path import GaussianPath
from entrecipes.diffusion.pixel_vae import is_pixel_vae
from entrecipes.diffusion.visiting import visiting
from entrecipes.errors import UserError, nearest
from entrecipes.quiet import quieten_loading
from entrecipes.recipe.load import packaged
from entrecipes.recipe.pipeline import Component, Pipeline
from entrecipes.reference import is_local, reaching, shown, split

logger = logging.getLogger(__name__)


@dataclass
class Components:
    """The parts of one pipeline in training."""

    model: ModelMixin
    scheduler: SchedulerMixin
    vae: AutoencoderKL | AutoencoderKLWan | None
    """None in pixel space (the identity VAE of a published pixel-space DiT counts as none)."""
    vae_id: str
    """Where the VAE came from, with its revision; the latent cache's key."""
    family: Family
    path: GaussianPath
    text: TextEncoders | None = None
    """What embeds the texts that the model follows."""

    def pipeline(self, model: ModelMixin | None = None) -> DiffusionPipeline:
        """The stock pipeline around these parts, with another copy of the model if given, quiet while it samples."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipeline = self.family.around(model or self.model, scheduler, self.vae)
        if self.text:
            parts = self.text.components()
            pipeline.register_to_config(text_tokens=parts.pop("text_tokens"))
            pipeline.register_modules(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def sampling(self, model: ModelMixin, device: torch.device) -> Iterator[DiffusionPipeline]:
        """The stock pipeline around a model that is on the device, to sample from texts that are embedded already: its
        VAE visits the device, text encoders stay where they are."""
        pipeline = replace(self, text=None).pipeline(model)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        with visiting(device, *(part for part in parts if part is not model)):
            yield pipeline

    @property
    def channels(self) -> int:
        """Channels of the images (not of the latents), or symbols of the alphabet."""
        return self.vae.config.in_channels if self.vae else self.family.channels(self.model)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels that the model's sample size stands for, or symbols in a sequence."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae else 1
        return self.model.config.sample_size * factor

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample as the data set holds it."""
        return self.family.sample_shape(self.channels, self.image_size)


def best_device() -> torch.device:
    """The CUDA or XPU device of this process, else the CPU (Apple's GPU lacks float64, which noise levels need)."""
    found = torch.accelerator.current_accelerator()
    return found if found is not None and found.type in ("cuda", "xpu") else torch.device("cpu")


def load_components(section: Pipeline, seed: int = 0, to_sample: bool = True) -> Components:
    """Build or load what `pipeline:` names, on the CPU.

    Args:
        section: The recipe's section.
        seed: Seed of freshly built weights, the same on every device.
        to_sample: Refuse a scheduler that the family's stock pipeline can't sample with.

    Raises:
        UserError: For an unknown class or argument, an unsupported model or scheduler, or a pipeline that can't be had.
    """
    if section.pretrained is not None:
        pipeline = load_pipeline(section.pretrained, section.revision)
        family = family_of_pipeline(pipeline)
        known = (family.component, "denoiser", "scheduler", "vae")
        if family.kind == "stickers":
            known += tuple(name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer")))
        if others := [name for name, part in pipeline.components.items() if part is not None and name not in known]:
            raise UserError(
                f"{section.pretrained}: {type(pipeline).__name__} also carries {', '.join(others)}, which is not "
                f"supported; supported are pipelines of {', '.join(FAMILIES)} with at most a VAE"
            )
        model, vae = family.denoiser(pipeline), getattr(pipeline, "vae", None)
        scheduler = getattr(pipeline.scheduler, "base", pipeline.scheduler)  # the stock one of an InfoNoiseScheduler
        vae_id = f"{section.pretrained}@{section.revision}/vae"
        text = TextEncoders.of(pipeline)
    else:
        build = section.build
        schedulers = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        _known(build.scheduler.class_name, schedulers, "pipeline.build.scheduler.class")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            family, model = build_model(build.model)
        scheduler = _instantiate(build.scheduler, "pipeline.build.scheduler")
        vae_id = f"{build.vae}@{build.vae_revision}"
        vae = load_vae(family.vae_class, build.vae, build.vae_revision) if build.vae else None
        text = TextEncoders.load(build.text) if build.text else None
    if family.kind != "clips" and not isinstance(model.config.sample_size, int):
        raise UserError(f"pipeline: {family.model_class} needs sample_size, the side of a square image or latent")
    family.check_vae(model, vae)
    family.check_text(model, text)
    if to_sample:
        family.check_scheduler(scheduler)
    family.prepare_for_training(model, from_scratch=section.pretrained is None)
    if vae is not None:
        vae = None if isinstance(vae, AutoencoderKL) and is_pixel_vae(vae) else vae.requires_grad_(False).eval()
    if vae is not None and to_sample and scheduler.config.get("clip_sample"):
        logger.warning("the scheduler's clip_sample cuts latents at 1 when it samples; set it to false in its config")
    return Components(model, scheduler, vae, vae_id, family, GaussianPath.from_scheduler(scheduler), text)


def build_model(section: Component) -> tuple[Family, ModelMixin]:
    """A fresh model of the recipe's `pipeline.build.model`, with its family.

    Raises:
        UserError: For an unknown class or argument, or a config that the class refuses.
    """
    family = family_of(_known(section.class_name, FAMILIES, "pipeline.build.model.class"))
    return family, _instantiate(section, "pipeline.build.model", family.own_class)


def load_pipeline(source: str, revision: str | None = None) -> DiffusionPipeline:
    """A pipeline from a folder (a run folder's `pipeline/` or `adapter/` is found too) or the Hub, in float32.

    For an adapter that is its base with the adapter on it, as it was trained: not merged, a quantised base quantised.

    Args:
        source: The folder, or `owner/name` or `owner/name@revision` on the Hub.
        revision: Branch, tag or commit on the Hub, unless `source` says it.

    Raises:
        UserError: When there is none, or it can't be read.
    """
    quieten_loading()
    source, revision = split(source, revision)
    with _told(DiffusionPipeline, source, revision):
        folder = Path(source) if is_local(source) else fetch(source, revision)
        if (folder / "pipeline" / INDEX).exists():
            folder /= "pipeline"
        elif adapter := adapter_folder(str(folder)):
            return _with_adapter(adapter)
        return _class_for(folder).from_pretrained(folder, dtype=torch.float32)


def _with_adapter(folder: Path) -> DiffusionPipeline:
    base = read_base(folder)
    try:
        pipeline = load_pipeline(base.found_from(folder), base.revision)
    except UserError as error:
        raise UserError(f"{folder}: the base of this adapter can't be had: {error}") from error
    load = side.load_side_adapter if side.holds_side_adapter(folder) else lora.load_adapter
    load(family_of_pipeline(pipeline).denoiser(pipeline), folder, base)
    return pipeline


def load_vae(cls: type[ModelMixin], source: str, revision: str | None) -> ModelMixin:
    """A VAE from a folder or the Hub, alone or in a pipeline, in float32.

    Raises:
        UserError: When there is none, or it can't be read.
    """
    with _told(cls, source, revision):
        if (Path(source) / "pipeline" / INDEX).exists():
            source = str(Path(source) / "pipeline")
        try:
            DiffusionPipeline.load_config(source, revision=revision)
            part = {"subfolder": "vae"}
        except OSError:
            part = {}
        return cls.from_pretrained(source, revision=revision, dtype=torch.float32, **part)


@contextmanager
def _told(cls: type, source: str, revision: str | None) -> Iterator[None]:
    """What keeps something of that class from being loaded inside becomes a UserError that says what to do next."""
    local = is_local(source)
    if local and not Path(source).is_dir():
        name = source.removeprefix("outputs/")
        first = f"run `entrecipes run {name}` first, or " if name in packaged() else ""
        if name != source and not first:
            first = "the recipe's header says what makes it; or "
        raise UserError(
            f"{source}: no such folder; {first}give a folder with a saved {cls.__name__}, or a Hub id (owner/name)"
        )
    try:
        with nullcontext() if local else reaching(source, revision):
            yield
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "check the folder" if local else "check the id, or give a folder"
        raise UserError(
            f"{shown(source, revision)}: no {cls.__name__} could be loaded ({first_line}); {advice}"
        ) from error


def _class_for(folder: Path) -> type[DiffusionPipeline]:
    """The class that loads a pipeline here; `DiffusionPipeline` knows those of diffusers only. Raises UserError."""
    index = DiffusionPipeline.load_config(folder)
    name = index.get("_class_name")
    if name == "ExpertsPipeline":
        return entrecipes.ExpertsPipeline
    for family in FAMILIES.values():
        if name in family.bases and index.get("transformer_2", [None])[0]:
            raise UserError(f"{folder}: {name} with two transformers is not supported; take one of Wan 2.1")
        if name in (*family.bases, family.pipeline_class.__name__):
            return family.pipeline_class
    return DiffusionPipeline


def _known(name: str, options: Any, key: str) -> str:
    if name not in options:
        raise UserError(f"{key}: '{name}' is not supported{nearest(name, options)}")
    return name


def _instantiate(component: Component, key: str, cls: type | None = None) -> Any:
    """Call a diffusers class, refusing arguments that it would ignore (`from_config` only warns)."""
    cls = cls or getattr(diffusers, component.class_name, None) or getattr(entrecipes, component.class_name)
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in component.config:
        if name not in known:
            raise UserError(f"{key}.config.{name}: {component.class_name} takes no such argument{nearest(name, known)}")
    try:
        return cls(**component.config)
    except (TypeError, ValueError, AssertionError, IndexError, KeyError, NotImplementedError) as error:
        raise UserError(f"{key}: {component.class_name} refuses this config: {error}") from error
