"""What every recipe section is made of: strict frozen models, counts such as `50k`, and the registry of choices.

A *wing* is a part of the recipe in which one of several methods is chosen by `type:` (noise, data, optimizer...). Each
choice is one class that says its keys, its one-line summary and its paper, and names the code that carries it out by a
dotted string, so that listing or validating recipes never imports torch.
"""

from __future__ import annotations

import functools
import importlib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from entrecipes.errors import UserError, nearest
from entrecipes.reference import split


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values can't change, attribute docstrings are the descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _parse_count(value: Any) -> Any:
    """`50k` -> 50000, `1.5M` -> 1500000; anything else is left for pydantic to judge."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+)\s*([kM])", value)):
        number = float(match[1]) * {"k": 1_000, "M": 1_000_000}[match[2]]
        return int(number) if number == int(number) else number
    return value


Count = Annotated[int, BeforeValidator(_parse_count), Field(ge=0)]
"""A whole number of images; `50k` and `1.5M` may be written."""

PositiveCount = Annotated[int, BeforeValidator(_parse_count), Field(gt=0)]


def check_starts(starts: list[int], what: str) -> None:
    """Raise ValueError unless the images at which `what` begin are in order, the first at 0."""
    if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"{what} must start at 0 and increase in from_images, got {starts}")


def splits_revision(name: str, revision: str = "revision") -> Any:
    """A validator of a section whose key `name` may say `owner/id@revision`: the key `revision` then has that part."""

    def validate(cls: type, values: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(values, dict) and isinstance(values.get(name), str):
            try:
                found = split(values[name], values.get(revision))
            except UserError as error:
                raise ValueError(f"{name}: {error}") from None
            values = values | {key: value for key, value in zip((name, revision), found, strict=True) if value}
        return handler(values)

    return model_validator(mode="wrap")(classmethod(validate))


@dataclass(frozen=True)
class Entry:
    """One registered choice of a wing."""

    wing: str
    name: str
    summary: str
    paper: str
    section: type[Section]
    implementation: str

    def load(self) -> Callable[..., Any]:
        """Import the code behind this choice (`module:attribute`)."""
        module, attribute = self.implementation.split(":")
        return getattr(importlib.import_module(module), attribute)


REGISTRY: dict[str, dict[str, Entry]] = {}

SectionType = TypeVar("SectionType", bound=type[Section])


def register(wing: str, *, implementation: str, paper: str = "") -> Callable[[SectionType], SectionType]:
    """Register the decorated section under the name in its `type: Literal[...]` field.

    Args:
        wing: The recipe section that offers the choice, such as `noise`.
        implementation: `module:attribute`, called as `attribute(section, **context)` by [`build`].
        paper: Where the method comes from, for `entrecipes ls`.

    Raises:
        ValueError: At import, when the name is taken, badly formed, or the class has no docstring to list.
    """

    def add(section: SectionType) -> SectionType:
        name = get_args(section.model_fields["type"].annotation)[0]
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{wing}: '{name}' is no name for a choice: use lower case, digits and underscores")
        if name in REGISTRY.setdefault(wing, {}):
            raise ValueError(f"{wing}: '{name}' is registered twice")
        if not (section.__doc__ or "").strip():
            raise ValueError(f"{wing}: '{name}' needs a docstring: its first line is what `entrecipes ls` prints")
        summary = section.__doc__.strip().splitlines()[0]
        REGISTRY[wing][name] = Entry(wing, name, summary, paper, section, implementation)
        return section

    return add


def union(wing: str) -> Any:
    """The type of a wing's section: any of its registered choices, told apart by `type`."""
    sections = tuple(entry.section for entry in REGISTRY[wing].values())
    return Annotated[functools.reduce(operator.or_, sections), Field(discriminator="type")]


def choice(wing: str, name: str) -> Entry:
    """The registered choice of that name.

    Raises:
        UserError: With the nearest name, when there is none.
    """
    try:
        return REGISTRY[wing][name]
    except KeyError:
        raise UserError(
            f"{wing}: there is no '{name}'{nearest(name, REGISTRY[wing])} `entrecipes ls {wing}` lists the choices."
        ) from None


def build(wing: str, section: Section, **context: Any) -> Any:
    """Carry out a choice: import its implementation and call it with its section and what the run provides."""
    return choice(wing, section.type).load()(section, **context)
