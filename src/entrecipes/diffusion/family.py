"""What a model family is: the one small adapter that each diffusers model class needs here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.space import LatentSpace, PixelSpace, Space
from entrecipes.errors import UserError
from entrecipes.models.experts_pipeline import ExpertsPipeline

Condition = Tensor | Asked | None
"""Class labels int64 [n], condition maps float [n, C, F, H, W], what is asked of captioned clips, or nothing."""


class Family(ABC):
    """How one diffusers model class is called, sampled and published."""

    model_class: ClassVar[str]
    component: ClassVar[str]
    """Name of the denoiser in the pipeline (`unet`, `transformer`)."""
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    guidance: ClassVar[bool]
    """Whether the stock pipeline offers classifier-free guidance."""
    kind: ClassVar[str] = "images"
    """What the model denoises: `images`, `sequences` of symbols, `clips` with poses, or `stickers` (with texts)."""
    vae_class: ClassVar[type[ModelMixin]] = AutoencoderKL
    """What compresses for it, where it takes a VAE."""
    output_type: ClassVar[str] = "pt"
    """What the pipeline is asked to return."""
    bases: ClassVar[tuple[str, ...]] = ()
    """Other pipelines, by class name, whose parts the family's own pipeline can be made of."""
    own_class: ClassVar[type[ModelMixin] | None] = None
    """The model class itself, where it is neither of diffusers nor of entrecipes."""

    @abstractmethod
    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Call the model (or a wrapper of it): `sample` [n, C, ...], `timestep` [n] -> [n, C, ...]."""

    @abstractmethod
    def num_classes(self, model: ModelMixin) -> int | None:
        """Classes that the model is conditioned on; None: unconditional."""

    @abstractmethod
    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        """What the stock pipeline is called with to get these images, beside what all pipelines take."""

    @torch.no_grad()
    def one_pass(self, model: ModelMixin) -> Tensor:
        """A forward pass of one sample of zeros, wherever the model is, for counting operations (images only)."""
        device, size = next(model.parameters()).device, model.config.sample_size
        label = None if self.num_classes(model) is None else torch.zeros(1, dtype=torch.long, device=device)
        sample = torch.zeros(1, self.channels(model), size, size, device=device)
        return self.predict(model, sample, torch.zeros(1, device=device), label)

    def generate(
        self,
        pipeline: DiffusionPipeline,
        condition: Any,
        num_images: int,
        steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        **options: Any,
    ) -> Tensor:
        """Sample with the family's pipeline: uint8 [num_images, ...], as a data set holds them."""
        asked = self.asked_for(condition, num_images, guidance_scale) | options
        output = pipeline(**asked, num_inference_steps=steps, generator=generator, output_type=self.output_type)
        return self.as_held(output)

    def as_held(self, output: Any) -> Tensor:
        """What the pipeline returns as a data set holds it: uint8 [num_images, ...]."""
        return as_pixels(output.images)

    def denoiser(self, pipeline: DiffusionPipeline) -> ModelMixin:
        """The model in a pipeline of the family, or in one of its experts."""
        return getattr(pipeline, "denoiser", None) or getattr(pipeline, self.component)

    def around(self, model: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None) -> DiffusionPipeline:
        """The pipeline that publishes `model`: the stock one, or of experts that of experts."""
        pipeline = self.assemble(model, scheduler, vae)
        if not hasattr(model, "experts"):
            return pipeline
        return ExpertsPipeline(denoiser=model, scheduler=scheduler, vae=getattr(pipeline, "vae", None))

    def assemble(self, model: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None) -> DiffusionPipeline:
        """The stock pipeline around `model`."""
        return self.pipeline_class(**{self.component: model, "scheduler": scheduler})

    def channels(self, model: ModelMixin) -> int:
        """Channels that the model denoises."""
        return model.config.in_channels

    def sample_shape(self, channels: int, size: int) -> tuple[int, ...]:
        """The shape of one sample as a data set holds it."""
        return channels, size, size

    def space(self, model: ModelMixin) -> Space:
        """Where the model diffuses when it has no VAE."""
        return PixelSpace()

    def latent_space(self, vae: ModelMixin) -> Space:
        """Where the model diffuses behind a VAE."""
        return LatentSpace(vae)

    def null_label(self, model: ModelMixin) -> int | None:
        """What stands for "no condition" in guidance: a label, or a value of the condition maps; None where the
        pipeline has no guidance."""
        return None

    def blind_layer(self, model: ModelMixin) -> str | None:
        """The layer whose weights for the condition are all zero yet, so that it must be trained; None: none is."""
        return None

    def prepare_for_training(self, model: ModelMixin, from_scratch: bool) -> None:  # noqa: B027 (optional)
        """Adjust a fresh or loaded model to our trainer; nothing by default."""

    def check_text(self, model: ModelMixin, text: Any) -> None:
        """Refuse text encoders (`TextEncoders` or None) that the model can't follow (here: any). Raises `UserError`."""
        if text is not None:
            raise UserError(f"pipeline.build.text: {self.model_class} follows no text; leave it out")

    def check_vae(self, model: ModelMixin, vae: ModelMixin | None) -> None:
        """Refuse a VAE that the stock pipeline can't carry (here: any). Raises `UserError`."""
        if vae is not None:
            raise UserError(
                f"pipeline.build.vae: {self.pipeline_class.__name__} has no VAE; leave it out, or take a DiT"
            )

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Refuse a scheduler that the stock pipeline can't sample with, before any training.

        Raises:
            UserError: Naming the scheduler, what it lacks and one that fits.
        """
        if not hasattr(scheduler, "scale_model_input"):
            raise UserError(
                f"{type(scheduler).__name__} can't sample in {self.pipeline_class.__name__}, the stock pipeline of "
                f"{self.model_class} (it has no scale_model_input). For flow matching take DPMSolverMultistepScheduler "
                "with prediction_type: flow_prediction and use_flow_sigmas: true."
            )


def as_pixels(images: Tensor) -> Tensor:
    """Values in [0, 1], cut off beyond, as uint8."""
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)
