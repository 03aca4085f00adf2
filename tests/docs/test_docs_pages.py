"""The documentation: every block and command is known to docs-check and parses; quoted messages and links exist."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from doc_blocks import LANGUAGES, ROOT, SMALLER, blocks, commands, header, pages, recipes, smaller

from entrecipes.cli import _module, _parse
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.load import load, packaged
from entrecipes.recipe.plugins import sections_of
from entrecipes.recipe.schema import Recipe

PAGES = [page.relative_to(ROOT).as_posix() for page in pages()]
BLOCKS = [block for page in pages() for block in blocks(page)]


def test_every_block_has_a_language_and_a_reason_not_to_be_run() -> None:
    assert len(BLOCKS) > 60
    for block in BLOCKS:
        assert block.language in LANGUAGES or block.how == "skip", f"{block.place}: which language?"
        assert block.how == "run" or len(block.why) > 5, f"{block.place}: why?"


def test_python_parses_and_each_smaller_number_stands_once() -> None:
    code = [block for block in BLOCKS if block.language == "python"]
    for block in code:
        ast.parse(smaller(block.text), block.place)
    for old in SMALLER:
        assert sum(block.text.count(old) for block in code) == 1, old


def test_commands_of_entrecipes_parse_and_their_recipes_load() -> None:
    """By the parsers of the verbs; scripts and launches are docs-check's."""
    shell = [block for block in BLOCKS if block.language == "bash"] + [header(recipe) for recipe in recipes()]
    seen = set()
    for block in shell:
        for program, *words in commands(block.text):
            if program != "entrecipes" or not words or words[0].startswith("-"):
                continue
            args = _parse(_module(words[0]), words[0], words[1:])
            if words[0] == "run" and args.recipe in packaged():
                seen.add(args.recipe)
                load(args.recipe, args.overrides)
    assert len(seen) > 40


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/"))])
def test_keys_and_choices_in_the_text_exist(page: str) -> None:
    """`type: NAME` is registered; of `training.images` some section of that name has the key."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    choices = {name for wing in REGISTRY.values() for name in wing} | {"shapes", "projection"}
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(r"\btype: (\w+)", code):
            assert name in choices, f"{page}: {code}"
        for section, key in re.findall(r"^([a-z]+)\.([a-z_]+)\b(?!\.|\()", code):
            if section in Recipe.model_fields and key not in ("yaml", "md", "html", "json", "py"):
                held = sections_of(Recipe.model_fields[section].annotation)
                assert any(key in one.model_fields for one in held), f"{page}: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", path.read_text()):
        link = "".join(target)
        if link.startswith(("http", "mailto")):
            continue
        file, _, anchor = link.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(to), f"{page}: {link}"


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def messages() -> str:
    """Every text of the source, one a line; of one with values in it, the values are `\\0`."""
    texts = []
    for file in (ROOT / "src/entrecipes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_quoted_messages_stand_in_the_source() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text().split("<!-- messages of others")[0]
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 50
    for message in quoted:
        pattern = "[^\n]*".join(re.escape(part) for part in message.split("..."))
        assert re.search(pattern, messages()), f"troubleshooting.md quotes what nothing says: {message}"
    assert not re.search(re.escape("a message that nothing says"), messages())


def test_the_wings_are_all_described() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name == "README.md" or f"]({page.name}" in index, page.name
    assert len((ROOT / "README.md").read_text().splitlines()) < 320
