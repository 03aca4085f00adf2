"""From a recipe's name or path to a checked recipe: `extends`, `key=value` overrides, all problems at once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from entrecipes.errors import UserError, nearest
from entrecipes.recipe.explain import explain
from entrecipes.recipe.idle import idle_keys
from entrecipes.recipe.plugins import admit_registered, import_plugin, refuse_foreign
from entrecipes.recipe.schema import Recipe
from entrecipes.recipe.tree import (
    Node,
    Place,
    Problem,
    RecipeError,
    changed_selector,
    find_node,
    merge,
    parse,
    parse_value,
    plain,
    to_yaml,
)
from entrecipes.tokens import holds_token

RECIPES = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""

COMMAND_LINE = Place("command line")
SECRET = "an access token (hf_...) would be published with the recipe; take it out, and use `hf auth login` or HF_TOKEN"


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with its origin."""

    recipe: Recipe
    name: str
    """`digits/demo` for a packaged recipe, else the file's stem."""
    path: Path
    text: str
    """The file, verbatim."""
    warnings: list[str]
    """Keys without effect, each `file:line: dotted.key: ...`."""

    def resolved_yaml(self) -> str:
        """The recipe in full, defaults included: see [`dump`]."""
        return dump(self.recipe)


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe: any YAML but those in a folder named `accelerate`, Accelerate's own configs."""
    return path.suffix == ".yaml" and path.parent.name != "accelerate" and path.is_file()


def packaged() -> dict[str, Path]:
    """The recipes that come with the package, by name (`digits/demo`)."""
    paths = sorted(path for path in RECIPES.rglob("*.yaml") if is_recipe(path))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe: an existing path, else a packaged recipe's name with or without `.yaml`.

    Raises:
        UserError: When there is neither.
    """
    path, names = Path(name_or_path), packaged()
    if path.is_file():
        return path
    name = str(name_or_path).removesuffix(".yaml")
    if name in names:
        return names[name]
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one recipe in it, or try `entrecipes validate {path}`")
    hint = nearest(name, names) or "."
    raise UserError(f"there is no recipe '{name_or_path}'{hint} `entrecipes ls recipes` lists those that come along")


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, resolve and check a recipe.

    Args:
        name_or_path: See [`find`].
        overrides: `dotted.key=value`, the value as YAML; laid over the file like a variant over its base.

    Raises:
        RecipeError: With every problem, each at its file and line.
        UserError: When there is no such recipe.
    """
    path = find(name_or_path)
    problems: list[Problem] = []
    root = _read(path, (), problems)
    above = _overrides(overrides, problems)
    if root is None:
        raise RecipeError(sorted(problems))
    above = Node(above.value, root.place)
    warnings = list(_dropped(root, above))
    root = merge(root, above)
    recipe = _checked(root, problems)
    for key, why in idle_keys(recipe).items():
        node, depth = find_node(root, key.split("."))
        if depth == len(key.split(".")):
            warnings.append(Problem(node.place, key, f"has no effect {why}"))
    return LoadedRecipe(recipe, _name(path), path, path.read_text(encoding="utf-8"), [str(w) for w in sorted(warnings)])


def compose(overrides: Sequence[str]) -> Recipe:
    """A recipe made of `dotted.key=value` alone, without a file. Raises [`RecipeError`] with every problem."""
    problems: list[Problem] = []
    return _checked(_overrides(overrides, problems), problems)


def _checked(root: Node, problems: list[Problem]) -> Recipe:
    """The recipe of a tree; raises RecipeError with these problems and its own."""
    problems += _plug_in(root)
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        problems += explain(error, root)
    if problems:
        raise RecipeError(sorted(problems))
    return recipe


def import_plugins(path: Path) -> None:
    """Import the plugins that a run's recipe names, so that its classes are found. Raises [`RecipeError`]."""
    root = _read(path, (), [])
    if root is not None and (problems := list(_plug_in(root))):
        raise RecipeError(problems)


def _plug_in(root: Node) -> Iterator[Problem]:
    """Import the modules under `plugins`; anything else than a list of words is left for the check of the recipe."""
    names = root.value.get("plugins", Node((), root.place)).value
    for item in names if isinstance(names, list) else ():
        try:
            if isinstance(item.value, str):
                refuse_foreign(item.value, item.place.source)
                import_plugin(item.value)
        except UserError as error:
            yield Problem(item.place, "plugins", str(error))
    if names:
        admit_registered()


