"""The code blocks and commands of README, docs and recipes: found, sorted, and made small enough to be run.

`make docs-check` (scripts/check_docs.py) runs them, the tests parse them. A block that can't be run says so right above
itself: `<!-- docs-check: parse only: REASON -->` or `<!-- docs-check: skip: REASON -->`. Above a partial recipe for
another base than `digits/demo` stands `<!-- docs-check: extends NAME -->`. A block whose first line is `# NAME.py` or
`# NAME.yaml` is kept under that name for the blocks behind it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SMALLER = {
    "SIZE, BATCH, STEPS, SAVE_EVERY = 32, 64, 50_000, 1_000": "SIZE, BATCH, STEPS, SAVE_EVERY = 8, 4, 40, 20",
    "torch.rand(10_000,": "torch.rand(50,",
    "(64, 64, 128, 128)": "(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4",
    "STEPS, BATCH = 10_000, 64": "STEPS, BATCH = 3, 4",
    "CLIPS, BATCH = 100_000, 16": "CLIPS, BATCH = 60, 4",
    "images, batch = 100_000, 32": "images, batch = 480, 4",
}
"""What is changed in Python blocks before they run; each stands in exactly one block."""

LANGUAGES = ("python", "yaml", "bash", "console", "json", "text")
ABOVE = re.compile(r"<!-- docs-check: (parse only|skip|extends):? (.+?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block, or the commands of a recipe's header."""

    path: Path
    line: int
    language: str
    text: str
    how: str = "run"
    """`run`, `parse only`, `skip` or `extends`, as the comment above says."""
    why: str = ""

    @property
    def place(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}"

    @property
    def name(self) -> str | None:
        """The file that it is kept as."""
        found = re.match(r"# (\w+\.(py|yaml))\n", self.text)
        return found[1] if found else None


def pages() -> list[Path]:
    """Every page with code blocks, the front page first."""
    folders = (ROOT / name for name in ("docs", "recipes", "src/entrecipes"))
    found = [page for folder in folders for page in sorted(folder.rglob("*.md")) if "results" not in page.parts]
    recipes_link = ROOT / "src/entrecipes/recipes"
    own = [page for page in found if recipes_link not in page.parents]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *own]


def recipes() -> list[Path]:
    """Every recipe and accelerate config that comes along."""
    return sorted((ROOT / "recipes").rglob("*.yaml"))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order, indentation taken away."""
    found, lines, i = [], page.read_text().splitlines(), 0
    while i < len(lines):
        fence = re.match(r"( *)(`{3,})(\w*)\s*$", lines[i])
        if not fence:
            i += 1
            continue
        end = next(k for k in range(i + 1, len(lines)) if lines[k].strip() == fence[2])
        text = "".join(f"{line.removeprefix(fence[1])}\n" for line in lines[i + 1 : end])
        above = next((line for line in reversed(lines[:i]) if line.strip()), "")
        how, why = said.groups() if (said := ABOVE.search(above)) else ("run", "")
        found.append(Block(page, i + 1, fence[3], text, how, why))
        i = end + 1
    return found


def header(recipe: Path) -> Block:
    """The commands in the comments of a recipe, as one block."""
    starts = ("entrecipes ", "accelerate ", "python ", "OMP_NUM_THREADS=")
    lines = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    return Block(recipe, 1, "bash", "".join(f"{line}\n" for line in lines if line.startswith(starts)))


def smaller(code: str) -> str:
    """Python code as it is run: with the changes of SMALLER."""
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    return code


def commands(text: str) -> list[list[str]]:
    """The simple commands of a shell block, as words: continued lines joined, lists and comments taken apart."""
    found: list[list[str]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in (";", "&&", "||", "|", "&"):
                found, words = [*found, words], []
            else:
                words += _expanded(word)
        found.append(words)
    named = (words[next((i for i, word in enumerate(words) if "=" not in word), 0) :] for words in found)
    return [words for words in named if words]


def _expanded(word: str) -> list[str]:
    """`a{b,c}d` as the shell expands it."""
    braces = re.fullmatch(r"([^{}]*)\{([\w.,-]+,[\w.,-]+)\}([^{}]*)", word)
    return [f"{braces[1]}{part}{braces[3]}" for part in braces[2].split(",")] if braces else [word]
