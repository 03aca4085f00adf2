"""Run every code block and every command of README, docs and recipes, as far as a machine like this can; say how.

python scripts/check_docs.py                    # all; exits with 1 when anything fails
python scripts/check_docs.py docs/noise.md      # some pages or recipes

Python blocks run in turn in a fresh folder for each page, which holds small pipelines and data (tests/doc_folder.py),
with the numbers of tests/doc_blocks.py in place of large ones. Recipes are validated. Commands are parsed by the real
parsers and their recipes loaded. `run` trains what a page wrote itself, for a moment, and dry-runs the recipes that
come along, from their headers and with the changes of the pages, on embedded data. What only looks, and what reads
a run that is there, is carried out.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/recipes")]
if __name__ == "__main__":  # and not in its children, which inherit the environment
    FOLDER = tempfile.TemporaryDirectory(prefix="check-docs-")
    """Everything is written there, caches as well."""
    os.environ["ENTRECIPES_HOME"] = os.environ["HF_HOME"] = f"{FOLDER.name}/home"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from doc_blocks import Block, blocks, header, pages, recipes  # noqa: E402
from doc_commands import PEOPLE, check_block  # noqa: E402
from doc_folder import make_prepared  # noqa: E402
from test_recipes import stand_ins  # noqa: E402

FRESH = multiprocessing.get_context("spawn")


def main() -> int:
    """Check, and print one line for each block or command that is not run as it stands, and each failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="pages or recipes (all)")
    parser.add_argument("-v", "--verbose", action="store_true", help="list what is run as it stands, too")
    args = parser.parse_args()
    chosen = [path.resolve() for path in args.paths] or [*pages(), *recipes()]
    began, totals, failed = time.monotonic(), Counter(), 0
    with FOLDER as folder:
        prepared = Path(folder) / "prepared"
        if code := _exit_code(_prepare, prepared):
            return code
        headers = [header(path) for path in chosen if path.suffix == ".yaml"]
        for found in [*(blocks(path) for path in chosen if path.suffix != ".yaml"), headers]:
            for place, how, note in _in_child(found, prepared, Path(folder)) if found else ():
                totals[how] += 1
                failed += how == "FAILED"
                if args.verbose or how not in ("executed", "output"):
                    print(f"{how:9} {place:36} {note}", flush=True)
    print(f"\n{', '.join(f'{count} {how}' for how, count in totals.most_common())}; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _exit_code(work: Callable[..., None], *arguments: Any) -> int:
    """Of a process of its own: started afresh, since a forked one inherits what threads have left of the heap."""
    child = FRESH.Process(target=work, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def _prepare(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_prepared(folder)
        people = folder.with_name("people")
        people.mkdir()
        stand_ins(people)


def _in_child(found: list[Block], prepared: Path, folder: Path) -> list[tuple[str, str, str]]:
    """The rows of one page, from a process of its own: plugins that it registers end with it."""
    said = folder / "rows.json"
    said.unlink(missing_ok=True)
    code = _exit_code(_page, found, prepared, folder, said)
    if said.exists():
        return json.loads(said.read_text())
    return [(found[0].place, "FAILED", f"the process died with exit code {code}")]


def _page(found: list[Block], prepared: Path, folder: Path, output: Path) -> None:
    PEOPLE.append(folder / "people")
    work = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(prepared, work, dirs_exist_ok=True, symlinks=True)
    rows, names = [], {"__name__": "page"}
    for block in found:
        os.chdir(work)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                for row in check_block(block, names, work):
                    rows.append((block.place, *row))
        except BaseException as error:  # whatever a block does, SystemExit included
            tail = "\n".join(said.getvalue().splitlines()[-8:])
            where = traceback.format_exc(limit=-3)
            rows.append((block.place, "FAILED", f"{type(error).__name__}: {error}\n{where}\n{tail}"))
    output.write_text(json.dumps(rows))
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
