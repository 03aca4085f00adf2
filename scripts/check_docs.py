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
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/recipes")]
FOLDER = tempfile.TemporaryDirectory(prefix="check-docs-")
"""Everything is written there, caches as well."""
os.environ["ENTRECIPES_HOME"] = os.environ["HF_HOME"] = f"{FOLDER.name}/home"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from doc_blocks import Block, blocks, header, pages, recipes  # noqa: E402
from doc_commands import PEOPLE, check_block  # noqa: E402
from doc_folder import make_prepared  # noqa: E402
from test_recipes import stand_ins  # noqa: E402


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
        PEOPLE.append(Path(folder) / "people")
        maker = multiprocessing.get_context("fork").Process(target=_prepare, args=(prepared,))
        maker.start()  # not here: a process that has trained must not be forked
        maker.join()
        if maker.exitcode:
            return maker.exitcode
        for path in chosen:
            found = [header(path)] if path.suffix == ".yaml" else blocks(path)
            for place, how, note in _in_child(found, prepared, Path(folder)):
                totals[how] += 1
                failed += how == "FAILED"
                if args.verbose or how not in ("executed", "output"):
                    print(f"{how:9} {place:36} {note}", flush=True)
    print(f"\n{', '.join(f'{count} {how}' for how, count in totals.most_common())}; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _prepare(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_prepared(folder)
        PEOPLE[0].mkdir()
        stand_ins(PEOPLE[0])


def _in_child(found: list[Block], prepared: Path, folder: Path) -> list[tuple[str, str, str]]:
    """The rows of one page, from a process of its own: plugins that it registers end with it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_page, args=(found, prepared, folder, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        return [(found[0].place, "FAILED", f"the process died with exit code {child.exitcode}")]
    finally:
        child.join()


def _page(found: list[Block], prepared: Path, folder: Path, pipe) -> None:
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
    pipe.send(rows)
    pipe.close()
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
