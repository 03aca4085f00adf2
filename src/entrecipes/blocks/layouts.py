"""Where each diffusers class keeps its blocks, how its config counts them, and what a block returns.

A class with a single list of blocks counted by `num_layers` needs no row here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entrecipes.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The lists of blocks of one model.

    Args:
        counts: Path of each list, in the order in which the lists run, and the config key that counts it (empty for a
            UNet, whose depths share two nested keys).
        paired: Whether the lists run in turns: a block is one module of each, and one key counts all.
        indexed: Config keys that hold places in the only list.
    """

    counts: Mapping[str, str]
    paired: bool = False
    indexed: tuple[str, ...] = ()


SINGLE = {"transformer_blocks": "num_layers"}
DOUBLE = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
LAYOUTS = {
    "SD3Transformer2DModel": Layout(SINGLE, indexed=("dual_attention_layers",)),
    "LatteTransformer3DModel": Layout(
        {"transformer_blocks": "num_layers", "temporal_transformer_blocks": "num_layers"}, paired=True
    ),
    "FluxTransformer2DModel": Layout(DOUBLE),
    "Flux2Transformer2DModel": Layout(DOUBLE),
    "BriaTransformer2DModel": Layout(DOUBLE),
    "LongCatImageTransformer2DModel": Layout(DOUBLE),
    "OvisImageTransformer2DModel": Layout(DOUBLE),
    "HunyuanVideoTransformer3DModel": Layout(DOUBLE),
    "AuraFlowTransformer2DModel": Layout(
        {"joint_transformer_blocks": "num_mmdit_layers", "single_transformer_blocks": "num_single_dit_layers"}
    ),
    "Lumina2Transformer2DModel": Layout({"layers": "num_layers"}),
    "PRXTransformer2DModel": Layout({"blocks": "depth"}),
}
REFUSED = {
    "ChromaTransformer2DModel": "one network makes the modulation of all its blocks, by their numbers",
    "HunyuanDiT2DModel": "its second half reads the outputs of its first half, each block of one block",
    "SanaWMTransformer3DModel": "its first two blocks attend without the mask of the others, by number",
    "WanVACETransformer3DModel": "its control blocks belong to blocks by number",
    "WanAnimateTransformer3DModel": "its face adapter follows every few blocks by number",
    "WanAnimate2Transformer3DModel": "it tells blocks apart by number",
    "UNet2DModel": "it has no transformer blocks",
}
SUPPORTED = (
    f"UNet2DConditionModel, {', '.join(sorted(LAYOUTS))}, and classes with one list of equal blocks counted by "
    "num_layers (DiT, PixArt, Sana, CogVideoX, Wan, LTX, Mochi, ...)"
)
UNET_LISTS = re.compile(r"((down_blocks|up_blocks)\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks")


def layout_of(model: nn.Module) -> Layout:
    """Find the lists of blocks of a diffusers model.

    Raises:
        UserError: For a model whose blocks can't be told, or can't be missing one by one: why, and what is supported.
    """
    name = type(model).__name__
    if name in LAYOUTS:
        return LAYOUTS[name]
    if name == "UNet2DConditionModel":
        paths = [path for path, _ in model.named_modules() if UNET_LISTS.fullmatch(path)]
        paths.sort(key=lambda path: path.split(".")[0])  # down_blocks, mid_block, up_blocks: as they run
        if not paths:
            raise UserError(f"{name}: this one has no transformer blocks; give one with cross-attention blocks")
        return Layout(dict.fromkeys(paths, ""))
    reason = REFUSED.get(name) or _why_not_single(model)
    if reason:
        raise UserError(f"{name} can't be pruned by blocks: {reason}; supported: {SUPPORTED}")
    return Layout({path: "num_layers" for path, child in model.named_children() if isinstance(child, nn.ModuleList)})


def _why_not_single(model: nn.Module) -> str:
    """Empty for a model with one list of blocks of one class, counted by num_layers, and nothing that numbers them."""
    if not isinstance(getattr(model, "config", None), Mapping):
        return "it has no config as diffusers models have"
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        return f"it has {len(lists)} lists of modules, and how they run together is not known"
    if len({type(block) for block in lists[0]}) != 1 or model.config.get("num_layers") != len(lists[0]):
        return "its list of modules is not one of equal blocks that num_layers counts"
    numbering = [
        k for k, v in model.config.items() if re.search("layer|block", k) and isinstance(v, (list, tuple)) and v
    ]
    return f"its config has {numbering[0]}, which may number blocks" if numbering else ""


def pins(model: nn.Module, layout: Layout, trained: bool = False) -> dict[str, str]:
    """Paths of the modules that can't be removed, now or after more training, each with the reason."""
    pinned = {}
    for path in layout.counts:
        for i, block in enumerate(model.get_submodule(path)):
            if getattr(block, "context_pre_only", False):
                pinned[f"{path}.{i}"] = "the class builds its last block without an output for the text"
    if type(model).__name__ == "DiTTransformer2DModel" and (trained or not _same_embedders(model.transformer_blocks)):
        others = "training sets those of the blocks apart" if trained else "not all blocks have the same"
        pinned["transformer_blocks.0"] = f"the head reads its embedder (norm1.emb), and {others}"
    if type(model).__name__ == "LatteTransformer3DModel":
        pinned["transformer_blocks.0"] = "the positions of frames are added between its two modules"
    if type(model).__name__ == "UNet2DConditionModel":
        pinned |= _unet_pins(model, layout)
    return pinned


