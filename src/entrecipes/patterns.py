"""Patterns of names, as shells have them: `*` matches anything, case counts."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from entrecipes.errors import UserError


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_parameters(model: nn.Module, patterns: Iterable[str], place: str) -> None:
    """Raise UserError, naming the `place` in the recipe, for a pattern that matches no parameter of the model."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            top = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise UserError(f"{place}: '{pattern}' matches no parameter; the model has {top}")
