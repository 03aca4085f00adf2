"""I2V-Adapter: attention to a given frame beside a frozen model. It travels beside weights with `side_adapters.py`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from .side_adapters import BesideBase, compare, key_of, some, spatial_blocks, zeroed


@dataclass
class Seen:
    """What the branches of an I2V-Adapter know of the clips in the present forward pass."""

    alone: bool = False
    """Whether these are the given frames alone."""
    given: Tensor | None = None
    """bool [n, 1, 1]: whether the clip has a given frame; None: none has."""


class Branch(nn.Module):
    """Attention of all frames to the given one, with its own queries and output; the output is zero at first.

    Args:
        width: Channels of input and output.
        inner: Channels of queries, keys and values.
        heads: Of the attention.
        bias: Whether the queries have one.
    """

    def __init__(self, width: int, inner: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, inner, bias=bias), zeroed(nn.Linear(inner, width))
        self.heads, self.seen = heads, Seen()
        self.key = self.value = torch.empty(0)

    def beside(self, attention: Attention, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a hook: added to the self-attention [n * F, tokens, width]; of given frames alone, keep K and V."""
        if self.seen.alone:
            self.key, self.value = (self._split(layer(args[0])) for layer in (attention.to_k, attention.to_v))
            return output
        if self.seen.given is None:
            return output
        query = self.to_q(args[0]).unflatten(0, (len(self.key), -1)).flatten(1, 2)  # [n, F * tokens, inner]
        found = functional.scaled_dot_product_attention(self._split(query), self.key, self.value)
        added = self.to_out(found.transpose(1, 2).flatten(2)) * self.seen.given
        return output + added.view(output.shape)

    def _split(self, tokens: Tensor) -> Tensor:
        """[n, tokens, inner] to [n, heads, tokens, inner / heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class I2VAdapter(BesideBase):
    """I2V-Adapter (Guo et al. 2023, arXiv 2312.16693): attention of all frames to a given one, beside a frozen model.

    In each spatial self-attention a second branch, of new queries (the base's at first) and a new output layer (zero at
    first), attends to the base's own keys and values of the first given frame, un-noised; its output is added. Which
    frame that is, is read from the base's `condition`: the first that is not zero everywhere. A clip without one stays
    as the base makes it, as does everything at first, bit for bit.

    Published, the given frame stands un-noised among the noisy ones, which changes the base's output at once. Here it
    passes through the base beside them, as a clip of one frame at their timestep, without this adapter and without
    gradient: 1 / F of a forward pass more. The frame similarity prior, the paper's start of sampling, is left out.

    Args:
        attentions: What `Branch` is made of, by the path of the spatial transformer block in the base.
    """

    @register_to_config
    def __init__(self, attentions: dict[str, dict[str, int]]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({key_of(path): Branch(**sizes) for path, sizes in attentions.items()})

    @classmethod
    def of(cls, model: nn.Module, blocks: str = "all") -> Self:
        """A fresh one for a base, not on it yet; `blocks` is `all`, or `up` for those on the way up alone.

        Raises:
            ValueError: For a model without spatial blocks there.
        """
        sizes = {path: size for path, size in _branches(model).items() if blocks == "all" or path.startswith("up")}
        adapter = cls(some(sizes, model))
        for path in sizes:
            queries = model.get_submodule(path).attn1.to_q
            adapter.branches[key_of(path)].to_q.load_state_dict(queries.state_dict())
        return adapter

    def _check(self, model: nn.Module) -> None:
        if "condition" not in inspect.signature(type(model).forward).parameters:
            raise ValueError(f"{type(model).__name__} takes no `condition`, in which the given frames would be")
        compare(self.config.attentions, _branches(model))

    def _hooks(self, model: nn.Module) -> list[Any]:
        self._seen = Seen()
        for branch in self.branches.values():
            branch.seen = self._seen
        return [
            model.get_submodule(path).attn1.register_forward_hook(self.branches[key_of(path)].beside)
            for path in self.config.attentions
        ]

    def _see(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        condition = inputs.get("condition")
        self._seen.given = None
        if condition is None:
            return
        given = condition.abs().amax(dim=(1, 3, 4)) > 0  # [n, F]
        first = given.int().argmax(1)  # the first of the largest
        frame = condition[torch.arange(len(given), device=first.device), :, first].unsqueeze(2)
        self._seen.alone = True
        try:
            with torch.no_grad():  # not called as a module: this hook would run again
                model.forward(**dict(inputs) | {"sample": frame.to(inputs["sample"]), "condition": frame})
        finally:
            self._seen.alone = False
        self._seen.given = given.any(1)[:, None, None]


def _branches(model: nn.Module) -> dict[str, dict[str, int]]:
    attentions = {path: block.attn1 for path, block in spatial_blocks(model).items()}
    return {
        path: {
            "width": attention.to_q.in_features,
            "inner": attention.to_q.out_features,
            "heads": attention.heads,
            "bias": attention.to_q.bias is not None,
        }
        for path, attention in attentions.items()
    }
