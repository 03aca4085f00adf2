"""A pipeline from a reference image and a clip of poses to a video, around any Wan-class diffusers transformer.

The noisy clip, the pose maps and the reference image (repeated on every frame) are concatenated by channel, as in the
Fun-Control and VACE models. The file imports torch and diffusers only and is saved beside the weights, as
`pipeline.py`: `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` loads it
without entrecipes.
"""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn


@dataclass
class PoseVideoPipelineOutput(BaseOutput):
    """What the pipeline samples."""

    frames: Any
    """Lists of PIL images, or [n, F, 3, H, W] (`pt`) and [n, F, H, W, 3] (`np`) in [0, 1], as `output_type` asks."""


class PoseVideoPipeline(DiffusionPipeline):
    """Samples clips of the person in a reference image, moving as the poses say.

    Args:
        transformer: The denoiser. It takes the clip's channels and twice as many for the condition; one that takes the
            clip alone, such as that of a text-to-video `WanPipeline`, is widened (see `widen`).
        scheduler: The sampler.
        vae: The video VAE; None: the transformer works on pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self, transformer: WanTransformer3DModel, scheduler: SchedulerMixin, vae: AutoencoderKLWan | None = None
    ) -> None:
        super().__init__()
        if transformer.config.in_channels == transformer.config.out_channels:
            widen(transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.processor = VideoProcessor(vae_scale_factor=1, resample="bicubic")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save all parts, and this file as `pipeline.py`; options are diffusers' own."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / "pipeline.py")
        super().save_pretrained(save_directory, **options)

    def encode_condition(self, poses: Tensor, reference: Tensor) -> Tensor:
        """What is concatenated to the noisy clip.

        Args:
            poses: Pose maps [n, 3, F, H, W] in [-1, 1].
            reference: Image of the person [n, 3, H, W] in [-1, 1].

        Returns:
            [n, 6, F, H, W], or the latents of both [n, 2C, F', h, w].

        Raises:
            ValueError: When the VAE can't compress clips of this length or size.
        """
        still = reference[:, :, None].expand_as(poses)
        return torch.cat([self._encode(poses), self._encode(still)], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        reference: Any = None,
        poses: Any = None,
        condition: Tensor | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PoseVideoPipelineOutput | tuple[Any]:
        """Sample one clip for each reference.

        Args:
            reference: A PIL image or a list of them (resized to the poses), or a tensor [n, 3, H, W] in [0, 1].
            poses: The pose maps: a list of PIL images (one clip), a list of such lists, or a tensor [n, F, 3, H, W] in
                [0, 1]. They give the number of frames and the size.
            condition: What `encode_condition` gave, in place of both.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance towards the condition; 1 is off.
            generator: One for all, or one a clip (then a clip does not depend on its batch).
            output_type: `pil`, `np` or `pt`.
            return_dict: False gives a tuple.

        Raises:
            ValueError: When neither the condition nor both its parts are given, their numbers or sizes differ, or the
                transformer takes no clips of that size.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        if condition is None:
            condition = self.encode_condition(*self._prepare(reference, poses))
        config = self.transformer.config
        self._check(condition)
        condition = condition.to(device, dtype)
        shape = (len(condition), config.out_channels, *condition.shape[2:])
        text = condition.new_zeros(len(condition), 1, config.text_dim)  # no prompt: what Wan pads its prompts with
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching schedulers don't name it, nor any scaling
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}

        def predict(sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            time = timestep.expand(len(sample))
            return self.transformer(torch.cat([sample, condition], dim=1), time, text, return_dict=False)[0].float()

        for timestep in self.progress_bar(scheduler.timesteps):
            sample = scale(x, timestep).to(dtype)
            prediction = predict(sample, timestep, condition)
            if guidance_scale != 1:
                unguided = predict(sample, timestep, torch.zeros_like(condition))
                prediction = unguided + guidance_scale * (prediction - unguided)
            x = scheduler.step(prediction, timestep, x, **extra, return_dict=False)[0]
        video = self._decode(x)
        frames = self.processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return PoseVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _prepare(self, reference: Any, poses: Any) -> tuple[Tensor, Tensor]:
        """Both as tensors in [-1, 1]: poses [n, 3, F, H, W], reference [n, 3, H, W]."""
        if reference is None or poses is None:
            raise ValueError("give both `reference` and `poses`, or `condition`")
        if not isinstance(poses, Tensor) and isinstance(poses[0], Image.Image):
            poses = [poses]
        videos = [self.processor.preprocess(_rgb(clip)) for clip in poses]
        if len({video.shape for video in videos}) > 1:
            raise ValueError(
                f"clips of {sorted({len(video) for video in videos})} poses: give clips of one length and size"
            )
        clips = torch.stack(videos).transpose(1, 2)
        size = clips.shape[-2:]
        if isinstance(reference, Tensor) and reference.shape[-2:] != size:  # the processor would repeat its pixels
            raise ValueError(f"the reference is {list(reference.shape[-2:])} and the poses {list(size)}: resize one")
        images = self.processor.preprocess(_rgb(reference), *size)
        if len(images) != len(clips):
            raise ValueError(f"{len(images)} reference images for {len(clips)} clips of poses: give one for each")
        device = self._execution_device
        return clips.to(device, torch.float32), images.to(device, torch.float32)

    def _check(self, condition: Tensor) -> None:
        config = self.transformer.config
        channels, *size = condition.shape[1:]
        wanted = config.in_channels - config.out_channels
        if channels != wanted:
            raise ValueError(f"the condition has {channels} channels, but the transformer takes {wanted} of one")
        if any(side % patch for side, patch in zip(size, config.patch_size, strict=True)):
            raise ValueError(f"frames, height and width {size} must be multiples of patch_size {config.patch_size}")

    def _encode(self, video: Tensor) -> Tensor:
        """[n, 3, F, H, W] in [-1, 1] -> normalised latents, or the pixels as they are."""
        if self.vae is None:
            return video
        frames, *size = video.shape[2:]
        time, space = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
        if (frames - 1) % time or any(side % space for side in size):  # the VAE would leave the rest out
            raise ValueError(
                f"{frames} frames of {size}: this VAE takes a multiple of {time} frames and one more, with sides that "
                f"are multiples of {space}"
            )
        mean, std = latent_scale(self.vae, video.device)
        return (self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode().float() - mean) / std

    def _decode(self, latents: Tensor) -> Tensor:
        """The inverse: a video [n, 3, F, H, W] in [-1, 1]."""
        if self.vae is None:
            return latents.clamp(-1, 1)
        mean, std = latent_scale(self.vae, latents.device)
        return self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0].float()


def widen(transformer: WanTransformer3DModel) -> None:
    """Let a transformer of C channels take 3C, in place: its outputs stay as they are, whatever the new channels hold.

    The new weights of its first layer are zero.
    """
    old, channels = transformer.patch_embedding, transformer.config.in_channels
    new = nn.Conv3d(3 * channels, old.out_channels, old.kernel_size, old.stride).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()[:, :channels] = old.weight
        new.bias.copy_(old.bias)
    transformer.patch_embedding = new
    transformer.register_to_config(in_channels=3 * channels)


def _rgb(images: Any) -> Any:
    """PIL images without palette or transparency, which the processor would take for colours; others as they are."""
    if isinstance(images, Image.Image):
        return images.convert("RGB")
    return [_rgb(image) for image in images] if isinstance(images, list | tuple) else images


def latent_scale(vae: AutoencoderKLWan, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, [1, C, 1, 1, 1] each, on the device (or the VAE's)."""
    return tuple(
        torch.tensor(values, device=device or vae.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
