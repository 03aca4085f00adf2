"""A small transformer that denoises sequences of symbols (text, DNA), and the pipeline that samples them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor, nn

TIME_CHANNELS = 256
"""Sines and cosines of the timestep, as in diffusers' DiT."""


@dataclass
class SequenceTransformerOutput(BaseOutput):
    """What the model predicts."""

    sample: Tensor
    """[n, V, L], like the input."""


class SequenceTransformer1DModel(ModelMixin, ConfigMixin):
    """Bidirectional transformer over L positions with V channels, one a symbol of the alphabet.

    DiT's design (Peebles & Xie 2023: attention and MLP modulated by the noise level, residual branches that start at
    zero) in one dimension, with one modulation shared by all blocks and a table of offsets for each (PixArt-alpha, Chen
    et al. 2023), which is diffusers' `BasicTransformerBlock` of type `ada_norm_single`.

    Args:
        sample_size: L, symbols in a sequence.
        alphabet: The symbols, in the order of the channels.
        patch_size: Neighbouring symbols that make one token; divides `sample_size`.
        kernel_size: Tokens that the input projection sees at once, odd. Above 1 there is a convolution beside it, which
            starts at zero: short-range context, which attention alone takes many steps to find.
        num_layers: Transformer blocks.
        num_attention_heads: Heads of each block.
        attention_head_dim: Channels of each head.
        dropout: Share of activations dropped in training.
        timestep_scale: Factor on the timestep before its sines and cosines, which are made for 0 to 1000: 1 for VP and
            flow schedulers; 100 suits EDM, whose log(sigma) / 4 spans less than three units.
        num_class_embeds: Classes that the model is conditioned on; null: none.

    Raises:
        ValueError: When the patches don't fill the sequence, the kernel is even, or the alphabet repeats a symbol.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        alphabet: str = "ACGT",
        patch_size: int = 1,
        kernel_size: int = 1,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        dropout: float = 0.0,
        timestep_scale: float = 1.0,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide sample_size {sample_size}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd")
        if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2:
            raise ValueError(f"alphabet {alphabet!r} must have two symbols or more, each once")
        width, channels = num_attention_heads * attention_head_dim, len(alphabet) * patch_size
        self.proj_in = nn.Linear(channels, width)
        self.conv_in = nn.Conv1d(channels, width, kernel_size, padding="same", bias=False) if kernel_size > 1 else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(sample_size // patch_size, width))
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0, scale=timestep_scale)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, width)
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.modulation = nn.Linear(width, 6 * width)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, channels)
        zeros = [*self.modulation.parameters(), *self.modulation_out.parameters(), *self.proj_out.parameters()]
        zeros += [block.scale_shift_table for block in self.transformer_blocks]
        zeros += [] if self.conv_in is None else [self.conv_in.weight]
        for parameter in zeros:
            nn.init.zeros_(parameter)
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> SequenceTransformerOutput | tuple[Tensor]:
        """Predict from noisy one-hot sequences.

        Args:
            sample: Float [n, V, L].
            timestep: [n] or one number, whatever the scheduler counts in: 0 to 1000, or EDM's log(sigma) / 4.
            class_labels: int64 [n], for a class-conditional model.
            return_dict: False gives a tuple.

        Raises:
            ValueError: When a class-conditional model is given no labels.
        """
        count, symbols, length = sample.shape
        patch = self.config.patch_size
        condition = self._condition(timestep, class_labels, count, sample)
        tokens = sample.transpose(1, 2).reshape(count, length // patch, patch * symbols)
        hidden = self.proj_in(tokens) + self.pos_embed
        if self.conv_in is not None:
            hidden = hidden + self.conv_in(tokens.transpose(1, 2)).transpose(1, 2)
        modulation = self.modulation(condition)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, None, None, None, modulation)
            else:
                hidden = block(hidden, timestep=modulation)
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        hidden = self.proj_out(self.norm_out(hidden) * (1 + scale) + shift)
        output = hidden.reshape(count, length, symbols).transpose(1, 2)
        return SequenceTransformerOutput(sample=output) if return_dict else (output,)

    def _condition(self, timestep: Tensor | float, labels: Tensor | None, count: int, like: Tensor) -> Tensor:
        """The noise level and the class as one activated vector a sequence [n, width]."""
        timestep = torch.as_tensor(timestep, device=like.device).expand(count)
        condition = self.time_embedding(self.time_proj(timestep).to(self.dtype))
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError("class_labels: this model is class-conditional, give one label a sequence")
            condition = condition + self.class_embedding(labels)
        return nn.functional.silu(condition)


@dataclass
class SequencePipelineOutput(BaseOutput):
    """What the pipeline samples."""

    sequences: list[str] | Tensor
    """Texts, symbol ids uint8 [n, L], or x0 [n, V, L], as `output_type` asks."""


class SequencePipeline(DiffusionPipeline):
    """Samples sequences with any diffusers scheduler and decodes each position to its largest channel.

    Args:
        transformer: The denoiser; it knows the alphabet and the length.
        scheduler: The sampler.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SequenceTransformer1DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: list[int] | int | Tensor | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
    ) -> SequencePipelineOutput | tuple[list[str] | Tensor]:
        """Sample.

        Args:
            batch_size: Sequences; by default one a label, or one.
            class_labels: Class of each sequence, or of all; a class-conditional model needs them.
            num_inference_steps: Denoising steps.
            sigmas: Noise levels to step through in place of the scheduler's own, where it takes them.
            timesteps: Or timesteps.
            generator: One for all, or one a sequence (then a sequence does not depend on its batch).
            output_type: `text` (a string each), `ids` (uint8 [n, L] positions in the alphabet) or `pt` (x0 [n, V, L]).
            return_dict: False gives a tuple.

        Raises:
            ValueError: For another `output_type`, or labels that don't go with the model or the batch size.
        """
        if output_type not in ("text", "ids", "pt"):
            raise ValueError(f"output_type '{output_type}': give text, ids or pt")
        config = self.transformer.config
        labels = self._labels(class_labels, batch_size)
        count = batch_size or (1 if labels is None else len(labels))
        shape = (count, len(config.alphabet), config.sample_size)
        scheduler = self.scheduler
        grid = {"sigmas": sigmas, "timesteps": timesteps}
        grid = {key: value for key, value in grid.items() if value is not None}
        scheduler.set_timesteps(**(grid or {"num_inference_steps": num_inference_steps}), device=self._execution_device)
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching schedulers don't name it, nor any scaling
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        extra = self._step_arguments(generator)
        for timestep in self.progress_bar(scheduler.timesteps):
            scaled = scale(x, timestep).to(self.transformer.dtype)
            prediction = self.transformer(scaled, timestep, class_labels=labels, return_dict=False)[0].float()
            x = scheduler.step(prediction, timestep, x, **extra, return_dict=False)[0]
        sequences: Any = x if output_type == "pt" else x.argmax(1).to(torch.uint8)
        if output_type == "text":
            sequences = ["".join(config.alphabet[i] for i in row) for row in sequences.tolist()]
        self.maybe_free_model_hooks()
        return SequencePipelineOutput(sequences=sequences) if return_dict else (sequences,)

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """The folder of a Hub repository: all of it, where diffusers' own would look for code of its components."""
        known = ("cache_dir", "force_download", "token", "revision", "local_files_only")
        return snapshot_download(pretrained_model_name, **{key: options[key] for key in known if key in options})

    def _labels(self, labels: Any, batch_size: int | None) -> Tensor | None:
        conditional = self.transformer.config.num_class_embeds is not None
        if conditional != (labels is not None):
            raise ValueError("class_labels: " + ("one a sequence is needed" if conditional else "there are no classes"))
        if labels is None:
            return None
        labels = torch.as_tensor(labels, device=self._execution_device)
        labels = labels.expand(batch_size or 1) if labels.dim() == 0 else labels
        if batch_size not in (None, len(labels)):
            raise ValueError(f"class_labels: {len(labels)} labels for {batch_size} sequences")
        return labels

    def _step_arguments(self, generator: Any) -> dict[str, Any]:
        """The generator, for a scheduler that adds noise of its own."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}


# diffusers writes the module that a class says it lives in into model_index.json, and looks it up there by name.
for _class in (SequenceTransformer1DModel, SequencePipeline):
    _class.__module__ = "entrecipes"
