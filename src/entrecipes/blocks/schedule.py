"""Which weights are trained as a function of images seen: the interface, the plain choice and the written schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from entrecipes.blocks.closed import ClosedLayers
from entrecipes.diffusion.quantised import size
from entrecipes.patterns import check_parameters, matches
from entrecipes.recipe.blocks import AllBlocksSection, StagedBlocksSection

if TYPE_CHECKING:
    from entrecipes.blocks.pruning import Subject


class BlockSchedule(Protocol):
    """Opens and closes weights while training goes on.

    Two sets are told apart. The *held* set is all that may be trained until the next change: the run builds its
    optimizer and its distributed wrapper over it, and weights outside lose their gradient and their optimizer state.
    The *focus* is the part of it that the present step trains; the rest of the held set keeps its optimizer state.
    """

    def advance(self, images: int) -> list[dict[str, Any]]:
        """Bring the model to the state due at `images`: set `requires_grad` of the held set, drop the other gradients.

        Returns:
            A row for each change: `what` in one sentence, and numbers for the report (JSON values). When there is any,
            the run rebuilds its optimizer and its distributed wrapper over what requires a gradient then.
        """

    def focus(self) -> None:
        """Close for the moment what the next step does not train; called after every `advance` and its rebuild."""

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        """Within, the model and its copies have all weights in full precision, which may be loaded if `changed`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, and set `requires_grad` of the held set."""


def train_only(model: nn.Module, trained: Callable[[str], bool]) -> None:
    """Let just the weights of these names be trained; the others lose their gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
        if not parameter.requires_grad:
            parameter.grad = None  # a zero gradient would still let momentum and weight decay move the weight


def guard_group_norms(model: nn.Module) -> None:
    """Keep frozen prefixes from crashing the process on a CPU.

    torch 2.13's CPU backward of a trained GroupNorm dies (SIGSEGV) when its input is channels-last and needs no
    gradient, as behind a frozen attention block. Such inputs are made contiguous; others are left as they are.
    """

    def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if inputs[0].requires_grad else (inputs[0].contiguous(), *inputs[1:])

    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and not module._forward_pre_hooks:
            module.register_forward_pre_hook(contiguous)


class AllBlocks:
    """Every weight that may be trained is, from the first image to the last."""

    def __init__(self, section: AllBlocksSection, subject: Subject) -> None:
        self.model, self.eligible = subject.components.model, subject.eligible
        self.begun = False

    def advance(self, images: int) -> list[dict[str, Any]]:
        if self.begun:
            return []
        self.load_state_dict({})
        weights = list(self.model.named_parameters())
        trained = [weight.numel() for name, weight in weights if self.eligible(name)]
        if len(trained) == len(weights):
            return []
        total = sum(size(weight) for _, weight in weights)
        return [{"what": f"training {sum(trained):,} of {total:,} weights", "trained_parameters": sum(trained)}]

    def focus(self) -> None:
        pass

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = True
        train_only(self.model, self.eligible)


class StagedBlocks:
    """Trains what the recipe's stages name.

    Raises:
        UserError: For a pattern that matches no parameter, or closed blocks to quantise in a model without blocks.
    """

    def __init__(self, section: StagedBlocksSection, subject: Subject) -> None:
        self.section, self.model, self.eligible = section, subject.components.model, subject.eligible
        self.stage = -1
        for i, stage in enumerate(section.stages):
            check_parameters(self.model, stage.train, f"blocks.stages.{i}.train")
        self.closed = ClosedLayers(section.closed.quantise, self.model, getattr(subject, "copies", ()))

    def advance(self, images: int) -> list[dict[str, Any]]:
        due = sum(stage.from_images <= images for stage in self.section.stages) - 1
        if due == self.stage:
            return []
        self.load_state_dict({"stage": due})
        patterns = self.section.stages[due].train
        what = f"stage {due + 1} of {len(self.section.stages)}: training {', '.join(patterns)}"
        return [{"what": what, "stage": due, "train": list(patterns)}]

    def focus(self) -> None:
        pass

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        return self.closed.whole(changed)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "closed": self.closed.names()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]
        patterns = self.section.stages[self.stage].train

        def trained(name: str) -> bool:
            return self.eligible(name) and matches(name, patterns)

        self.closed.open(trained, state.get("closed"))
        train_only(self.model, trained)
