"""The ordered blocks of a diffusers model: find them, skip them, take them out.

A block is what the residual stream passes through, and what can be missing without anything else noticing: a transformer
block, or where a model pairs two lists (Latte: spatial and temporal) one of each. Skipping replaces what a block's `forward`
returns by what it was given, so that hooks, state-dict keys and weights stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from entrecipes.errors import UserError

LISTS = {"DiTTransformer2DModel": (("transformer_blocks", "num_layers"),)}
"""The module lists of each class in the order in which they run, and the config key that counts each."""


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
    """The blocks of one model, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        """Raises UserError for a model without a stack of blocks."""
        if type(model).__name__ not in LISTS:
            raise UserError(f"{type(model).__name__} has no stack of blocks; supported: {', '.join(LISTS)}")
        self.model = model
        (name, _), *_ = LISTS[type(model).__name__]
        self.blocks = tuple(
            Block(i, (f"{name}.{i}",), "the head reads its embedder" if i == 0 else "")
            for i in range(len(model.get_submodule(name)))
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def modules(self, index: int) -> list[nn.Module]:
        """The modules of a block."""
        return [self.model.get_submodule(path) for path in self.blocks[index].paths]

    def check_removable(self, indices: Iterable[int]) -> None:
        """Raises UserError naming the blocks that are pinned or do not exist, and when too few would be left."""
        for index in indices:
            if not 0 <= index < len(self):
                raise UserError(f"there is no block {index}: the model has blocks 0 to {len(self) - 1}")
            if self.blocks[index].pinned:
                raise UserError(f"block {index} can't be removed: {self.blocks[index].pinned}")

    def remove(self, indices: Iterable[int]) -> None:
        """Take blocks out of the model for good: its lists, its config and whatever refers to a block by number.

        The other blocks keep their modules and weights; `blocks` is renumbered. Saved and loaded as usual, the model gives
        the same outputs. Raises UserError as `check_removable`.
        """
        gone = set(indices)
        self.check_removable(gone)
        for name, count in LISTS[type(self.model).__name__]:
            kept = [block for i, block in enumerate(self.model.get_submodule(name)) if i not in gone]
            setattr(self.model, name, nn.ModuleList(kept))
            self.model.register_to_config(**{count: len(kept)})
        self.__init__(self.model)

    @contextlib.contextmanager
    def skipped(self, *indices: int, calls: Mapping[str, Call] | None = None) -> Iterator[None]:
        """Within, these blocks pass on what they are given.

        Args:
            indices: Blocks to skip.
            calls: What `recorded` gave for the same inputs: the blocks before the first skipped one then return what they
                returned there, without computing it again, so that skipping each block in turn costs about half.
        """
        skipped = {path for index in indices for path in self.blocks[index].paths}
        replaced: dict[str, Callable[..., Any]] = {path: self._identity(path) for path in skipped}
        for block in self.blocks[: min(indices)] if calls is not None else ():
            for path in block.paths:
                replaced[path] = lambda *args, _output=calls[path].output, **kwargs: _output
        with self._replaced(replaced):
            yield

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[str, Call]]:
        """Within, every call of a block's module is kept by its path: inputs and output (one forward pass at a time)."""
        calls: dict[str, Call] = {}
        handles = []
        for block in self.blocks:
            for path in block.paths:

                def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                    calls[path] = Call(args, kwargs, output)

                handles.append(self.model.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def hidden_states(self, index: int, calls: Mapping[str, Call]) -> tuple[Tensor, Tensor]:
        """The main stream before and after a block, in a recorded pass."""
        paths = self.blocks[index].paths
        before, after = calls[paths[0]], calls[paths[-1]]
        return before.args[0] if before.args else before.kwargs["hidden_states"], after.output

    def _identity(self, path: str) -> Callable[..., Any]:
        """What stands in for a module's forward: returns its streams as they came."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        return forward

    @contextlib.contextmanager
    def _replaced(self, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        modules = {path: self.model.get_submodule(path) for path in forwards}
        try:
            for path, module in modules.items():
                module.forward = forwards[path]
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)
