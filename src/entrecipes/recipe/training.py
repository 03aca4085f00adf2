"""`optimizer:` and `training:` how the weights move, and everything about the run itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from entrecipes.recipe.base import Count, PositiveCount, Section, register, union

Decay = Annotated[float, Field(ge=0, lt=1)]
OPTIMIZERS = "entrecipes.training.optimizer"


class LearningRate(Section):
    """The learning rate as a function of images seen: linear warm-up, then decay to `final` of the peak."""

    warmup: Count = 0
    """Images over which the rate rises from zero."""
    decay: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    """Shape after the warm-up; inverse_sqrt needs `decay_start` (Karras et al. 2024, EDM2)."""
    decay_start: Count = 0
    """Images seen when the decay begins."""
    final: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate left when training ends (cosine and linear)."""
    span: tuple[float, float] = (0.0, 1.0)
    """The part of the decay that this run goes through (cosine and linear): [0, 0.5] is the first half, which
    another run goes on from."""

    @model_validator(mode="after")
    def _decay_has_a_start(self) -> LearningRate:
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span: {list(self.span)} is no part of a decay; give [from, to], 0 <= from < to <= 1")
        if self.decay == "inverse_sqrt" and not self.decay_start:
            raise ValueError("decay_start: must be above 0 with decay: inverse_sqrt, which divides by it")
        return self


class Optimizer(Section):
    """Keys that every optimizer understands."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    schedule: LearningRate = LearningRate()
    """The learning rate over the run."""


class AdamKeys(Optimizer):
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two running moments."""


@register("optimizer", implementation=f"{OPTIMIZERS}:adamw", paper="Loshchilov & Hutter 2019")
class AdamWOptimizer(AdamKeys):
    """AdamW in its fused form (CPU and CUDA)."""

    type: Literal["adamw"] = "adamw"
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""


@register("optimizer", implementation=f"{OPTIMIZERS}:bitsandbytes", paper="Dettmers et al. 2022")
class AdamW8bitOptimizer(AdamKeys):
    """bitsandbytes' AdamW with 8-bit state: a quarter of the optimizer memory."""

    type: Literal["adamw8bit"] = "adamw8bit"


@register("optimizer", implementation=f"{OPTIMIZERS}:bitsandbytes", paper="Dettmers et al. 2023 (QLoRA)")
class PagedAdamW8bitOptimizer(AdamKeys):
    """bitsandbytes' 8-bit AdamW whose state may be paged out to the host's memory."""

    type: Literal["paged_adamw8bit"] = "paged_adamw8bit"


@register("optimizer", implementation=f"{OPTIMIZERS}:bitsandbytes", paper="Chen et al. 2023 (Lion)")
class Lion8bitOptimizer(Optimizer):
    """bitsandbytes' Lion with 8-bit state: one moment in place of two."""

    type: Literal["lion8bit"] = "lion8bit"
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of the update and of the momentum."""


@register("optimizer", implementation=f"{OPTIMIZERS}:from_torch")
class TorchOptimizer(Optimizer):
    """Any optimizer of torch.optim by its class name."""

    type: Literal["torch"] = "torch"
    name: str
    """Class name, such as `NAdam` or `SGD`."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the class."""

    @model_validator(mode="after")
    def _options_are_further(self) -> TorchOptimizer:
        own = {"lr": "learning_rate", "weight_decay": "weight_decay"}
        if taken := [f"options.{key}: write it as optimizer.{own[key]}" for key in self.options if key in own]:
            raise ValueError("\n".join(taken))
        return self


OptimizerSection = union("optimizer")


class Ema(Section):
    """Exponential moving average of the weights, its half-life counted in images (Karras et al. 2022)."""

    half_life: PositiveCount = 2000
    """Images after which a weight's share in the average has halved."""
    warmup_ratio: float = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far."""


class Training(Section):
    """The run: how long, how large, how precise, how often to look, where to write."""

    images: PositiveCount
    """Training images to see in all (repeats counted)."""
    batch_size: PositiveCount = 64
    """Images of one optimizer step, over all processes."""
    micro_batch_size: PositiveCount | None = None
    """Images of one forward pass in one process; gradients accumulate up to `batch_size`. Null: no accumulation."""
    seed: int = Field(0, ge=0)
    """Seed of weights, data order and noise."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision; weights, optimizer and EMA stay float32."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient (null: no clipping)."""
    label_dropout: float = Field(0.0, ge=0, le=1)
    """Share of samples trained without their label, so that classifier-free guidance works."""
    ema: Ema | None = Ema()
    """Averaged weights, which are evaluated and published; null: the raw weights are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile: pays on runs of thousands of steps."""
    channels_last: bool = False
    """Memory format for convolutions: faster on CUDA with bf16, slower on CPU."""
    cpu_threads: PositiveCount | None = None
    """Threads of a CPU run (null: torch's choice). On a busy small machine 1 is the fastest."""
    log_every: PositiveCount = 1000
    """Images between two log lines; the only moments at which the device is waited for."""
    checkpoint_every: PositiveCount | None = None
    """Images between two checkpoints (null: only at the end)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    sample_every: PositiveCount | None = None
    """Images between two sample grids (null: only at the end)."""
    resume: str = "auto"
    """`auto`: go on from the newest usable checkpoint of the output folder; `never`: start afresh; or a checkpoint's
    path."""
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """Experiment trackers beside metrics.jsonl, through accelerate."""
    output: str | None = None
    """Run folder (null: outputs/ and the recipe's name)."""
