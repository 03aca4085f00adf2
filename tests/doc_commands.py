"""How each kind of documented block is checked; see scripts/check_docs.py, which runs it, and doc_blocks.py."""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from doc_blocks import ROOT, Block, commands, smaller

from entrecipes.cli import _module, _parse, main
from entrecipes.recipe.load import load, packaged

Row = tuple[str, str]
"""How it was checked (executed, dry-run, parsed, skipped, output), and a note."""

PEOPLE: list[Path] = []
"""Where the runner made what stands in for large models (test_recipes.stand_ins)."""
LOOKS = ("ls", "show", "cp", "validate", "schema")
"""Verbs that cost nothing: carried out as they stand."""
READS = ("generate", "evaluate", "diagnose", "score", "report")
"""Verbs that read a run or a pipeline: carried out, smaller, where it is there."""
SMALL = {
    "evaluate": ["evaluation.samples=32", "evaluation.steps=2"],
    "generate": ["--steps", "2"],
    "diagnose": ["--images", "16", "--levels", "8"],
    "score": ["--images", "8", "--levels", "4"],
}
SHORT_RUN = ["training.images=512", "evaluation.samples=32", "evaluation.steps=2", "evaluation.grid=1",
             "evaluation.held_out.images=8", "evaluation.held_out.noise_levels=4"]  # fmt: skip
NOT_RUN = {
    "pip": "installs packages",
    "source": "changes the shell",
    "export": "changes the shell",
    "cd": "changes the shell",
    "git": "needs a network",
    "hf": "needs the Hub",
    "sbatch": "needs SLURM",
    "nvidia-smi": "needs a GPU",
}


def check_block(block: Block, names: dict[str, Any], folder: Path) -> Iterator[Row]:
    """Check one block, in the page's folder with the page's names. Raises when anything is wrong with it."""
    if block.how == "skip":
        yield "skipped", block.why
    elif block.language == "python":
        yield _python(block, names, folder)
    elif block.language == "yaml":
        yield _recipe(block, folder)
    elif block.language == "bash":
        for words in commands(block.text):
            shown = " ".join(words)[:60]
            how, note = ("parsed", block.why) if block.how == "parse only" else ("", "")
            found, said = check_command(words, block)
            yield how or found, f"{shown}: {note or said}" if note or said else shown
    elif block.language == "console":
        yield _console(block)
    elif block.language == "json":
        json.loads(block.text)
        yield "parsed", "JSON"
    elif block.language == "text":
        yield "output", ""
    else:
        raise AssertionError(f"a block in '{block.language}': name a language that can be checked, or say how")


def _python(block: Block, names: dict[str, Any], folder: Path) -> Row:
    ast.parse(block.text)
    if block.name:
        (folder / block.name).write_text(block.text)
        return "executed", f"as {block.name}, by the recipes behind it"
    if block.how == "parse only":
        return "parsed", block.why
    code = smaller(block.text)
    torch.manual_seed(0)
    exec(compile(code, block.place, "exec"), names)
    return "executed", "with smaller numbers" if code != block.text else ""


def _recipe(block: Block, folder: Path) -> Row:
    """A recipe, or the part of one, laid over a base."""
    whole = re.search(r"^(extends|description):", block.text, re.MULTILINE)
    base = block.why if block.how == "extends" else "digits/demo"
    path = folder / (block.name or "part.yaml")
    path.write_text(block.text if whole else f"extends: {base}\n{block.text}")
    warnings = load(path).warnings
    assert not warnings, warnings
    return "executed", "" if whole else f"validated as a change of {base}"


def _console(block: Block) -> Row:
    """`$ ` commands with what they print; a line of dots stands for any lines."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, expected = part.partition("\n")
        before = len(sys.stdout.getvalue())
        main(commands(line)[0][1:])
        said = sys.stdout.getvalue()[before:]
        pattern = ".*".join(re.escape(text) for text in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE))
        assert re.search(pattern, said, re.DOTALL), f"printed {said!r}"
    return "executed", "and its output compared"


def check_command(words: list[str], block: Block) -> Row:
    """Check one simple command; carry it out where that is cheap, unless told not to."""
    program, *rest = words
    if program == "entrecipes":
        return _entrecipes(rest, block)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in rest if "=" not in word and word not in targets]
        assert not unknown, f"the Makefile has no {unknown}"
        return "parsed", "the target is there"
    if program == "python" and rest[0].endswith(".py"):
        return _script(rest)
    if program in ("accelerate", "srun", "torchrun"):
        return _launch(words)
    if program == "pip":
        _extras(rest)
    assert program in NOT_RUN, f"'{program}' is not known to docs-check; add how to check it"
    return "skipped", NOT_RUN[program]


def _extras(words: list[str]) -> None:
    """Refuse an extra that setup.cfg does not have."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = [
        name
        for word in words
        for found in re.findall(r"(?:entrecipes|\.)\[([\w,]+)\]", word)
        for name in found.split(",")
    ]
    assert set(asked) <= set(setup["options.extras_require"]), asked


