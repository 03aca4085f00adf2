"""The pipeline that samples images with experts, each for its noise levels, by any diffusers scheduler.

The file imports torch and diffusers only and is saved beside the weights, as `pipeline.py`:
`DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` loads it without entrecipes.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


class ExpertsPipeline(DiffusionPipeline):
    """Samples images with `TimestepExperts`: UNets on pixels, or DiTs on pixels or latents.

    With one expert it gives what `ConsistencyModelPipeline` (UNet) and `DiTPipeline` (DiT) give.

    Args:
        denoiser: The `TimestepExperts`.
        scheduler: The sampler, any of diffusers'.
        vae: Decodes latents; None: the denoiser works on pixels.
    """

    model_cpu_offload_seq = "denoiser->vae"
    _optional_components = ["vae"]

    def __init__(self, denoiser: ModelMixin, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        # By default it rounds sides to multiples of 8, and takes four channels for latents.
        self.processor = VaeImageProcessor(vae_scale_factor=1, resample="bicubic", vae_latent_channels=0)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save all parts, and this file as `pipeline.py`; options are diffusers' own.

        Raises:
            ValueError: For a `variant`, which diffusers doesn't look for in the experts' folders.
        """
        if options.get("variant"):
            raise ValueError("variant: pipelines of experts have none; save without, and load with `dtype`")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / "pipeline.py")
        super().save_pretrained(save_directory, **options)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> tuple[dict, dict, dict]:
        """Where this class is entrecipes' own so is its denoiser: the copy beside the weights need not be trusted."""
        parts, unused, hidden = super().extract_init_dict(config_dict, **options)
        if __name__ == "entrecipes.models.experts_pipeline" and "denoiser" in parts:
            module = importlib.import_module("entrecipes.models.experts")
            parts["denoiser"] = (module.__name__, parts["denoiser"][1])
        return parts, unused, hidden

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | int | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        image: Any = None,
        strength: float = 0.8,
        generator: Generators = None,
        experts: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample.

        Args:
            class_labels: Class of each image, or of all; class-conditional experts need them.
            batch_size: Images; by default one a label, or one for each `image`, or one.
            num_inference_steps: Denoising steps.
            sigmas: Noise levels to step through in place of the scheduler's own, where it takes them.
            timesteps: Or timesteps.
            guidance_scale: Classifier-free guidance, for experts with a null label (DiT); 1 is off.
            image: Start from these: a PIL image or a list of them, or a tensor [n, C, H, W] in [0, 1].
            strength: With `image`, the share of the steps that is run, in (0, 1]: the image is noised to the first.
            generator: One for all, or one an image (then an image does not depend on its batch).
            experts: Which expert serves each step, or each call of the model (solvers of second order call twice a
                step), from noise to data, whatever the timesteps. With `image` it describes all steps, too.
            shares: Or the share of the calls that each expert serves, in the experts' order (T-Stitch, Pan et al.
                2024); they sum to 1.
            output_type: `pil`, `np` [n, H, W, C] or `pt` [n, C, H, W] in [0, 1], or `latent` (before the VAE).
            return_dict: False gives a tuple.

        Raises:
            ValueError: When arguments don't go with each other, the experts or the scheduler.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type '{output_type}': give pil, np, pt or latent")
        start = None if image is None else self._encode(image)
        labels = self._labels(class_labels)
        count = self._count(batch_size, generator, labels, start)
        labels = None if labels is None else labels.expand(count)
        self._set_timesteps(num_inference_steps, sigmas, timesteps)
        calls = self.scheduler.timesteps.cpu()  # read once: what is asked of them below waits for no accelerator
        route = self._route(calls.tolist(), experts, shares)
        x, first = self._start(start, count, calls, strength, generator)
        step = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        scale = getattr(self.scheduler, "scale_model_input", lambda x, timestep: x)  # flow schedulers have none
        on_device = calls.to(x.device)
        with self.progress_bar(total=len(calls) - first) as bar:
            for call in range(first, len(calls)):
                with self.denoiser.serving(route[call]):
                    prediction = self._predict(scale(x, calls[call]), on_device[call], labels, guidance_scale)
                x = self.scheduler.step(prediction, calls[call], x, **step, return_dict=False)[0]
                bar.update()
        images = self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        """The network's output as the scheduler takes it, guided."""
        config = self.denoiser.config
        channels, null = config.in_channels, config.get("num_embeds_ada_norm")
        if guidance_scale == 1:
            output = self.denoiser(x, timestep, class_labels=labels, return_dict=False)[0]
        elif null is None:
            raise ValueError(f"guidance_scale {guidance_scale}: these experts have no null label; leave it at 1")
        else:
            both = torch.cat([labels, torch.full_like(labels, null)])
            output = self.denoiser(torch.cat([x, x]), timestep, class_labels=both, return_dict=False)[0]
            given, without = output.chunk(2)
            mean = without[:, :channels] + guidance_scale * (given[:, :channels] - without[:, :channels])
            output = torch.cat([mean, given[:, channels:]], dim=1)
        takes_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return output if takes_variance else output[:, :channels]

    def _labels(self, labels: Any) -> Tensor | None:
        """int64 [n] or [1] on the device; None for experts without classes."""
        config = self.denoiser.config
        classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if (classes is None) != (labels is None):
            raise ValueError("class_labels: " + ("one an image is needed" if classes else "there are no classes"))
        if labels is None:
            return None
        labels = torch.as_tensor(labels).reshape(-1)
        last = classes if config.get("num_embeds_ada_norm") else classes - 1  # a DiT's last is the null label
        if labels.min() < 0 or labels.max() > last:
            raise ValueError(f"class_labels {labels.tolist()}: give numbers from 0 to {classes - 1}")
        return labels.to(self._execution_device)

    def _count(self, batch_size: int | None, generator: Generators, *given: Tensor | None) -> int:
        counts = {len(rows) for rows in given if rows is not None} | ({batch_size} - {None})
        counts |= {len(generator)} if isinstance(generator, list) else set()
        if len(counts - {1}) > 1 or batch_size == 1 < max(counts, default=1):
            raise ValueError(
                f"class_labels, image, generator, batch_size: for {sorted(counts)} images; make them agree"
            )
        if isinstance(generator, list) and len(generator) != max(counts):
            raise ValueError(f"generator: {len(generator)} for {max(counts)} images; give one, or one an image")
        return max(counts, default=1)

    def _set_timesteps(self, steps: int, sigmas: Any, timesteps: Any) -> None:
        name, accepted = type(self.scheduler).__name__, inspect.signature(self.scheduler.set_timesteps).parameters
        grid = {"sigmas": sigmas, "timesteps": timesteps}
        grid = {key: list(value) for key, value in grid.items() if value is not None}
        for key in grid:
            if key not in accepted:
                raise ValueError(f"{key}: {name} makes its own; give num_inference_steps, or take another scheduler")
        self.scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}), device=self._execution_device)

    def _route(self, calls: list[float], experts: Any, shares: Any) -> list[int]:
        """The number of the expert for each call of the model."""
        number = len(self.denoiser.experts)
        if experts is not None and shares is not None:
            raise ValueError("give `experts` or `shares`, not both")
        if experts is not None:
            order = self.scheduler.order  # calls a step; the last step may have one
            steps = -(-len(calls) // order)
            if len(experts) not in (len(calls), steps) or not set(experts) <= set(range(number)):
                wanted = f"one of 0 to {number - 1} for each of {steps} steps or {len(calls)} calls of the model"
                raise ValueError(f"experts {list(experts)}: give {wanted}")
            return [experts[call if len(experts) == len(calls) else call // order] for call in range(len(calls))]
        if shares is not None:
            if len(shares) != number or min(shares) < 0 or not abs(sum(shares) - 1) < 1e-6:
                raise ValueError(f"shares {list(shares)}: give {number}, one an expert, that sum to 1")
            ends = list(accumulate(shares))[:-1]
            return [sum((call + 0.5) / len(calls) >= end for end in ends) for call in range(len(calls))]
        return [self.denoiser.expert_for(timestep) for timestep in calls]

    def _start(
        self, image: Tensor | None, count: int, calls: Tensor, strength: float, generator: Generators
    ) -> tuple[Tensor, int]:
        """What the first call of the model gets, and which call that is."""
        config, scheduler = self.denoiser.config, self.scheduler
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.denoiser.dtype)
        if image is None:
            return noise * getattr(scheduler, "init_noise_sigma", 1.0), 0  # flow schedulers don't name it
        if not 0 < strength <= 1:
            raise ValueError(f"strength {strength}: give a share of the steps, above 0 and at most 1")
        steps = -(-len(calls) // scheduler.order)
        first = scheduler.order * (steps - max(1, int(steps * strength + 0.5)))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        image, timestep = image.expand(noise.shape), calls[first].expand(count)
        if hasattr(scheduler, "scale_noise"):  # flow matching
            return scheduler.scale_noise(image, timestep, noise), first
        return scheduler.add_noise(image, noise, timestep), first

    def _encode(self, image: Any) -> Tensor:
        """Images as the denoiser knows them: [n, C, H, W] in [-1, 1], or the means of their scaled latents."""
        config = self.denoiser.config
        channels = config.in_channels if self.vae is None else self.vae.config.in_channels
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = config.sample_size * factor
        pixels = self.processor.preprocess(_as_mode(image, "L" if channels == 1 else "RGB"), side, side)
        if pixels.shape[1] != channels:
            raise ValueError(f"image: {pixels.shape[1]} channels, but the experts know images of {channels}")
        pixels = pixels.to(self._execution_device, self.denoiser.dtype)
        if self.vae is None:
            return pixels
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().to(pixels.dtype)
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def _finish(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = 1 / self.vae.config.scaling_factor * x + (self.vae.config.shift_factor or 0)
            x = self.vae.decode(x.to(self.vae.dtype), return_dict=False)[0]
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        x = x.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(x) if output_type == "pil" else x


def _as_mode(images: Any, mode: str) -> Any:
    """PIL images with the channels that the denoiser takes; tensors as they are."""
    if isinstance(images, Image.Image):
        return images.convert(mode)
    return [_as_mode(image, mode) for image in images] if isinstance(images, list | tuple) else images


if __name__ == "entrecipes.models.experts_pipeline":  # there `DiffusionPipeline.from_pretrained` looks classes up
    diffusers.ExpertsPipeline = ExpertsPipeline
