"""SimDA and I2V-Adapter in recipes: new modules beside a frozen video model, published alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from entrecipes.blocks.adapters import Beside
from entrecipes.diffusion import side
from entrecipes.diffusion.adapter_folder import Base
from entrecipes.errors import UserError
from entrecipes.models.side_adapters import NAME


class SideAdapter(Beside):
    """Trains the modules of SimDA or I2V-Adapter beside a frozen base.

    Raises:
        UserError: For a base that has no layers which the adapter could lie beside.
    """

    def prepare(self, model: nn.Module, seed: int) -> None:
        super().prepare(model, seed)
        options = self.section.model_dump(exclude={"type", "quantise"})
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                adapter = side.CLASSES[self.section.type].of(model, **options)
            self.quantise(model)
            adapter.attach(model)
        except ValueError as error:
            raise UserError(f"blocks.adapter: {self.section.type} does not fit this base: {error}") from error

    def eligible(self, name: str) -> bool:
        return name.startswith(f"{NAME}.")

    @property
    def published_alone(self) -> bool:
        return True

    def save(self, model: nn.Module, folder: Path, base: Base) -> None:
        side.save_side_adapter(getattr(model, NAME), folder, base)
