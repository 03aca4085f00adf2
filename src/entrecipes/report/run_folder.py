"""Reading the folder that a run leaves (or is still writing): its recipe, its records and its facts."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from entrecipes.errors import UserError
from entrecipes.recipe import tree

RUN_KEYS = ("name", "description", "license", "data", "pipeline", "versions")


class RunFolder:
    """The run folder `outputs/<recipe>/`, read on demand.

    Args:
        path: The folder. A run that is still going on may lack any of its files; each property names the one it needs.
        assets: Where its pictures are drawn; None: into its `assets/`.

    Raises:
        UserError: When there is no such folder.
    """

    def __init__(self, path: str | Path, assets: Path | None = None) -> None:
        self.path = Path(path)
        self.assets = assets or self.path / "assets"
        if not self.path.is_dir():
            raise UserError(f"{self.path}: there is no such folder; give the run folder, such as outputs/digits")

    def has(self, name: str) -> bool:
        """Whether the run has written that file."""
        return (self.path / name).is_file()

    @cached_property
    def run(self) -> dict[str, Any]:
        """The facts of `run.json`: what was trained on what, how fast, and the final metrics.

        Raises:
            UserError: When the file is missing, no JSON, or lacks a key that the card needs.
        """
        text = self._read("run.json")
        try:
            run = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._corrupt("run.json", error.lineno, error.msg) from None
        missing = [key for key in RUN_KEYS if key not in run] if isinstance(run, dict) else RUN_KEYS
        if missing:
            raise UserError(f"{self.path / 'run.json'}: {', '.join(missing)} missing; resume the run to write it again")
        return run

    @cached_property
    def recipe_text(self) -> str:
        """The recipe as its author wrote it, comments included. Raises `UserError` when it is missing."""
        return self._read("recipe.source.yaml")

    @cached_property
    def resolved_text(self) -> str:
        """The recipe with every default and override written out. Raises `UserError` when it is missing."""
        return self._read("recipe.yaml")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values. Raises `UserError` when it is missing or no YAML."""
        root, problems = tree.parse(self.resolved_text, str(self.path / "recipe.yaml"))
        if root is None:
            raise UserError(f"{problems[0]}; resume the run to write it again")
        return tree.plain(root)

    def metrics(self, *kinds: str) -> list[dict[str, Any]]:
        """The records of these kinds (`train`, `held_out`, `metric`, `event`, `start`), oldest first."""
        return [record for record in self._records if record["kind"] in kinds]

    @property
    def samples(self) -> list[tuple[str, Path]]:
        """The sample grids, oldest first, each with its image count (`20,000 images`) or file name."""
        paths = sorted(self.path.glob("samples/*.png"), key=lambda path: (path.stem == "final", path.name))
        return [(_image_count(path.stem), path) for path in paths]

    @property
    def moving(self) -> Path | None:
        """The newest samples as an animation, which clips have beside the grid."""
        path = self.samples[-1][1].with_suffix(".gif") if self.samples else None
        return path if path and path.is_file() else None

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        if not self.has("metrics.jsonl"):
            return records
        lines = self._read("metrics.jsonl").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                record["kind"], record["images"]
            except (json.JSONDecodeError, KeyError, TypeError):
                if number == len(lines):  # no newline at its end: the run was stopped in the middle of writing it
                    break
                self._refuse(self._corrupt("metrics.jsonl", number, "no record with 'kind' and 'images'"))
                continue
            records.append(record)
        return records

    def _refuse(self, damage: UserError) -> None:
        """What a damaged line of the records means; a reader that passes over it overrides this."""
        raise damage from None

    def _read(self, name: str) -> str:
        path = self.path / name
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"{path}: not there; is this a run folder, and has the run come that far? "
                "`entrecipes run RECIPE` starts it or goes on with it"
            ) from None
        except UnicodeDecodeError:
            raise self._corrupt(name, 1, "not UTF-8 text") from None

    def _corrupt(self, name: str, line: int, problem: str) -> UserError:
        return UserError(f"{self.path / name}:{line}: {problem}; put back a good copy, or remove it and resume the run")


def _image_count(stem: str) -> str:
    """`images-000000020000` -> `20,000 images`; `final` as it is."""
    count = re.search(r"\d+", stem)
    return f"{int(count[0]):,} images" if count else stem