def _same_embedders(blocks: nn.ModuleList) -> bool:
    """Whether the embedders of a DiT's blocks equal the first's bit for bit, so that the head may read any."""
    first, *others = (block.norm1.emb.state_dict() for block in blocks)
    return all(torch.equal(first[key], other[key]) for other in others for key in first)


def _unet_pins(model: nn.Module, layout: Layout) -> dict[str, str]:
    """A UNet's config has no depth of its own for the middle block: it takes that of the last down block."""
    last = f"down_blocks.{len(model.down_blocks) - 1}.attentions.0.transformer_blocks"
    middle = "mid_block.attentions.0.transformer_blocks"
    if not {last, middle} <= set(layout.counts):
        return {}
    reason = f"the config has one depth for {last.rpartition('.')[0]} and the middle block"
    return {f"{path}.{i}": reason for path in (last, middle) for i in range(len(model.get_submodule(path)))}


def config_without(model: nn.Module, layout: Layout, kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """The config entries that change when only these places of each list are kept."""
    if type(model).__name__ == "UNet2DConditionModel":
        return _unet_depths(model, {path: len(places) for path, places in kept.items()})
    entries: dict[str, Any] = {key: len(kept[path]) for path, key in layout.counts.items()}
    for key in layout.indexed:
        (places,) = kept.values()
        entries[key] = [new for new, old in enumerate(places) if old in model.config[key]]
    return entries


def _unet_depths(model: nn.Module, counts: Mapping[str, int]) -> dict[str, Any]:
    """Nested depths, one list a down or up block. A block without attentions ignores its entry."""

    def depths(block: nn.Module, path: str) -> list[int]:
        attentions = range(len(getattr(block, "attentions", ())))
        return [counts[name] for j in attentions if (name := f"{path}.attentions.{j}.transformer_blocks") in counts]

    down = [depths(block, f"down_blocks.{i}") for i, block in enumerate(model.down_blocks)]
    up = [depths(block, f"up_blocks.{i}") for i, block in enumerate(model.up_blocks)]
    down[-1] = down[-1] or depths(model.mid_block, "mid_block")
    return {
        "transformer_layers_per_block": [entry or 1 for entry in down],
        "reverse_transformer_layers_per_block": [entry or 1 for entry in up],
    }


RETURNS: dict[str, str | tuple[str, ...]] = {
    "CosmosTransformerBlock": "hidden_states",
    "ErnieImageSharedAdaLNBlock": "x",
    "Flux2SingleTransformerBlock": "hidden_states",
}
"""Which arguments a block returns in new versions, where its source names others or several."""


@dataclass(frozen=True)
class Streams:
    """The residual streams of a class of blocks: the arguments of `forward` whose new versions it returns.

    Args:
        names: The arguments, in the order of the outputs.
        positions: Their places among the positional arguments.
        bare: Whether it returns the only one as it is, not in a tuple.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    bare: bool

    def passed_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a block that does nothing returns."""
        places = zip(self.names, self.positions, strict=True)
        given = tuple(kwargs[name] if name in kwargs else args[i] if i < len(args) else None for name, i in places)
        return given[0] if self.bare else given

    def main(self, output: Any) -> Tensor:
        """The image (or video, or sequence) among what a block returns: `hidden_states`, else the first."""
        if self.bare:
            return output
        return output[self.names.index("hidden_states") if "hidden_states" in self.names else 0]


@functools.cache
def streams_of(block: type[nn.Module]) -> Streams:
    """Learn a block's streams from the names in its source's return statements.

    By diffusers' convention a block returns its streams under the names of the arguments that they came in by; their
    order differs from class to class (MMDiT blocks return the text first), and shapes can't tell where text and image
    are of equal length. diffusers' own TransformerBlockRegistry knows fewer classes.

    Raises:
        UserError: For a class whose source is missing, or returns something else.
    """
    parameters = list(inspect.signature(block.forward).parameters)[1:]
    returned = RETURNS.get(block.__name__) or _returned_names(block)
    names = (returned,) if isinstance(returned, str) else returned
    if not names or not set(names) <= set(parameters):
        raise UserError(
            f"{block.__name__}: can't tell from its source which of its inputs it passes on; it can't be skipped"
        )
    return Streams(names, tuple(parameters.index(name) for name in names), bare=isinstance(returned, str))


def _returned_names(block: type[nn.Module]) -> str | tuple[str, ...]:
    """What all return statements of `forward` name, or nothing when they differ or return an expression."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(block.forward))))
    except OSError:
        return ()
    values = {ast.unparse(node.value or ast.Tuple([])) for node in ast.walk(tree) if isinstance(node, ast.Return)}
    found = re.fullmatch(r"(\w+)|\(([\w, ]+)\)", values.pop()) if len(values) == 1 else None
    if not found:
        return ()
    return found[1] or tuple(re.findall(r"\w+", found[2]))
