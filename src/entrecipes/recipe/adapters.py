"""`blocks.adapter:` which weights may be trained at all: all of the model's, a few of them, or new ones beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entrecipes.recipe.base import Section, register, union


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


@register("adapter", implementation="entrecipes.blocks.adapters:QLora", paper="Dettmers et al. 2023 (arXiv 2305.14314)")
class QLoraSection(LoraKeys):
    """QLoRA: LoRA on a base whose blocks hold their linear layers in 4 bits (NF4, by bitsandbytes)."""

    type: Literal["qlora"] = "qlora"


@register("adapter", implementation="entrecipes.blocks.adapters:BitFit", paper="Zaken et al. 2022 (arXiv 2106.10199)")
class BitFitSection(Section):
    """BitFit: train the biases alone."""

    type: Literal["bitfit"] = "bitfit"


@register("adapter", implementation="entrecipes.blocks.adapters:DiffFit", paper="Xie et al. 2023 (arXiv 2304.06648)")
class DiffFitSection(Section):
    """DiffFit: train biases, gains of norms, condition embeddings, and a new scale after attention and feed-forward."""

    type: Literal["difffit"] = "difffit"
    embeddings: tuple[str, ...] | None = None
    """Patterns over names of weights that embed the condition; null: the embeddings of classes, captions and condition
    images that diffusers' models have, and the input layer where a condition is concatenated to the noisy sample."""


AdapterSection = union("adapter")
