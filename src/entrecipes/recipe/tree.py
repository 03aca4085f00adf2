"""YAML read into a tree in which every value knows its file and line, and written back.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, `no` and `on` are words, `010` is ten, `1:30` is text.
Aliases are refused and a key may be written once: what a recipe says can be seen where it says it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from entrecipes.errors import UserError

SELECTORS = ("type", "class")
"""Keys that choose what the rest of their section means: when a variant changes one, the base's other keys go."""


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: a file and its line, or the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong: where, under which dotted key (may be empty), and what."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.text) if part)


class RecipeError(UserError):
    """Everything that is wrong with one recipe or several.

    Attributes:
        problems: One `file:line: dotted.key: what is wrong` each.
    """

    def __init__(self, problems: Sequence[Problem | str]) -> None:
        self.problems = [str(problem) for problem in problems]
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            super().__init__("\n  ".join([f"{len(self.problems)} problems", *self.problems]))


@dataclass(frozen=True)
class Node:
    """A value with its place: a scalar, a list of nodes, or a mapping of keys to nodes."""

    value: Any
    place: Place


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _float),
    "str": (None, str),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not used in recipes: repeat the value", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}

    def represent_list(self, data: list) -> yaml.Node:
        flat = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence(_TAG + "seq", data, flow_style=flat)

    def represent_dict(self, data: dict) -> yaml.Node:
        return self.represent_mapping(_TAG + "map", sorted(data.items(), key=lambda item: item[0] != "type"))


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(dict, _Dumper.represent_dict)


for _name, (_pattern, _) in _SCALARS.items():
    if _pattern is not None:
        for _class in (_Loader, _Dumper):
            _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


@functools.cache  # many recipes extend the same few files, and PyYAML is slow
def parse(text: str, source: str) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML text, not to be changed, and what is wrong with it as YAML.

    Args:
        text: One YAML document.
        source: What to call it in places.

    Returns:
        The root (None when it is not YAML at all) and the problems found; of a key written twice the first one counts.
    """
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = str(error.problem or error.context)
        hint = "; indent with spaces, not with tabs" if r"'\t'" in what else ""
        return None, [Problem(Place(source, mark.line + 1), "", f"not valid YAML: {what}{hint}")]
    except yaml.YAMLError as error:
        return None, [Problem(Place(source, 1), "", f"not valid YAML: {str(error).splitlines()[0]}")]
    if root is None:
        return None, [Problem(Place(source, 1), "", "the file is empty")]
    problems: list[Problem] = []
    return _convert(root, source, (), problems), problems


def _convert(node: yaml.Node, source: str, path: tuple[str, ...], problems: list[Problem]) -> Node:
    place = Place(source, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, source, (*path, str(i)), problems) for i, item in enumerate(node.value)]
        return Node(items, place)
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key_place = Place(source, key_node.start_mark.line + 1)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.tag)
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(Problem(key_place, ".".join(path), "a key must be a plain word"))
            elif key in children:
                problems.append(Problem(key_place, ".".join((*path, key)), f"also written in {children[key].place}"))
            else:
                children[key] = Node(_convert(value_node, source, (*path, key), problems).value, key_place)
        return Node(children, place)
    try:
        return Node(_SCALARS[node.tag.removeprefix(_TAG)][1](node.value), place)
    except (KeyError, ValueError):
        problems.append(Problem(place, ".".join(path), f"'{node.tag}' can't be read as a value; leave the tag out"))
        return Node(None, place)


def parse_value(text: str, place: Place) -> Node:
    """The value of an override: a YAML scalar or a flow list or mapping; `a: b` without braces stays text.

    Raises:
        UserError: With the reason, when it is not YAML.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
        return Node(text or None, place)
    problems: list[Problem] = []
    tree = _convert(node, place.source, (), problems)
    if problems:
        raise UserError(problems[0].text)
    return _placed(tree, place)


def _placed(node: Node, place: Place) -> Node:
    if isinstance(node.value, dict):
        return Node({key: _placed(child, place) for key, child in node.value.items()}, place)
    if isinstance(node.value, list):
        return Node([_placed(child, place) for child in node.value], place)
    return Node(node.value, place)


def changed_selector(below: Node, above: Node) -> str | None:
    """The key of [`SELECTORS`] by which the mapping `above` chooses something else than `below`, if there is one."""
    for key in SELECTORS:
        if key in above.value and key in below.value and above.value[key].value != below.value[key].value:
            return key
    return None


def merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`, key by key; a section in which `above` changes a selector comes from `above` alone."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    if changed_selector(below, above):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, above.place)


def plain(node: Node) -> Any:
    """The tree as ordinary dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def find_node(root: Node, path: Sequence[str | int]) -> tuple[Node, int]:
    """The deepest node on the way to `path`, and how many steps of the path led to it."""
    node = root
    for depth, part in enumerate(path):
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list) and str(part).isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
        else:
            return node, depth
    return node, len(path)


def to_yaml(data: Any) -> str:
    """Plain data as YAML that `parse` reads back unchanged, keys in their order but `type` first."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)
