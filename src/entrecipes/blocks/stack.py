"""The ordered blocks of a diffusers model: find them, skip them, take them out.

A block is what the residual stream passes through, and what can be missing without anything else noticing: a
transformer block, or where a model pairs two lists (Latte: spatial and temporal) one of each. Skipping replaces what a
block's `forward` returns by what it was given, so that hooks, state-dict keys and weights stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from entrecipes.blocks.layouts import Layout, Streams, config_without, layout_of, pins, streams_of
from entrecipes.errors import UserError


@dataclass(frozen=True)
class Block:
    """One block of a stack."""

    index: int
    """Place in the stack, in the order in which blocks run."""
    paths: tuple[str, ...]
    """Paths of its modules in the model; two where lists are paired."""
    pinned: str = ""
    """Why it can't be removed; empty where it can."""


@dataclass(frozen=True)
class Call:
    """What one module of a block was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class BlockStack:
    """The blocks of one model, as it is now.

    Args:
        model: A diffusers model, or what `torch.compile` made of it. See `layouts.py` for the classes.
        trained: Training goes on before blocks are removed, so that weights which are equal now may not be so then.

    Raises:
        UserError: For a model without a stack of blocks, or one whose blocks can't be missing one by one.
    """

    def __init__(self, model: nn.Module, trained: bool = False) -> None:
        self.model, self._trained = unwrap_module(model), trained
        self._layout = layout_of(self.model)
        pinned = pins(self.model, self._layout, trained)
        paths = _block_paths(self.model, self._layout)
        self.blocks = tuple(
            Block(i, group, next((pinned[path] for path in group if path in pinned), ""))
            for i, group in enumerate(paths)
        )
        self._streams = {path: streams_of(type(self.model.get_submodule(path))) for group in paths for path in group}

    def __len__(self) -> int:
        return len(self.blocks)

    def modules(self, index: int) -> list[nn.Module]:
        """The modules of a block."""
        return [self.model.get_submodule(path) for path in self.blocks[index].paths]

    def check_removable(self, indices: Iterable[int]) -> None:
        """Raises UserError naming the blocks that are pinned or do not exist, and when too few would be left."""
        gone = self._existing(indices)
        for index in sorted(gone):
            if self.blocks[index].pinned:
                raise UserError(f"block {index} can't be removed: {self.blocks[index].pinned}; leave it in")
        if len(gone) == len(self):
            raise UserError(f"all {len(self)} blocks can't be removed; leave one or more in")

    def remove(self, indices: Iterable[int]) -> None:
        """Take blocks out of the model for good: its lists, its config and whatever refers to a block by number.

        The other blocks keep their modules and weights; `blocks` is renumbered. Saved and loaded as usual, the model
        gives the same outputs.

        Raises:
            UserError: As `check_removable`, or when the class can't build what would be left; nothing is changed then.
        """
        indices = set(indices)
        self.__init__(self.model, self._trained)  # weights that were equal may have been trained apart
        self.check_removable(indices)
        gone = {path for index in indices for path in self.blocks[index].paths}
        kept = {
            name: [i for i in range(len(self.model.get_submodule(name))) if f"{name}.{i}" not in gone]
            for name in self._layout.counts
        }
        config = config_without(self.model, self._layout, kept)
        defaults = self.model.config.get("_use_default_values", ())  # from_config reads no key that is named there
        config["_use_default_values"] = [key for key in defaults if key not in config]
        self._check_config(config, kept)
        for name, places in kept.items():
            modules = self.model.get_submodule(name)
            for i in sorted(set(range(len(modules))) - set(places), reverse=True):
                del modules[i]
        self.model.register_to_config(**config)
        if hasattr(self.model, "hf_device_map"):
            self.model.hf_device_map = _renumbered(self.model.hf_device_map, kept)
        self.__init__(self.model, self._trained)

    @contextlib.contextmanager
    def skipped(self, *indices: int, calls: Mapping[str, Call] | None = None) -> Iterator[None]:
        """Within, these blocks pass on what they are given, in the order in which they return it.

        Nothing of it is left behind, and hooks of diffusers (offloading, casts) go on working around the block.
        Compiled models run uncompiled within (all of the process: torch has one stance), so that nothing is compiled
        anew. The model can't be copied within.

        Args:
            indices: Blocks to skip.
            calls: What `recorded` gave for the same inputs: the blocks before the first skipped one then return what
                they returned there, without computing it again, so that skipping each block in turn costs about half.

        Raises:
            UserError: For a block that does not exist.
        """
        skipped = {path for index in self._existing(indices) for path in self.blocks[index].paths}
        forwards: dict[str, Callable[..., Any]] = {path: _passing_on(self._streams[path]) for path in skipped}
        for block in self.blocks[: min(indices)] if calls and indices else ():
            forwards |= {path: _returning(calls[path].output) for path in block.paths if path in calls}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for path, forward in forwards.items():
                stack.enter_context(_replaced(self.model.get_submodule(path), forward))
            yield

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[str, Call]]:
        """Within, every call of a block's module is kept by its path: inputs and output (one forward pass at a time).

        Compiled models run uncompiled within, as in `skipped`.
        """
        calls: dict[str, Call] = {}

        def keep(path: str) -> Callable[..., None]:
            return lambda module, args, kwargs, output: calls.update({path: Call(args, kwargs, output)})

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for path in self._streams:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_hook(keep(path), with_kwargs=True).remove)
            yield calls

    def hidden_states(self, index: int, calls: Mapping[str, Call]) -> tuple[Tensor, Tensor]:
        """The main stream before and after a block, in a recorded pass; both [n, tokens, channels].

        That is the image, video or sequence without the text where a block takes two streams; where it takes both
        joined (Lumina 2, single blocks of Flux 2 and AuraFlow), it is all of them.
        """
        first, *others = (path for path in self.blocks[index].paths if path in calls)
        streams, call = self._streams[first], calls[first]
        before = streams.main(streams.passed_on(call.args, call.kwargs))
        last = others[-1] if others else first
        after = self._streams[last].main(calls[last].output)
        if others:  # Latte's temporal blocks see frames as tokens: [n * tokens, frames, channels]
            frames = after.shape[1]
            after = after.unflatten(0, (before.shape[0] // frames, -1)).transpose(1, 2).reshape(before.shape)
        return before, after

    def _existing(self, indices: Iterable[int]) -> set[int]:
        indices = set(indices)
        for index in sorted(indices):
            if not 0 <= index < len(self):
                raise UserError(f"there is no block {index}: the model has blocks 0 to {len(self) - 1}")
        return indices

    def _check_config(self, config: Mapping[str, Any], kept: Mapping[str, list[int]]) -> None:
        """Raises UserError unless the class builds from the new config just the weights that are left."""
        model = type(self.model)

        def shapes(changed: Mapping[str, Any]) -> dict[str, torch.Size]:
            with torch.random.fork_rng(devices=[]), init_empty_weights():  # a run's own draws go on as they were
                built = model.from_config({**self.model.config, **changed})
            return {key: value.shape for key, value in built.state_dict().items()}

        if _renumbered(shapes({}), kept) != shapes(config):
            raise UserError(
                f"{model.__name__} can't be built with the blocks that would be left, so it could not be loaded again; "
                "remove others"
            )


def _block_paths(model: nn.Module, layout: Layout) -> list[tuple[str, ...]]:
    lists = [[f"{name}.{i}" for i in range(len(model.get_submodule(name)))] for name in layout.counts]
    return list(zip(*lists, strict=True)) if layout.paired else [(path,) for paths in lists for path in paths]


def _renumbered(entries: Mapping[str, Any], kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """Entries by module or weight path, less those of removed blocks, the others under their new numbers."""
    renamed = {}
    for key, value in entries.items():
        name = next((name for name in kept if key.startswith(f"{name}.")), None)
        if name is not None:
            place, dot, rest = key.removeprefix(f"{name}.").partition(".")
            if int(place) not in kept[name]:
                continue
            key = f"{name}.{kept[name].index(int(place))}{dot}{rest}"
        renamed[key] = value
    return renamed


class _StandIn:
    """A block's forward for the time of a context; a copy of the model would keep it for good, and so is refused."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError("a model can't be copied while blocks of it are skipped; copy it before or after")


def _passing_on(streams: Streams) -> Callable[..., Any]:
    return lambda *args, **kwargs: streams.passed_on(args, kwargs)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, a module computes something else; hooks that diffusers put around its forward stay around this one."""
    chain = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    holder, name = (chain[0], "forward") if chain else (module, "forward")
    if chain and chain[0].original_forward is not None:
        name = "original_forward"
    before = vars(holder).get(name)
    setattr(holder, name, _StandIn(forward))
    try:
        yield
    finally:
        if before is None:
            delattr(holder, name)
        else:
            setattr(holder, name, before)
