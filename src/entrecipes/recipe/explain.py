"""What pydantic refuses in a recipe, said in plain sentences with their file, line and dotted key.

A section's own validator raises `ValueError` with one `key: what is wrong` a line, the key relative to the section; a
line without a key is about the section itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from entrecipes.errors import nearest
from entrecipes.recipe.base import REGISTRY, Section
from entrecipes.recipe.plugins import sections_of
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.tree import Node, Problem, find_node, plain

_EXPECTED = {
    "int": "a whole number such as 2000 (images may be counted as 50k or 1.5M)",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text (put it in quotes)",
    "tuple": "a list such as [a, b]",
    "list": "a list such as [a, b]",
    "dict": "a section: keys, each `key: value`",
    "model": "a section: keys, each `key: value`",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: ValidationError, root: Node) -> list[Problem]:
    """One problem for each thing that pydantic refuses, at the place in the tree that says it (or should have)."""
    data = plain(root)
    return [problem for detail in error.errors(include_url=False) for problem in _explain(detail, root, data)]


def shown(value: Any) -> str:
    """A value as its writer knows it from YAML."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f"'{value}'"
    if value is None:
        return "nothing (null)"
    return str(value).lower()


def _explain(detail: dict[str, Any], root: Node, data: Any) -> Iterator[Problem]:
    path, kind, context = _path(detail["loc"], data), detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        for line in str(context["error"]).splitlines():
            match = re.fullmatch(r"([a-z0-9_.]+): (.*)", line)
            key, text = (match[1].split("."), match[2]) if match else ([], line)
            yield _at(root, [*path, *key], text)
    elif kind == "extra_forbidden":
        yield _at(root, path, _unknown(path, data))
    elif kind == "missing" and isinstance(path[-1], int):
        yield _at(root, path[:-1], f"has too few values: number {path[-1] + 1} is missing")
    elif kind == "missing":
        section = _section(path[:-1], data)
        says = next((f.description for name, f in section.model_fields.items() if (f.alias or name) == path[-1]), "")
        yield _at(root, path, f"is missing: {says.rstrip('.')}")
    elif kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        wing = _wing(path)
        choices = ", ".join(REGISTRY[wing])
        yield _at(root, [*path, "type"], f"is missing: one of {choices} (`entrecipes ls {wing}` says more)")
    elif kind == "union_tag_invalid" or (kind == "literal_error" and path[-1] == "type"):
        section_path = path if kind == "union_tag_invalid" else path[:-1]
        wing, name = _wing(section_path), context["tag"] if "tag" in context else detail["input"]
        choices = re.findall(r"'([^']*)'", context.get("expected_tags", "")) or [*REGISTRY[wing]]
        if name in REGISTRY[wing]:  # a choice of the wing, but not in this place
            text = f"'{name}' can't stand here; one of {', '.join(choices)}"
        else:
            text = f"there is no '{name}'{nearest(name, choices)} (`entrecipes ls {wing}` lists the choices)"
        yield _at(root, [*section_path, "type"], text)
    else:
        yield _at(root, path, _wrong_value(kind, context, detail))


def _wing(path: list[str | int]) -> str:
    """The wing whose choices stand at a path: `noise` also for `noise.base`."""
    return next(str(key) for key in reversed(path) if key in REGISTRY)


def _wrong_value(kind: str, context: dict[str, Any], detail: dict[str, Any]) -> str:
    value = detail["input"]
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        expected = context["expected"].replace("None", "null").replace("'", "")
        return f"expected {expected}, got {shown(value)}{nearest(value, options) if isinstance(value, str) else ''}"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"must be {word} {context[key]:g}, got {shown(value)}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} value, got {context['actual_length']}"
    if kind == "too_long":
        return f"takes at most {context['max_length']} values, got {context['actual_length']}"
    expected = _EXPECTED.get("model" if kind.startswith("union_tag") else kind.split("_")[0])
    return f"expected {expected}, got {shown(value)}" if expected else detail["msg"]


def _at(root: Node, path: list[str | int], text: str) -> Problem:
    return Problem(find_node(root, path)[0].place, ".".join(str(part) for part in path), text)


def _path(location: tuple[str | int, ...], data: Any) -> list[str | int]:
    """pydantic's location without the names of chosen variants, which it inserts after their section."""
    path: list[str | int] = []
    chosen = False
    for part in location:
        if not chosen and isinstance(data, dict) and part == data.get("type"):  # a key may have the variant's name
            chosen = True
            continue
        chosen = False
        path.append(part)
        inside = isinstance(data, dict) and part in data or isinstance(data, list) and part in range(len(data))
        data = data[part] if inside else None
    return path


def _chosen(annotation: Any, data: Any) -> type[Section] | None:
    """The section class that `data` selects by its `type`; the only one where there is no choice."""
    sections = sections_of(annotation)
    named = data.get("type") if isinstance(data, dict) else None
    matching = [s for s in sections if len(sections) == 1 or named in get_args(s.model_fields["type"].annotation)]
    return matching[0] if matching else None


def _section(path: list[str | int], data: Any) -> type[Section]:
    """The section class at a path that pydantic has walked."""
    section: type[Section] = Recipe
    for part in path:
        data = data[part]
        if isinstance(part, str):
            annotation = next(f.annotation for name, f in section.model_fields.items() if (f.alias or name) == part)
        section = _chosen(annotation, data) or section
    return section


def _keys(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _unknown(path: list[str | int], data: Any) -> str:
    """What to say of a key that its section does not know: who does, or what it may have meant."""
    *parents, key = path
    section, elsewhere = _section(parents, data), []
    for name, field in Recipe.model_fields.items():
        chosen = _chosen(field.annotation, data.get(name) or {"type": getattr(field.default, "type", None)})
        for holder, cls in [("", Recipe), (f"{name}.", chosen)] if chosen else []:
            elsewhere += [f"{holder}{key}"] if key in _keys(cls) and cls is not section else []
    if hint := nearest(key, _keys(section)):
        return f"unknown key{hint}"
    if elsewhere:
        return f"unknown key; did you mean '{elsewhere[0]}'?"
    siblings = [
        name
        for name, entry in REGISTRY.get(str(parents[-1]) if parents else "", {}).items()
        if key in _keys(entry.section)
    ]
    if siblings:
        return f"unknown key for this type; {' and '.join(siblings)} would take it"
    return f"unknown key; the keys here are {', '.join(_keys(section))}"
