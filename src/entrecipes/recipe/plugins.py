"""`plugins:` modules of the user's own, imported before a recipe is checked, so that it can choose what they register.

A plugin is an ordinary Python module in the working directory or installed. At import it adds choices to a wing
(`recipe.base.register`), metrics (`recipe.evaluation.own_metric`) or model classes
(`diffusion.families.register_family`).
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from entrecipes.errors import UserError
from entrecipes.recipe.base import REGISTRY, Section
from entrecipes.recipe.evaluation import METRICS, Evaluation
from entrecipes.recipe.pipeline import KIND_OF_MODEL, Model
from entrecipes.recipe.schema import Recipe


def refuse_foreign(name: str, recipe: str) -> None:
    """Import no code because somebody else's recipe, which came from the Hub, says so.

    Args:
        name: The module.
        recipe: The file that names it.

    Raises:
        UserError: When the file lies in the Hub's cache or in a folder that was pulled.
    """
    folder = Path(recipe).parent
    if (folder / "pulled.json").exists() or any(part.startswith("models--") for part in folder.parts):
        raise UserError(
            f"the recipe came from the Hub, so that '{name}' is not imported; read both, copy the recipe, and give the "
            "copy (evaluate, diagnose and score: --recipe)"
        )


def import_plugin(name: str) -> None:
    """Import a module by its dotted name; the working directory is looked at last.

    Raises:
        UserError: When there is none, or it raises while it is imported.
    """
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        stem = re.sub(r"\.py$", "", name).replace("/", ".")
        raise UserError(f"'{name}' is not how Python imports a module; write its name, such as {stem}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise UserError(f"{name} can't be imported: {error}; install what it needs") from error
        raise UserError(
            f"there is no module '{name}'; put {name.replace('.', '/')}.py into the working directory, or install it"
        ) from error
    except Exception as error:  # whatever the module does
        raise UserError(f"{name} can't be imported: {type(error).__name__}: {error}; mend that module") from error


def admit_registered(section: type[Section] = Recipe) -> bool:
    """Let recipes say what was registered since the schema was made; whether that was anything.

    A field whose name is a wing's takes every choice of that wing; sections that hold a changed one are made anew.
    """
    changed = False
    for name, field in section.model_fields.items():
        held = sections_of(field.annotation)
        changed |= any([admit_registered(one) for one in held])  # a list: each is to be looked at
        new = [entry.section for entry in REGISTRY.get(name, {}).values() if entry.section not in held]
        names = _names(section, name)
        if new and held:
            field.annotation, changed = functools.reduce(operator.or_, [*held, *new]), True
        elif names is not None and names != field.annotation:
            field.annotation, changed = names, True
    if changed:
        section.model_rebuild(force=True)
    return changed


def _names(section: type[Section], field: str) -> Any:
    """The type of a field that names metrics or model classes; None for others."""
    if (section, field) == (Evaluation, "metrics"):
        return tuple[Literal[tuple(dict.fromkeys(name for names in METRICS.values() for name in names))], ...]
    return Literal[tuple(KIND_OF_MODEL)] if (section, field) == (Model, "class_name") else None


def sections_of(annotation: Any) -> Sequence[type[Section]]:
    """The section classes that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_of(inner)]
