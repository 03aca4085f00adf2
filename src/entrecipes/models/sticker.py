"""A pipeline from a text, given frames or both to an animated sticker (RDTF, arXiv 2503.17735).

The file imports torch, diffusers, transformers and PIL only and is saved beside the weights, as `pipeline.py`:
`DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` loads it without entrecipes.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# In this form, which diffusers goes by where it copies both files.
from .sticker_io import as_asked, encode_captions, place_frames, save_animation

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StickerPipelineOutput(BaseOutput):
    """What the pipeline samples."""

    frames: Any
    """Lists of PIL images, or [n, F, 3, H, W] (`pt`) and [n, F, H, W, 3] (`np`) in [0, 1], as `output_type` asks."""


class StickerPipeline(DiffusionPipeline):
    """Samples short clips that follow a text, some given frames, both or nothing.

    Args:
        unet: The denoiser, a `DFGNModel`: called with clips, timesteps, text tokens and the given frames.
        scheduler: The sampler, any of diffusers'.
        vae: Encodes and decodes frame by frame; None: the denoiser works on pixels.
        text_encoder: Frozen; None: texts are given as `prompt_embeds`.
        tokenizer: Of the text encoder.
        text_encoder_2: Another one, whose tokens follow.
        tokenizer_2: Of that one.
        text_tokens: Length that texts are padded or cut to, for each text encoder.

    Raises:
        ValueError: When `text_tokens` does not hold a number for each text encoder.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    save_animation = staticmethod(save_animation)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_tokens: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        text_tokens = list(text_tokens or ())
        self.register_to_config(text_tokens=text_tokens)
        if len(text_tokens) != sum(encoder is not None for encoder in (text_encoder, text_encoder_2)):
            raise ValueError(f"text_tokens {text_tokens}: give one number for each text encoder")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save all parts, this file as `pipeline.py` and what it imports; options are diffusers' own."""
        super().save_pretrained(save_directory, **options)
        folder, here = Path(save_directory), Path(__file__)
        shutil.copyfile(here, folder / "pipeline.py")
        shutil.copyfile(here.with_name("sticker_io.py"), folder / "sticker_io.py")

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> tuple[dict, dict, dict]:
        """Where this class is entrecipes' own so is its denoiser: the copy beside the weights need not be trusted."""
        parts, unused, hidden = super().extract_init_dict(config_dict, **options)
        if __name__ == "entrecipes.models.sticker" and parts.get("unet", [None])[0] == "entrecipes":
            parts["unet"] = (importlib.import_module("entrecipes.models.dfgn").__name__, parts["unet"][1])
        return parts, unused, hidden

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        frames: Mapping[int, Any] | Sequence[Mapping[int, Any]] | None = None,
        num_frames: int = 8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        frame_guidance_scale: float = 1.0,
        pin: bool = False,
        transparent: bool = False,
        generator: Generators = None,
        output_type: str = "pil",
        prompt_embeds: Tensor | None = None,
        condition: Tensor | None = None,
        given: Tensor | None = None,
        return_dict: bool = True,
    ) -> StickerPipelineOutput | tuple[Any]:
        """Sample clips.

        One frame given: image to video; a text: text to video; every other frame: interpolation; the first or the last
        ones: prediction forwards or backwards; nothing: anything. There is no negative prompt, since models learn what
        "no text" means from zeros in its place.

        Args:
            prompt: A text for all clips, or one a clip; "" is none.
            frames: What is given, {number of the frame: picture}, for all clips or one a clip; -1 is the last frame.
                A picture is a PIL image (resized, transparency on white) or a tensor [3, H, W] in [0, 1].
            num_frames: Length of the clips.
            height: Of the frames in pixels; by default what the denoiser was trained on.
            width: The same.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance from what the frames ask for to what frames and text do; 1 is off.
            frame_guidance_scale: From what nothing asks for to what the frames do; 1 is off.
            pin: Given frames stand in the result as they are, and the others are denoised beside them. Without, the
                model draws its own version of them.
            transparent: Near-white that reaches to the border becomes transparent (for `pil`).
            generator: One for all, or one a clip (then a clip does not depend on its batch).
            output_type: `pil`, `np` or `pt`.
            prompt_embeds: In place of `prompt`, what `encode_captions` gives [n, T, D]; zeros are no text.
            condition: In place of `frames`, those in the denoiser's space [n, C, F, h, w], zeros at other places.
            given: Which of them are given, bool [n, F]; `pin` needs it.
            return_dict: False gives a tuple.

        Raises:
            ValueError: When arguments don't go with each other, or don't fit the models.
        """
        doubled = {"frames": frames, "condition": condition}, {"prompt": prompt, "prompt_embeds": prompt_embeds}
        for pair in doubled:
            if None not in pair.values():
                raise ValueError(f"give either {' or '.join(pair)}")
        if output_type not in ("pil", "np", "pt") or (transparent and output_type != "pil"):
            raise ValueError(f"output_type '{output_type}': give pil (needed by `transparent`), np or pt")
        if pin and condition is not None and given is None:
            raise ValueError("given: `pin` needs to know which frames of `condition` are given")
        text, pictures = self._text(prompt, prompt_embeds), None
        if condition is None:
            pictures, given = place_frames(frames, num_frames, *self._size(height, width))
            condition = self._encode(pictures, given)
        condition = condition.to(self._execution_device, torch.float32)
        given = (condition != 0).any(1).any(-1).any(-1) if given is None else given.to(condition.device)
        count = _count(text, condition, generator)
        text = None if text is None else text.to(self._execution_device, self.unet.dtype).expand(count, -1, -1)
        condition, given = condition.expand(count, *condition.shape[1:]), given.expand(count, -1)
        x = self._sample(
            text, condition, given, num_inference_steps, guidance_scale, frame_guidance_scale, pin, generator
        )
        video = self._decode(x)
        if pin:
            pictures = self._decode(condition) if pictures is None else pictures.to(video.device)
            video = torch.where(given[:, None, :, None, None], pictures, video)
        result = as_asked(video, output_type, transparent)
        self.maybe_free_model_hooks()
        return StickerPipelineOutput(frames=result) if return_dict else (result,)

    def _sample(
        self,
        text: Tensor | None,
        condition: Tensor,
        given: Tensor,
        steps: int,
        scale: float,
        frame_scale: float,
        pin: bool,
        generator: Generators,
    ) -> Tensor:
        """From noise to clips in the denoiser's space [n, C, F, h, w]."""
        scheduler, device = self.scheduler, condition.device
        weights = pass_weights(scale, frame_scale, text is not None and bool(text.any()), bool(given.any()))
        texts = None
        if text is not None:
            texts = torch.cat([text if shown else torch.zeros_like(text) for shown, _ in weights])
        conditions = torch.cat([condition if shown else torch.zeros_like(condition) for _, shown in weights])
        conditions, dtype = conditions.to(self.unet.dtype), self.unet.dtype
        scheduler.set_timesteps(steps, device=device)
        if hasattr(scheduler, "set_begin_index"):  # so that `_noised` is told the step, not a timestep
            scheduler.set_begin_index(0)
        noise = randn_tensor(condition.shape, generator=generator, device=device, dtype=torch.float32)
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching schedulers don't name it
        rescale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)  # nor any scaling
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        held = given[:, None, :, None, None] & pin
        for timestep in self.progress_bar(scheduler.timesteps):
            if pin:
                x = torch.where(held, _noised(scheduler, condition, noise, timestep), x)
            sample = rescale(x, timestep).to(dtype)
            sample = torch.cat([sample] * len(weights))
            output = self.unet(sample, timestep.expand(len(sample)), texts, conditions, return_dict=False)[0].float()
            if len(weights) > 1:
                output = sum(w * part for w, part in zip(weights.values(), output.chunk(len(weights)), strict=True))
            x = scheduler.step(output, timestep, x, **extra, return_dict=False)[0]
        return x

    def _text(self, prompt: str | Sequence[str] | None, embeds: Tensor | None) -> Tensor | None:
        """[n or 1, T, D]; None without any text."""
        if prompt is None or embeds is not None:
            return embeds
        pairs = [(self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)]
        pairs = [pair for pair in pairs if pair[0] is not None]
        if not pairs:
            raise ValueError("prompt: this pipeline has no text encoder; give `prompt_embeds`")
        captions = [prompt] if isinstance(prompt, str) else [text or "" for text in prompt]
        return encode_captions(captions, *zip(*pairs, strict=True), self.config.text_tokens, self._execution_device)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels that a latent stands for, in one direction."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _size(self, height: int | None, width: int | None) -> list[int]:
        size = [side or self.unet.config.sample_size * self.vae_scale_factor for side in (height, width)]
        if any(length % self.vae_scale_factor for length in size):
            raise ValueError(f"height and width {size}: give multiples of {self.vae_scale_factor}")
        return size

    def _encode(self, pictures: Tensor, given: Tensor) -> Tensor:
        """Given pictures in the denoiser's space [n, C, F, h, w], zeros at the other places."""
        device, count = self._execution_device, self.unet.config.out_channels
        height, width = (side // self.vae_scale_factor for side in pictures.shape[-2:])
        frames = torch.zeros(*given.shape, count, height, width, device=device)
        chosen = pictures.transpose(1, 2)[given].to(device) * 2 - 1
        if not len(chosen):
            return frames.transpose(1, 2)
        if self.vae is not None:
            shift, scale = self.vae.config.shift_factor or 0, self.vae.config.scaling_factor
            chosen = (self.vae.encode(chosen.to(self.vae.dtype)).latent_dist.mode().float() - shift) * scale
        frames[given.to(device)] = chosen
        return frames.transpose(1, 2)

    def _decode(self, x: Tensor) -> Tensor:
        """The inverse: [n, 3, F, H, W] in [0, 1]."""
        if self.vae is not None:
            x = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            frames = self.vae.decode(x.transpose(1, 2).flatten(0, 1).to(self.vae.dtype), return_dict=False)[0]
            x = frames.float().unflatten(0, (len(x), -1)).transpose(1, 2)
        return (x / 2 + 0.5).clamp(0, 1)


def pass_weights(scale: float, frame_scale: float, text: bool, frames: bool) -> dict[tuple[bool, bool], float]:
    """{(shown the text, shown the frames): factor}: what guidance makes of the denoiser's outputs, in one sum.

    It is u + frame_scale (f - u) + scale (ft - f) with u shown nothing, f the frames and ft both. Passes that would be
    alike, since there is no `text` or there are no `frames`, are one; those with a factor of zero are left out.
    """
    weights: dict[tuple[bool, bool], float] = {}
    factors = {(False, False): 1 - frame_scale, (False, True): frame_scale - scale, (True, True): scale}
    for (with_text, with_frames), factor in factors.items():
        shown = with_text and text, with_frames and frames
        weights[shown] = weights.get(shown, 0.0) + factor
    return {shown: factor for shown, factor in weights.items() if abs(factor) > 1e-9}


def _noised(scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a clip looks like to the scheduler at this step of its own path."""
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(clean, timestep[None], noise)
    return scheduler.add_noise(clean, noise, timestep[None])


def _count(text: Tensor | None, condition: Tensor, generator: Generators) -> int:
    """How many clips there are to sample."""
    lists = {"texts": 1 if text is None else len(text), "clips of frames": len(condition)}
    if isinstance(generator, list):
        lists["generators"] = len(generator)
    count = max(lists.values())
    if any(number not in (1, count) for number in lists.values()) or lists.get("generators", count) != count:
        raise ValueError(", ".join(f"{number} {name}" for name, number in lists.items()) + ": give one for each clip")
    return count


if __name__ == "entrecipes.models.sticker":  # there `DiffusionPipeline.from_pretrained` looks classes up
    diffusers.StickerPipeline = StickerPipeline