def _dropped(below: Node, above: Node, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """What an override of `type` or `class` on the command line takes away with it."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return
    if key := changed_selector(below, above):
        if gone := sorted(below.value.keys() - above.value.keys()):
            what = f"changes it from {below.value[key].value}, so {', '.join(gone)} of the file no longer count"
            yield Problem(Place("command line"), ".".join((*path, key)), what)
        return
    for key in above.value.keys() & below.value.keys():
        yield from _dropped(below.value[key], above.value[key], (*path, key))


def base_of(path: Path, extends: str) -> Path | None:
    """The file that `extends:` in `path` means: beside that file, else a packaged recipe; None when there is none."""
    beside = path.parent / extends
    for candidate in (beside, beside.with_name(f"{beside.name}.yaml")):
        if candidate.is_file():
            return candidate
    return packaged().get(extends.removesuffix(".yaml"))


def dump(recipe: Recipe) -> str:
    """A recipe in full as YAML that loads to an equal recipe; untouched keys without effect are left out."""
    data = recipe.model_dump(mode="json", by_alias=True)
    for key in idle_keys(recipe):
        *parents, last = key.split(".")
        section, values = recipe, data
        for part in parents:
            section = section[int(part)] if part.isdigit() else getattr(section, part)
            values = values[int(part)] if part.isdigit() else values[part]
        if not last.isdigit() and getattr(section, last) == type(section).model_fields[last].default:
            del values[last]
    return to_yaml(data)


class _RecipeSchema(GenerateJsonSchema):
    """Image counts may also be written as `50k` and `1.5M`."""

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        number = super().function_before_schema(schema)
        return {"anyOf": [number, {"type": "string", "pattern": r"^[0-9.]+\s*[kM]$"}]}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipe files, for editors. A file that `extends` another may leave required sections out."""
    schema = Recipe.model_json_schema(by_alias=True, schema_generator=_RecipeSchema)
    extends = {"type": "string", "description": "The recipe to start from: a file beside this one or a packaged name."}
    schema["properties"] = {"extends": extends} | schema["properties"]
    schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    return {"$schema": GenerateJsonSchema.schema_dialect} | schema


def display(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies in it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _name(path: Path) -> str:
    return _origins().get(path.resolve(), path.stem)


@functools.cache  # `ls` loads them all
def _origins() -> dict[Path, str]:
    return {path.resolve(): name for name, path in packaged().items()}


def _read(path: Path, children: tuple[Path, ...], problems: list[Problem]) -> Node | None:
    """A file laid over what it extends; None, with the problem, when one of them can't be read."""
    source = display(path)
    try:
        text = path.read_text(encoding="utf-8")
        found = [
            Problem(Place(source, i), "", SECRET) for i, line in enumerate(text.splitlines(), 1) if holds_token(line)
        ]
        root, found = (None, found) if found else parse(text, source)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        root, found = None, [Problem(Place(source), "", f"can't be read: {reason}")]
    problems += found
    if root is not None and not isinstance(root.value, dict):
        problems.append(Problem(root.place, "", "a recipe is made of keys, each `key: value`"))
        return None
    if root is None or "extends" not in root.value:
        return root
    extends = root.value["extends"]
    root = Node({key: value for key, value in root.value.items() if key != "extends"}, root.place)
    chain = (*children, path.resolve())
    base = base_of(path, str(extends.value))
    if base is None:
        names = [p.name for p in path.parent.glob("*.yaml") if p.name != path.name] + list(packaged())
        text = f"there is no '{extends.value}' beside this file or among `entrecipes ls recipes`"
        problems.append(Problem(extends.place, "extends", text + nearest(extends.value, names)))
        return None
    if base.resolve() in chain:
        circle = " -> ".join(display(p) for p in (*chain[chain.index(base.resolve()) :], base))
        problems.append(Problem(extends.place, "extends", f"goes in a circle: {circle}"))
        return None
    below = _read(base, chain, problems)
    return below and merge(below, root)


def _overrides(overrides: Sequence[str], problems: list[Problem]) -> Node:
    """All `key=value` as one tree; of a key given twice the last one counts."""
    tree = Node({}, COMMAND_LINE)
    for override in overrides:
        if holds_token(override):
            problems.append(Problem(COMMAND_LINE, "", SECRET))
            continue
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            hint = "written key=value, such as training.images=20k"
            problems.append(Problem(COMMAND_LINE, "", f"'{override}': a change is {hint}"))
            continue
        try:
            node = parse_value(text, COMMAND_LINE)
        except UserError as error:
            problems.append(Problem(COMMAND_LINE, key, str(error)))
            continue
        for part in reversed(key.split(".")):
            node = Node({part: node}, COMMAND_LINE)
        tree = merge(tree, node)
    return tree
