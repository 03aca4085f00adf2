"""A few of a model's own weights, or scales on them, as all that may be trained: BitFit and DiffFit."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from entrecipes.blocks.adapters import NoAdapter, match_names, parts
from entrecipes.patterns import matches

EMBEDDINGS = (
    "*class_embed*",
    "*label_emb*",
    "*caption_projection*",
    "*text_embedder*",
    "*context_embedder*",
    "*image_embedder*",
    "*add_embedding*",
)
"""Weights of diffusers' models that embed classes, captions and condition images."""
INPUT_LAYERS = ("patch_embedding.*", "patch_embed.*", "pos_embed.proj.*", "conv_in.*", "x_embedder.*", "proj_in.*")


class BitFit(NoAdapter):
    """Trains the biases (Zaken et al. 2022)."""

    def eligible(self, name: str) -> bool:
        return _is_bias(name)


class Scale(nn.Module):
    """A factor on a weight, one at first."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class DiffFit(NoAdapter):
    """Trains biases, gains of norms, condition embeddings, and scales of attention and feed-forward (Xie et al. 2023).

    A scale is a parametrization of the output layer's weight and bias (one factor for both, so that it scales the
    output), and so merges away without a rounding of its own.
    """

    def prepare(self, model: nn.Module, seed: int) -> None:
        self.embeddings = self.section.embeddings
        if self.embeddings is None:
            self.embeddings = EMBEDDINGS + (INPUT_LAYERS if _concatenates(model) else ())
        else:
            match_names(self.embeddings, [name for name, _ in model.named_parameters()], "blocks.adapter.embeddings")
        self.gains = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 1
        }
        outputs = {_output(part) for part in parts(model)}
        for layer in filter(None, outputs):
            scale = Scale(layer.weight.device)
            for name in ("weight", "bias"):
                if getattr(layer, name) is not None:
                    parametrize.register_parametrization(layer, name, scale)

    def eligible(self, name: str) -> bool:
        return (
            _is_bias(name)
            or name in self.gains
            or re.search(r"\.parametrizations\..*\.scale$", name) is not None
            or matches(name, self.embeddings)
        )

    def merged(self, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for name, layer in list(model.named_modules()):
            if parametrize.is_parametrized(layer):
                # remove_parametrizations would change the layer's class, which copies of the model have in common
                model.set_submodule(name, _unparametrized(layer))
        return model


def _unparametrized(layer: nn.Linear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        plain.register_parameter(name, None if value is None else nn.Parameter(value.detach(), requires_grad=False))
    return plain.train(layer.training)


def _is_bias(name: str) -> bool:
    return name.endswith((".bias", ".parametrizations.bias.original"))


def _concatenates(model: nn.Module) -> bool:
    """Whether a condition enters with the noisy sample, as channels that do not come out again."""
    config = model.config
    return (config.get("in_channels") or 0) > (config.get("out_channels") or config.get("in_channels") or 0)


def _output(part: nn.Module) -> nn.Linear | None:
    """The linear layer that an attention or feed-forward module ends with; None: it has none."""
    layers = [module for module in getattr(part, "to_out", part).modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None
