"""The family of networks of captioned clips: RDTF's DFGN, with or without an image VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

from entrecipes.diffusion.asked import Asked
from entrecipes.diffusion.family import Condition, Family, as_pixels
from entrecipes.errors import UserError
from entrecipes.models.sticker import StickerPipeline


class DFGN(Family):
    """`DFGNModel`: given frames enter by channel, the text by attention; published as our own `StickerPipeline`."""

    model_class = "DFGNModel"
    component = "unet"
    pipeline_class = StickerPipeline
    guidance = True
    kind = "stickers"

    def predict(self, model: Any, sample: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """`sample` [n, C, F, h, w] -> [n, C, F, h, w]."""
        return model(sample, timestep, condition.text, condition.frames, return_dict=False)[0]

    @torch.no_grad()
    def one_pass(self, model: ModelMixin, frames: int = 8) -> Tensor:
        """A forward pass of one clip of zeros with a text."""
        config, device = model.config, next(model.parameters()).device
        clip = torch.zeros(1, config.in_channels, frames, config.sample_size, config.sample_size, device=device)
        tokens = sum(config.text_tokens or (77,))
        width = max(config.text_channels or (config.cross_attention_dim,))
        asked = Asked(clip, clip[:, 0, :, 0, 0] > 0, torch.zeros(1, tokens, width, device=device))
        return self.predict(model, clip, torch.zeros(1, device=device), asked)

    def num_classes(self, model: ModelMixin) -> int | None:
        return None

    def asked_for(self, condition: Any, num_images: int, guidance_scale: float) -> dict[str, Any]:
        asked = Asked.stack(list(condition))
        return {
            "condition": asked.frames,
            "given": asked.given,
            "prompt_embeds": asked.text,
            "guidance_scale": guidance_scale,
        }

    def as_held(self, output: Any) -> Tensor:
        """Clips uint8 [num_images, 3, F, H, W]."""
        return as_pixels(output.frames.transpose(1, 2))

    def assemble(self, model: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None) -> DiffusionPipeline:
        return self.pipeline_class(unet=model, scheduler=scheduler, vae=vae)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Our own pipeline samples with all."""

    def check_vae(self, model: ModelMixin, vae: AutoencoderKL | None) -> None:
        channels = 3 if vae is None else vae.config.latent_channels
        if model.config.in_channels != channels:
            whose = "clips without a VAE" if vae is None else "the VAE's latents"
            raise UserError(
                f"pipeline.build.model.config.in_channels: {model.config.in_channels}, but {whose} have {channels} "
                "channels"
            )

    def check_text(self, model: ModelMixin, text: Any) -> None:
        width = model.config.cross_attention_dim
        if text is None:
            raise UserError("pipeline.build.text: a DFGNModel follows texts; name an encoder, such as [{id: minilm}]")
        if len(text.channels) == 1 and text.channels[0] != width and not model.config.text_channels:
            raise UserError(
                f"pipeline.build.model.config.cross_attention_dim: {width}, but the text encoder gives "
                f"{text.channels[0]} channels; set that, or text_channels and text_tokens"
            )
        if (known := model.config.text_channels) and (list(known), list(model.config.text_tokens)) != (
            list(text.channels),
            list(text.tokens),
        ):
            raise UserError(
                f"pipeline.build.model.config.text_channels, text_tokens: {list(known)} and "
                f"{list(model.config.text_tokens)}, but the encoders give {list(text.channels)} and {list(text.tokens)}"
            )
