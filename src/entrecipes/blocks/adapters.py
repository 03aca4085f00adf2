"""Which weights may be trained: what all choices have in common, and the plain one; new ones beside a base (LoRA)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from entrecipes.blocks.stack import BlockStack
from entrecipes.diffusion import lora, side
from entrecipes.diffusion.adapter_folder import Base, base_fingerprint
from entrecipes.diffusion.quantised import quantise
from entrecipes.errors import UserError
from entrecipes.patterns import matches
from entrecipes.recipe.base import Section

PARTS = re.compile(r"Attention|Attn|FeedForward|FFN|M(lp|LP)")
"""Class names of attention and feed-forward modules in diffusers."""


class NoAdapter:
    """Trains the model's own weights; what every choice has in common.

    A model that carries an adapter already is merged first.

    Raises:
        UserError: For a model without what the choice trains, a pattern that matches nothing, or a base that carries an
            adapter itself where the new one is to be published alone.
    """

    own_weights = False
    """Whether what is trained lies beside a frozen base: checkpoints then hold it alone."""

    def __init__(self, section: Section, model: nn.Module, seed: int = 0) -> None:
        """Args: `section` is a choice of the wing; `seed` that of new weights."""
        self.section = section
        if side.carries_side_adapter(model):
            raise UserError(
                "blocks.adapter: the base carries an adapter that can't be merged into it; give the one that it lies "
                "on as pipeline.pretrained"
            )
        if self.published_alone and lora.carries_adapter(model):
            raise UserError(
                "blocks.adapter: the base carries an adapter itself, so that a second one alone would not do; set "
                "blocks.adapter.merge=true, here or in the run that made the first"
            )
        lora.merge(model)
        self.prepare(model, seed)
        names = [name for name, _ in model.named_parameters()]
        if not any(map(self.eligible, names)):
            raise UserError(f"blocks.adapter: {type(model).__name__} has nothing that {section.type} would train")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.eligible(name))

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Change the model; its outputs stay as they are (with `quantise`, up to the bits)."""

    def eligible(self, name: str) -> bool:
        """Whether the parameter of this name may be trained."""
        return True

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold of the trained or the averaged model."""
        return model.state_dict()

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises RuntimeError when it does not fit."""
        model.load_state_dict(state)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must hold of the base; JSON values."""
        return {}

    def check_continues(self, identity: dict[str, Any], path: Path) -> None:
        """Raises UserError unless the checkpoint at `path`, with this `identity`, was trained on this base."""

    def merged(self, model: nn.Module) -> nn.Module:
        """An ordinary model of the same outputs, which saves and loads as usual."""
        return model

    @property
    def published_alone(self) -> bool:
        """Whether a run publishes the adapter alone (`publish`), in place of a pipeline."""
        return False


class Beside(NoAdapter):
    """What all choices that train new weights beside a frozen base have in common."""

    own_weights = True

    def prepare(self, model: nn.Module, seed: int) -> None:
        self.base = base_fingerprint(model)
        self.quantised: tuple[str, ...] = ()
        self.how: str | None = getattr(self.section, "quantise", None)

    def quantise(self, model: nn.Module) -> None:
        """Hold the linear layers of all blocks in fewer bits, where the section says so (`quantise: nf4` or `int8`)."""
        if self.how:
            self.quantised = tuple(linear_layers(model))
            quantise(model, self.quantised, self.how)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in model.state_dict().items() if self.eligible(name)}

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        keys = self.state_dict(model).keys()
        if keys != state.keys():
            raise RuntimeError(f"it holds another adapter: {sorted(keys ^ state.keys())[0]} is on one side only")
        model.load_state_dict(state, strict=False)

    def identity(self) -> dict[str, Any]:
        return {"base": self.base}

    def check_continues(self, identity: dict[str, Any], path: Path) -> None:
        if identity.get("base") != self.base:
            raise UserError(
                f"{path}: its adapter was trained on another base than pipeline.pretrained holds now; put that base "
                "back, or start afresh with training.resume=never"
            )

    def publish(self, model: nn.Module, folder: Path, pretrained: str, revision: str | None, place: Path) -> None:
        """Write the adapter of a model into `folder`, which is going to be at `place`, for the base of those names."""
        base = Base.of(pretrained, revision, place, fingerprint=self.base, quantised=self.quantised, quantise=self.how)
        self.save(model, folder, base)

    def save(self, model: nn.Module, folder: Path, base: Base) -> None:
        """Write the adapter of a model, and what it belongs to."""
        raise NotImplementedError


class Lora(Beside):
    """Trains low-rank updates beside a frozen base (Hu et al. 2021), which may be quantised (Dettmers et al. 2023)."""

    def prepare(self, model: nn.Module, seed: int) -> None:
        from peft import LoraConfig

        super().prepare(model, seed)
        targets = _targets(model, self.section.targets)
        self.quantise(model)
        rank = self.section.rank
        config = LoraConfig(
            r=rank,
            lora_alpha=self.section.alpha or rank,
            lora_dropout=self.section.dropout,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora.add_lora(model, config)

    def eligible(self, name: str) -> bool:
        return lora.is_lora(name)

    def merged(self, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        lora.merge(model)
        return model

    @property
    def published_alone(self) -> bool:
        return not self.section.merge

    def save(self, model: nn.Module, folder: Path, base: Base) -> None:
        lora.save_adapter(model, folder, base)


def _blocks(model: nn.Module, place: str = "blocks.adapter") -> list[tuple[str, nn.Module]]:
    """The blocks of a model by path; where they are no stack, as in video UNets, its transformer blocks."""
    try:
        stack = BlockStack(model)
    except UserError as error:
        found = [(path, block) for path, block in model.named_modules() if isinstance(block, BasicTransformerBlock)]
        if not found:
            raise UserError(f"{place}: {error}") from error
        return found
    return [(path, model.get_submodule(path)) for block in stack.blocks for path in block.paths]


def linear_layers(model: nn.Module, place: str = "blocks.adapter") -> list[str]:
    """Paths of the linear layers of all blocks. Raises UserError, naming the place in the recipe, without blocks."""
    return [
        f"{path}.{name}"
        for path, block in _blocks(model, place)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """The attention and feed-forward modules of all blocks, the outermost ones."""
    for _, block in _blocks(model):
        inside: set[nn.Module] = set()
        for module in block.modules():
            if module is not block and module not in inside and PARTS.search(type(module).__name__):
                inside.update(module.modules())
                yield module


def _targets(model: nn.Module, patterns: tuple[str, ...] | None) -> list[str]:
    """Names of the layers that get an update, in the order of the model."""
    if patterns is None:
        inside = {module for part in parts(model) for module in part.modules()}
        inside |= {child for _, block in _blocks(model) for child in block.children()}  # Flux's single blocks
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return match_names(
        patterns,
        [name for name, module in model.named_modules() if isinstance(module, kinds)],
        "blocks.adapter.targets",
    )


def match_names(patterns: tuple[str, ...], names: list[str], place: str) -> list[str]:
    """The names that match any pattern. Raises UserError for a pattern that matches none."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
            raise UserError(f"{place}: '{pattern}' matches nothing; the model has {', '.join(kinds[:12])}...")
    return [name for name in names if matches(name, patterns)]