def _entrecipes(words: list[str], block: Block) -> Row:
    verb, *rest = words
    if verb in ("--help", "--version"):
        return _carried_out(words)
    args = _parse(_module(verb), verb, rest)
    if verb == "run":
        return _run(args, rest, block)
    if verb == "compare":
        return _compare(args)
    if getattr(args, "recipe", None) and not args.recipe.startswith("outputs/") and verb != "cp":
        load(args.recipe, getattr(args, "overrides", ()))
    if block.how == "parse only":
        return "parsed", ""
    if verb in LOOKS or (verb == "data" and args.action == "ls"):
        return _carried_out(words)
    subjects = getattr(args, "runs", None) or [getattr(args, "pipeline", "")]
    if verb in READS and all(Path(str(subject)).exists() for subject in subjects):
        return _carried_out([verb, *rest, *SMALL.get(verb, [])])
    if verb == "data" and args.action == "inspect" and Path(args.name).exists():
        return _carried_out(words)
    return "parsed", "what it reads is not here" if verb in READS else "takes long, or a network"


def _compare(args: argparse.Namespace) -> Row:
    """Every arm's recipe loads with its own changes and those of all."""
    changes = [word for word in args.recipes if "=" in word]
    arms = [[word] for word in args.recipes if word not in changes] + [arm[1:] for arm in args.arm]
    for recipe, *own in arms:
        load(recipe, [*(word for word in own if "=" in word), *changes])
    return "parsed", "trains for long; the recipes of all arms load"


def _is_recipe(word: str) -> bool:
    """Whether a word names a recipe, rightly or not: `topic/name` or a YAML file."""
    topics = {name.split("/")[0] for name in packaged()}
    return word.endswith(".yaml") or bool(re.fullmatch(rf"({'|'.join(topics)})/[\w-]+", word))


def _carried_out(words: list[str]) -> Row:
    code = main(words)
    assert code == 0, f"entrecipes {' '.join(words)}: exit code {code}"
    return "executed", ""


def _run(args: argparse.Namespace, rest: list[str], block: Block) -> Row:
    """Train what the page wrote, for a moment; dry-run what comes along: once, from its header, and with changes."""
    if args.recipe.startswith("outputs/"):
        return "parsed", "its recipe is written by an earlier run"
    if args.accelerate:
        config = ROOT / f"recipes/accelerate/{args.accelerate}.yaml"
        assert config.exists() or Path(args.accelerate).exists(), args.accelerate
    loaded = load(args.recipe, args.overrides)
    assert not loaded.warnings, loaded.warnings
    if block.how == "parse only" or args.accelerate:
        return "parsed", "the recipe loads; starts several processes" if args.accelerate else ""
    if args.meta:
        return _carried_out(["run", *rest])
    if loaded.path.resolve() not in {path.resolve() for path in packaged().values()}:
        return _carried_out(["run", *rest, *([] if args.dry_run else SHORT_RUN)])
    if loaded.path.resolve() != block.path.resolve() and not args.overrides:
        return "parsed", "dry-run from its header"
    from test_recipes import embedded, narrow

    quick = ["training.batch_size=4", "training.precision=no"]
    small = [*quick, *embedded(loaded.recipe, PEOPLE[0]), *narrow(loaded.recipe), "--dry-run"]
    _carried_out(["run", args.recipe, *args.overrides, *small])
    return "dry-run", "on embedded data"


class _Parsed(Exception):
    """A script's arguments are right."""


def _script(words: list[str]) -> Row:
    """Run a script up to where its arguments are parsed."""
    script = ROOT / words[0]
    assert script.exists(), f"there is no {words[0]}"
    if script.name == "train.py":
        load(words[1], [word for word in words[2:] if "=" in word])
        return "parsed", "the recipe loads"

    def stopping(parse: Any) -> Any:
        def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            raise _Parsed(parse(self, *args, **kwargs))

        return stop

    methods = {
        name: stopping(getattr(argparse.ArgumentParser, name)) for name in ("parse_args", "parse_intermixed_args")
    }
    try:
        with patch.multiple(argparse.ArgumentParser, **methods), patch.object(sys, "argv", words):
            runpy.run_path(str(script), run_name="__main__")
    except _Parsed as parsed:
        found = [value for value in vars(parsed.args[0]).values() if isinstance(value, str) and _is_recipe(value)]
        for name in found:
            load(name)
        return "parsed", "its arguments fit"
    raise AssertionError(f"{words[0]} ran without parsing arguments")


def _launch(words: list[str]) -> Row:
    """`accelerate launch ... scripts/train.py RECIPE ...`, by accelerate's own parser."""
    if "accelerate" not in words:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return _script(words[script:])
    words = words[words.index("accelerate") :]
    if words[1] != "launch":
        return "skipped", "asks questions at a terminal"
    launcher = importlib.import_module("accelerate.commands.launch").launch_command_parser()
    args = launcher.parse_args(words[2:])
    if args.config_file:
        assert (ROOT / args.config_file).exists() or Path(args.config_file).exists(), args.config_file
    rest = args.training_script_args
    if args.training_script == "entrecipes":  # -m entrecipes run ...
        rest = rest[1:]
    else:
        assert (ROOT / args.training_script).exists(), args.training_script
    load(rest[0], [word for word in rest[1:] if "=" in word])
    return "parsed", "accelerate takes it, the recipe loads"
