"""Model families: the one small adapter that each diffusers model class needs to be trained, sampled and published.

A family knows how its model is called, what its null label is, which stock pipeline carries it, and what that pipeline
asks of a scheduler. Adding a model class is one subclass of [`Family`]: here, or with [`register_family`] in a plugin.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import (
    AutoencoderKLWan,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    DiTPipeline,
    ModelMixin,
    SchedulerMixin,
)
from torch import Tensor

from entrecipes.diffusion.family import Family, as_pixels
from entrecipes.diffusion.pixel_vae import build_pixel_vae
from entrecipes.diffusion.space import ClipSpace, LatentClipSpace, Space, SymbolSpace
from entrecipes.diffusion.stickers import DFGN
from entrecipes.errors import UserError
from entrecipes.models.pose_video import PoseVideoPipeline
from entrecipes.models.sequence import SequencePipeline
from entrecipes.recipe.pipeline import KIND_OF_MODEL


class UNet2D(Family):
    """`UNet2DModel` in pixel space, published as `ConsistencyModelPipeline`, which passes class labels."""

    model_class = "UNet2DModel"
    component = "unet"
    pipeline_class = ConsistencyModelPipeline
    guidance = False

    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return model(sample, timestep, class_labels=condition, return_dict=False)[0]

    def num_classes(self, model: ModelMixin) -> int | None:
        return model.config.num_class_embeds

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        super().check_scheduler(scheduler)
        if "generator" not in inspect.signature(scheduler.step).parameters:
            raise UserError(
                f"{type(scheduler).__name__}.step takes no generator, which {self.pipeline_class.__name__} passes; "
                "take DDIMScheduler, EDMEulerScheduler or DPMSolverMultistepScheduler."
            )

    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        return {"batch_size": num_images, "class_labels": condition}


class DiT(Family):
    """`DiTTransformer2DModel`, published as `DiTPipeline`: class-conditional, on latents or (pixel VAE) pixels."""

    model_class = "DiTTransformer2DModel"
    component = "transformer"
    pipeline_class = DiTPipeline
    guidance = True

    NULL_LABEL = 1000
    """DiTPipeline hard-codes it, so small class sets need `num_embeds_ada_norm: 1000` too."""

    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        prediction = model(sample, timestep=timestep, class_labels=condition, return_dict=False)[0]
        return prediction[:, : sample.shape[1]]  # published checkpoints append a learned variance

    def num_classes(self, model: ModelMixin) -> int | None:
        return model.config.num_embeds_ada_norm

    def null_label(self, model: ModelMixin) -> int | None:
        if model.config.num_embeds_ada_norm != self.NULL_LABEL:
            raise UserError(
                "pipeline.build.model.config.num_embeds_ada_norm: DiTPipeline hard-codes 1000 as the label of "
                f"guidance's unconditional half; set 1000, not {model.config.num_embeds_ada_norm}"
            )
        return self.NULL_LABEL

    def prepare_for_training(self, model: ModelMixin, from_scratch: bool) -> None:
        for module in model.modules():
            # Every block drops labels on its own in train mode, so that a sample is hardly ever unconditional in all of
            # them: labels are dropped once per sample, outside.
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0
        if from_scratch:  # adaLN-Zero (Peebles & Xie 2023, section 3.2), which diffusers leaves out
            for layer in [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_2]:
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        super().check_scheduler(scheduler)
        if abs(float(scheduler.init_noise_sigma) - 1) > 1e-3:
            raise UserError(
                f"{type(scheduler).__name__} starts from noise of deviation {float(scheduler.init_noise_sigma):.3g}, "
                "but DiTPipeline always starts from 1; take a VP scheduler such as DDIMScheduler, or "
                "DPMSolverMultistepScheduler with use_flow_sigmas: true."
            )

    def check_vae(self, model: ModelMixin, vae: ModelMixin | None) -> None:
        if vae is not None and vae.config.latent_channels != model.config.in_channels:
            raise UserError(
                f"pipeline.build.model.config.in_channels: {model.config.in_channels}, but the VAE's latents have "
                f"{vae.config.latent_channels} channels"
            )
        if vae is not None and vae.config.shift_factor:
            raise UserError("pipeline.build.vae: DiTPipeline decodes without the VAE's shift_factor; take another VAE")

    def assemble(self, model: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None) -> DiffusionPipeline:
        vae = vae or build_pixel_vae(model.config.in_channels, model.config.sample_size)
        return self.pipeline_class(transformer=model, scheduler=scheduler, vae=vae)

    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        return {"class_labels": condition, "guidance_scale": guidance_scale}


class SequenceTransformer1D(Family):
    """`SequenceTransformer1DModel` on one-hot symbols, published as our own `SequencePipeline`."""

    model_class = "SequenceTransformer1DModel"
    component = "transformer"
    pipeline_class = SequencePipeline
    guidance = False
    kind = "sequences"
    output_type = "ids"

    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return model(sample, timestep, class_labels=condition, return_dict=False)[0]

    def num_classes(self, model: ModelMixin) -> int | None:
        return model.config.num_class_embeds

    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        return {"batch_size": num_images, "class_labels": condition}

    def as_held(self, output: Any) -> Tensor:
        """Symbol ids uint8 [num_images, L]."""
        return output.sequences

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Our own pipeline samples with all."""

    def channels(self, model: ModelMixin) -> int:
        return len(model.config.alphabet)

    def sample_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return (size,)

    def space(self, model: ModelMixin) -> Space:
        return SymbolSpace(model.config.alphabet)


