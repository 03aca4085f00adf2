"""The `entrecipes` command: one file a verb, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from entrecipes import __version__
from entrecipes.errors import UserError, nearest

VERBS = (
    "ls",
    "show",
    "cp",
    "validate",
    "schema",
    "run",
    "compare",
    "generate",
    "evaluate",
    "diagnose",
    "score",
    "report",
    "push",
    "pull",
    "data",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        argv: The arguments; None: the process's own.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 after Ctrl-C.
    """
    # Imported by diffusers, it warns about an optional kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    verb, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    try:
        if verb in ("-h", "--help"):
            print(_overview())
            return 0
        if verb == "--version":
            print(f"entrecipes {__version__}")
            return 0
        if verb not in VERBS:
            raise UserError(f"there is no verb '{verb}'{nearest(verb, VERBS) or '.'} `entrecipes --help` lists them")
        module = _module(verb)
        return module.run(_parse(module, verb, rest))
    except UserError as error:
        return _mistake(error)
    except OSError as error:  # a full disk, a folder without permission, a file that is none
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush into it at exit
            return 0
        return _mistake(f"{error.filename or 'writing'}: {error.strerror or error}; mend that, or choose another place")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse, after its own message
        return int(stop.code or 0)


def _mistake(message: object) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)
    return 2


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"entrecipes.cli.{verb}")


def _parse(module: ModuleType, verb: str, rest: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"entrecipes {verb}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    known = argparse.Namespace(words=rest)
    try:
        return parser.parse_intermixed_args(rest, known)
    except TypeError:  # a verb with verbs of its own, for which argparse has no intermixed parsing
        return parser.parse_args(rest, known)


def _overview() -> str:
    lines = [f"  {verb:10} {_module(verb).HELP}" for verb in VERBS]
    return "\n".join(
        [
            "usage: entrecipes VERB ...",
            "",
            "Training recipes for diffusion and flow models.",
            "",
            *lines,
            "",
            "`entrecipes VERB --help` says more; `entrecipes run digits/demo` is a good start.",
        ]
    )
