"""Which weights are trained as a function of images seen: the interface, the plain choice and the written schedule."""

from __future__ import annotations

import fnmatch
from typing import Any, Protocol

from torch import Tensor, nn

from entrecipes.errors import UserError
from entrecipes.recipe.blocks import AllBlocksSection, StagedBlocksSection


class BlockSchedule(Protocol):
    """Opens, closes or removes weights while training goes on."""

    def advance(self, images: int) -> list[str]:
        """Bring the model to the state due at `images`: set `requires_grad` and drop the gradients of what is frozen.

        Returns:
            One sentence for each change, for the log and the report. When there is any, the run rebuilds its optimizer
            (the state of frozen weights is dropped) and its distributed wrapper.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


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
    """Everything is trained; nothing ever changes."""

    def __init__(self, section: AllBlocksSection, model: nn.Module) -> None:
        pass

    def advance(self, images: int) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class StagedBlocks:
    """Trains what the recipe's stages name.

    Raises:
        UserError: For a pattern that matches no parameter.
    """

    def __init__(self, section: StagedBlocksSection, model: nn.Module) -> None:
        self.section, self.model = section, model
        self.stage = -1
        names = [name for name, _ in model.named_parameters()]
        for i, stage in enumerate(section.stages):
            for pattern in stage.train:
                if not fnmatch.filter(names, pattern):
                    top = sorted({name.split(".")[0] for name in names})
                    raise UserError(
                        f"blocks.stages.{i}.train: '{pattern}' matches no parameter; the model has {', '.join(top)}"
                    )

    def advance(self, images: int) -> list[str]:
        due = sum(stage.from_images <= images for stage in self.section.stages) - 1
        if due == self.stage:
            return []
        self.stage = due
        patterns = self.section.stages[due].train
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
            if not parameter.requires_grad:
                parameter.grad = None  # a zero gradient would still let momentum and weight decay move the weight
        return [f"stage {due + 1} of {len(self.section.stages)}: training {', '.join(patterns)}"]

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the stage follows from the images seen, and `advance` sets the flags again."""