class WanVideo(Family):
    """`WanTransformer3DModel` with the condition concatenated by channel, published as our own `PoseVideoPipeline`."""

    model_class = "WanTransformer3DModel"
    component = "transformer"
    pipeline_class = PoseVideoPipeline
    guidance = True
    kind = "clips"
    vae_class = AutoencoderKLWan
    bases = ("WanPipeline",)

    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        """`sample` [n, C, F, H, W] and the condition [n, 2C, F, H, W] -> [n, C, F, H, W]; the prompt is empty."""
        text = sample.new_zeros(len(sample), 1, extract_model_from_parallel(model).config.text_dim)
        return model(torch.cat([sample, condition.to(sample)], dim=1), timestep, text, return_dict=False)[0]

    def num_classes(self, model: ModelMixin) -> int | None:
        return None

    def null_label(self, model: ModelMixin) -> int | None:
        return 0

    def blind_layer(self, model: ModelMixin) -> str | None:
        weights = model.patch_embedding.weight[:, model.config.out_channels :]
        return None if weights.any() else "patch_embedding"

    def channels(self, model: ModelMixin) -> int:
        return model.config.out_channels

    def space(self, model: ModelMixin) -> Space:
        return ClipSpace()

    def latent_space(self, vae: ModelMixin) -> Space:
        return LatentClipSpace(vae)

    def assemble(self, model: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None) -> DiffusionPipeline:
        return self.pipeline_class(transformer=model, scheduler=scheduler, vae=vae)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Our own pipeline samples with all."""

    def check_vae(self, model: ModelMixin, vae: ModelMixin | None) -> None:
        config = model.config
        if config.in_channels != 3 * config.out_channels:
            raise UserError(
                f"pipeline.build.model.config.in_channels: {config.in_channels}, but the clip, its pose maps and the "
                f"reference are concatenated: set {3 * config.out_channels}, three times out_channels"
            )
        if vae is not None and vae.config.z_dim != config.out_channels:
            raise UserError(
                f"pipeline.build.model.config.out_channels: {config.out_channels}, but the VAE's latents have "
                f"{vae.config.z_dim} channels"
            )

    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        return {"condition": torch.stack(list(condition)), "guidance_scale": guidance_scale}

    def as_held(self, output: Any) -> Tensor:
        """Clips uint8 [num_images, 3, F, H, W]."""
        return as_pixels(output.frames.transpose(1, 2))


FAMILIES: dict[str, Family] = {
    family.model_class: family for family in (UNet2D(), DiT(), SequenceTransformer1D(), WanVideo(), DFGN())
}


def register_family(family: type[Family]) -> type[Family]:
    """Add the decorated family, so that recipes can name its `model_class`.

    Raises:
        ValueError: At import, when that class has a family already.
    """
    if family.model_class in FAMILIES:
        raise ValueError(f"{family.model_class} has a family already: {type(FAMILIES[family.model_class]).__name__}")
    FAMILIES[family.model_class] = family()
    KIND_OF_MODEL[family.model_class] = family.kind
    return family


def family_of(model_class: str) -> Family:
    """The family of a diffusers model class name.

    Raises:
        UserError: For a class without an adapter.
    """
    try:
        return FAMILIES[model_class]
    except KeyError:
        raise UserError(f"no recipe trains a {model_class} yet; supported: {', '.join(FAMILIES)}") from None


def family_of_pipeline(pipeline: DiffusionPipeline) -> Family:
    """The family whose model a loaded pipeline carries. Raises UserError."""
    for name in ("denoiser", *dict.fromkeys(family.component for family in FAMILIES.values())):
        if family := _family_of_model(getattr(pipeline, name, None)):
            return family
    raise UserError(
        f"{type(pipeline).__name__} carries no model that can be trained here; supported: {', '.join(FAMILIES)}"
    )


def _family_of_model(model: ModelMixin | None) -> Family | None:
    """The family of a model, of the class that it narrows, or of the experts that it routes to."""
    model = getattr(model, "experts", [model])[0]
    return next((FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), None)
