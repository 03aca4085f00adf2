"""`blocks.adapter:` which weights may be trained at all: all of the model's, a few of them, or new ones beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from entrecipes.recipe.base import Section, register, union

Quantise = Literal["nf4", "int8"]
"""How frozen weights are held: 4 bits (NF4, by bitsandbytes; Dettmers et al. 2023), or 8 with a scale for each row."""


def _was_boolean(value: Any) -> Any:
    return {True: "nf4", False: None}[value] if isinstance(value, bool) else value


Quantised = Annotated[Quantise | None, BeforeValidator(_was_boolean)]
"""The same where null is full precision; `true` once meant nf4."""


@register("adapter", implementation="entrecipes.blocks.adapters:NoAdapter")
class NoAdapterSection(Section):
    """Train the model's own weights, every one that `blocks:` opens."""

    type: Literal["none"] = "none"


class LoraKeys(Section):
    """A low-rank update B A, times alpha / rank, of each chosen linear layer of a frozen base."""

    rank: int = Field(8, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null: alpha = rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of A that are dropped in training."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Patterns over names of linear or convolution layers (`*` matches anything), such as `*.to_q`; null: the linear
    layers of attention and feed-forward in all blocks."""
    merge: bool = False
    """Publish an ordinary pipeline with the update added to the weights, in place of the adapter alone."""


@register("adapter", implementation="entrecipes.blocks.adapters:Lora", paper="Hu et al. 2021 (arXiv 2106.09685)")
class LoraSection(LoraKeys):
    """LoRA: train low-rank updates beside a frozen base."""

    type: Literal["lora"] = "lora"


@register("adapter", implementation="entrecipes.blocks.adapters:Lora", paper="Dettmers et al. 2023 (arXiv 2305.14314)")
class QLoraSection(LoraKeys):
    """QLoRA: LoRA on a base whose blocks hold their linear layers in 4 bits (or 8)."""

    type: Literal["qlora"] = "qlora"
    quantise: Quantise = "nf4"
    """4 bits (nf4, by bitsandbytes) or 8 (int8, twice the memory and a tenth of the rounding)."""


@register("adapter", implementation="entrecipes.blocks.difffit:BitFit", paper="Zaken et al. 2022 (arXiv 2106.10199)")
class BitFitSection(Section):
    """BitFit: train the biases alone."""

    type: Literal["bitfit"] = "bitfit"


@register("adapter", implementation="entrecipes.blocks.difffit:DiffFit", paper="Xie et al. 2023 (arXiv 2304.06648)")
class DiffFitSection(Section):
    """DiffFit: train biases, gains of norms, condition embeddings, and a new scale after attention and feed-forward."""

    type: Literal["difffit"] = "difffit"
    embeddings: tuple[str, ...] | None = None
    """Patterns over names of weights that embed the condition; null: the embeddings of classes, captions and condition
    images that diffusers' models have, and the input layer where a condition is concatenated to the noisy sample."""


@register("adapter", implementation="entrecipes.blocks.side_adapters:SideAdapter", paper="SimDA (arXiv 2308.09710)")
class SimDASection(Section):
    """SimDA: small spatial, feed-forward and temporal bottlenecks beside a frozen video model's layers."""

    type: Literal["simda"] = "simda"
    spatial: float = Field(0.25, gt=0, le=1)
    """Width of the bottlenecks beside attention and feed-forward, as a share of the layer's."""
    temporal: float = Field(0.5, gt=0, le=1)
    """Width of the temporal bottlenecks after the residual blocks, as a share of theirs."""
    shift: int = Field(0, ge=0)
    """Latent-shift attention: keys and values come from up to so many frames away, by position; 0 is off."""
    quantise: Quantised = None
    """Hold the linear layers in the blocks of the frozen base in 4 bits (nf4, by bitsandbytes) or 8 (int8)."""


@register(
    "adapter", implementation="entrecipes.blocks.side_adapters:SideAdapter", paper="I2V-Adapter (arXiv 2312.16693)"
)
class I2VAdapterSection(Section):
    """I2V-Adapter: queries of all frames attend to the given frame beside a frozen video model's spatial attention."""

    type: Literal["i2v_adapter"] = "i2v_adapter"
    blocks: Literal["all", "up"] = "all"
    """Which spatial attentions get a branch: all, or those on the way up alone (RDTF's own baseline)."""
    quantise: Quantised = None
    """Hold the linear layers in the blocks of the frozen base in 4 bits (nf4, by bitsandbytes) or 8 (int8)."""


AdapterSection = union("adapter")
