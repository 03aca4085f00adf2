"""From a recipe's `data:` section to what a given model trains on: images, sequences, or latents cached for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from entrecipes.data.images import ImageSet, Splits
from entrecipes.data.latents import cache_latents
from entrecipes.data.stream import IterableImageSet
from entrecipes.data.text import TextEncoders, embed
from entrecipes.diffusion.pipelines import Components
from entrecipes.diffusion.space import Space
from entrecipes.diffusion.visiting import visiting
from entrecipes.errors import UserError
from entrecipes.recipe.base import build
from entrecipes.recipe.data import Data, ImageData, StickerKeys, VideoData, WindowData

logger = logging.getLogger(__name__)

LATENT_BATCH = {"images": 16, "clips": 1, "stickers": 2}


@dataclass(frozen=True)
class OpenedData:
    """The data of a run."""

    train: ImageSet
    """What the loop draws from: uint8 images or symbols, or latent moments."""
    held_out: ImageSet | None
    """The part kept from training, of the same kind."""
    space: Space
    """How either becomes x0."""
    images: Splits
    """The images themselves (or the sequences), for sample-based metrics."""
    num_classes: int | None
    """Classes that images are asked for by; None for an unconditional model."""
    sample_shape: tuple[int, ...]
    """The shape of one sample as the set holds it; of a clip without its condition."""


def open_images(section: Data, components: Components) -> Splits:
    """The data set itself, in the size and the channels that the model takes.

    Raises:
        UserError: When it holds something else than the model denoises, in another size, or is bad.
    """
    if section.kind != components.family.kind:
        raise UserError(
            f"data.type: {section.type} holds {section.kind}, but a {components.family.model_class} denoises "
            f"{components.family.kind}; take other data or another model"
        )
    return OPENERS[section.kind](section, components)


def open_data(section: Data, components: Components, device: torch.device, *, thorough: bool = False) -> OpenedData:
    """Open the data set, and encode what the model takes encoded unless that was done before.

    Args:
        thorough: Look for damage in caches by their content, not only by their length.

    Raises:
        UserError: When data and model do not fit (labels, number of classes, channels, size), the data is bad, or the
            disk is full.
    """
    num_classes = components.family.num_classes(components.model)
    images = open_images(section, components)
    if num_classes is None:
        parts = (part and replace(part, labels=None) for part in (images.train, images.held_out))
        images = Splits(*parts)
        found = None
    elif images.train.labels is None:
        raise UserError(f"data: the model is class-conditional, but {images.train.name} has no labels")
    else:
        found = len(images.train.label_names or ()) or int(images.train.labels.max()) + 1
        if found > num_classes:
            raise UserError(f"data: {images.train.name} has {found} classes, but the model is built for {num_classes}")
    if components.text:
        images = Splits(
            *(part and _with_text(part, components.text, device, thorough) for part in (images.train, images.held_out))
        )
    if components.vae is None:
        space = components.family.space(components.model)
        return OpenedData(images.train, images.held_out, space, images, found, _sample_shape(images, components))
    if isinstance(images.train, IterableImageSet):
        raise UserError("data.streaming: latents of a stream can't be cached; set data.streaming: false")
    with visiting(device, components.vae):
        train, held_out = (
            part
            and cache_latents(
                part,
                components.vae,
                vae_id=components.vae_id,
                dtype=torch.float32,
                batch_size=LATENT_BATCH[section.kind],
                device=device,
                flip=flip,
                on_device=getattr(section, "on_device", "auto"),
                thorough=thorough,
            )
            for part, flip in ((images.train, getattr(section, "horizontal_flip", False)), (images.held_out, False))
        )
        space = components.family.latent_space(components.vae)  # its scale stays on the device
    return OpenedData(train, held_out, space, images, found, _sample_shape(images, components))


def _with_text(part: ImageSet, encoders: TextEncoders, device: torch.device, thorough: bool) -> ImageSet:
    about = {"name": part.name, "source": part.source, "license": part.license}
    return replace(part, text=embed(part.captions, encoders, device, about=about, lazy=True, thorough=thorough))


def _open_images(section: ImageData, components: Components) -> Splits:
    image_size, channels = section.image_size or components.image_size, section.channels or components.channels
    if (image_size, channels) != (components.image_size, components.channels):
        raise UserError(
            f"data: images of {image_size} px and {channels} channel(s), but the model takes {components.image_size} px"
            f" and {components.channels}; leave out data.image_size and data.channels, or change the model's config"
        )
    images: Splits = build("data", section, image_size=image_size, channels=channels)
    if bad := images.train.bad_images:
        logger.warning("%d unreadable images are left out: %s", len(bad), ", ".join(bad))
    if section.binarize:
        if isinstance(images.train, IterableImageSet):
            raise UserError("data.binarize: not for a stream; set data.streaming: false")
        images = Splits(*(part and part.binarized() for part in (images.train, images.held_out)))
    return images


def _open_sequences(section: WindowData, components: Components) -> Splits:
    size = components.model.config.sample_size
    if section.length not in (None, size):
        raise UserError(
            f"data.length: {section.length} symbols, but the model takes {size}; leave out data.length, or change "
            "sample_size in the model's config"
        )
    return build("data", section, length=size, alphabet=components.model.config.alphabet)


def _open_clips(section: VideoData, components: Components) -> Splits:
    channels, time, space = components.family.channels(components.model), 1, 1
    if components.vae is not None:
        config = components.vae.config
        time, space = config.scale_factor_temporal, config.scale_factor_spatial
    elif channels != 3:
        raise UserError(
            f"pipeline.build.model.config.out_channels: {channels}, but clips have 3 channels without a VAE; set 3"
        )
    if (section.frames - 1) % time:
        few = max(section.frames // time, 1) * time + 1
        raise UserError(
            f"data.frames: {section.frames}, but the VAE makes one latent frame of the first frame and of each {time} "
            f"after it; take {few} or {few + time}"
        )
    sides = components.model.config.patch_size
    if section.image_size % (space * sides[1]) or section.image_size % (space * sides[2]):
        raise UserError(
            f"data.image_size: {section.image_size}, but the model takes multiples of {space * max(sides[1:])} pixels"
        )
    return build("data", section)


def _open_stickers(section: StickerKeys, components: Components) -> Splits:
    if section.image_size not in (None, components.image_size):
        raise UserError(
            f"data.image_size: {section.image_size} px, but the model takes {components.image_size}; leave it out, or "
            "change sample_size in the model's config"
        )
    return build("data", section, image_size=components.image_size)


def _sample_shape(images: Splits, components: Components) -> tuple[int, ...]:
    if components.family.kind == "stickers":
        return images.train.shape
    if components.family.kind != "clips":
        return components.sample_shape
    channels, slices, *size = images.train.shape
    return channels, slices // 2, *size


OPENERS = {"images": _open_images, "sequences": _open_sequences, "clips": _open_clips, "stickers": _open_stickers}
