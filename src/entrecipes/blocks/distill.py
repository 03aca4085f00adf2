"""Learning from the dense model while blocks go: its prediction is a second target."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from entrecipes.diffusion.denoiser import Denoiser
from entrecipes.diffusion.objective import Objective
from entrecipes.diffusion.pipelines import Components, load_components
from entrecipes.errors import UserError
from entrecipes.recipe.pipeline import Pipeline
from entrecipes.recipe.prune import Distillation


class Teacher:
    """The dense model, frozen: another pipeline's, or a copy of the one in training from just before its first removal.

    Without a section, there is none and nothing happens.

    Raises:
        UserError: For a teacher that can't be had, or predicts something else than the model in training.
    """

    def __init__(self, section: Distillation | None, components: Components, objective: Objective) -> None:
        self.section, self.components, self.objective = section, components, objective
        self.denoiser: Denoiser | None = None
        if section and section.teacher:
            found = load_components(Pipeline(pretrained=section.teacher), to_sample=False)
            ours, theirs = _facts(components), _facts(found)
            if differing := [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]:
                raise UserError(
                    f"prune.distill.teacher: {section.teacher} can't teach this model: it has {'; '.join(differing)}"
                )
            self._follow(found.model.to(next(components.model.parameters()).device))

    def _follow(self, model: Any) -> None:
        model.requires_grad_(False).eval()
        self.denoiser = Denoiser(model, self.components.family, self.components.path)

    def before_removal(self) -> None:
        """Keep the model in training as the teacher, if it is to be its own and this is the first removal."""
        if self.section and self.denoiser is None:
            self._follow(copy.deepcopy(self.components.model))

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, log_sigma: Tensor, condition: Tensor | None
    ) -> Tensor | float:
        """Distance [n] to the teacher's prediction, weighted over noise levels as the loss is; 0 without a teacher."""
        if self.denoiser is None:
            return 0.0
        with torch.no_grad():
            taught, _ = self.denoiser(x0, noise, log_sigma, condition)
        return self.section.weight * self.objective(prediction, taught, log_sigma)[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of a teacher that exists nowhere else; empty otherwise."""
        own = self.denoiser is not None and not self.section.teacher
        return self.denoiser.model.state_dict() if own else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; call it while the model in training is still dense."""
        if state:
            self.before_removal()
            self.denoiser.model.load_state_dict(state)


def _facts(components: Components) -> dict[str, Any]:
    """What a teacher must share with its pupil."""
    model, family, path = components.model, components.family, components.path
    levels = torch.linspace(float(path.log_sigma_min), float(path.log_sigma_max), 5, dtype=torch.float64)
    return {
        "class": family.model_class,
        "prediction type": path.prediction_type,
        "path": path.name,
        "timesteps": [round(float(timestep), 3) for timestep in path.timestep(levels)],
        "sample size": model.config.sample_size,
        "channels": family.channels(model),
        "classes": family.num_classes(model),
    }
