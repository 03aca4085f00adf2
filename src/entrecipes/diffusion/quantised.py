"""Linear layers whose frozen weights are held in 4 or 8 bits: made, computed with, and turned back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn import functional

from entrecipes.errors import UserError


class Int8Linear(nn.Linear):
    """A frozen linear layer with one byte a weight and a scale for each row (the weights of LLM.int8, Dettmers 2022).

    Inputs are not quantised, so that a layer gives the same in training and in evaluation; bitsandbytes' own
    `Linear8bitLt` rounds them to int8 in evaluation (on CUDA always), and computes in float16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Args: `linear` gives its weights, rounded, and its bias as it is."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().cpu().float()
        scale = weight.abs().amax(dim=1) / 127
        rows = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rows.to(linear.weight.device), requires_grad=False)
        self.register_buffer("scale", scale.to(linear.weight.device))
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        product = _Int8Product.apply(input, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T, keeping for the backward pass neither x nor the expanded W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        return functional.linear(x, (rows * scale[:, None]).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        rows, scale = ctx.saved_tensors
        return gradient @ (rows * scale[:, None]).to(gradient.dtype), None, None


class RehearsedNf4(nn.Linear):
    """Holds as many bytes as a layer in 4 bits does, where tensors have shapes alone; bitsandbytes knows no such."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        count = linear.weight.numel()
        bits = torch.empty(count // 2 + count // 64, 1, dtype=torch.uint8)  # and a byte of scale for each 64
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        product = _RehearsedProduct.apply(input, self.weight, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _RehearsedProduct(torch.autograd.Function):
    """As bitsandbytes' product: the expanded weights are there for the moment of each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.shape = (out, x.shape[-1])
        return functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


def quantise(model: nn.Module, names: Iterable[str], how: str = "nf4", place: str = "blocks.adapter") -> None:
    """Hold the weights of these linear layers in 4 bits (NF4, with quantised statistics; Dettmers et al. 2023) or 8.

    The bits are computed on the CPU, so that they are the same wherever the model is.

    Args:
        names: Paths of the layers.
        how: `nf4` or `int8`.
        place: Of the recipe, for the message.

    Raises:
        UserError: When bitsandbytes, which holds the 4 bits, can't be used here.
    """
    for name in names:
        model.set_submodule(name, quantised(model.get_submodule(name), how, place))


def quantised(linear: nn.Linear, how: str, place: str) -> nn.Linear:
    """A layer with the weights of `linear`, rounded, on its device. Raises UserError as `quantise`."""
    if how == "int8":
        return Int8Linear(linear).train(linear.training)
    if detect_fake_mode():
        return RehearsedNf4(linear)
    try:
        import bitsandbytes

        return _nf4(bitsandbytes, linear)
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{place}: bitsandbytes can't hold weights in 4 bits here ({str(error).strip().splitlines()[0]}); "
            "update it, take quantise: int8, or leave the weights in full precision"
        ) from error


def _nf4(bitsandbytes: Any, linear: nn.Linear) -> nn.Linear:
    weight = linear.weight.detach()
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        # the first input would set it otherwise, differently after a resume; autocast still lowers the product
        compute_dtype=torch.float32,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to("cpu")
    layer.bias = linear.bias
    # in eval mode it would repack the weights for bf16 in place, and training would go on with others
    layer.support_avx512bf16_for_cpu = False
    return layer.to(weight.device).train(linear.training)


def is_quantised(layer: nn.Module) -> bool:
    """Whether it is a layer that `quantise` made."""
    return isinstance(layer, Int8Linear) or type(layer).__name__ == "Linear4bit"


def expanded(layer: nn.Module) -> list[Tensor]:
    """The parameters of one layer (not of those inside it) as they are computed with, quantised ones expanded."""
    if not is_quantised(layer):
        return list(layer.parameters(recurse=False))
    return [_weight(layer), *([] if layer.bias is None else [layer.bias])]


def full_precision(layer: nn.Linear) -> nn.Linear:
    """An ordinary layer of a quantised one's outputs."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(_weight(layer), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _weight(layer: nn.Linear) -> Tensor:
    if isinstance(layer, Int8Linear):
        return layer.weight * layer.scale[:, None]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def size(parameter: nn.Parameter) -> int:
    """Weights in a parameter, two to a byte where it is held in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
