"""The folder that an adapter is published in, whatever its kind, and the base that it belongs to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._guards import detect_fake_mode

from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint

FOLDER = "adapter"
"""Of a run folder: where an adapter is published."""
BASE_FILE = "base.json"


@dataclass(frozen=True)
class Base:
    """What an adapter lies beside."""

    source: str
    """Hub id; or a folder, relative to the adapter's."""
    revision: str | None
    """Of the Hub id."""
    local: bool
    """Whether it is a folder."""
    fingerprint: str
    """Of its weights, before they were quantised."""
    quantised: tuple[str, ...] = ()
    """Linear layers that were held in fewer bits."""
    quantise: str | None = None
    """Which: `nf4` or `int8`."""

    @classmethod
    def of(cls, pretrained: str, revision: str | None, folder: Path, **facts: Any) -> Base:
        """A pipeline as a recipe names it, as seen from the adapter's folder."""
        local = Path(pretrained).is_dir()
        source = os.path.relpath(pretrained, folder) if local else pretrained
        return cls(source, revision, local, **facts)

    def found_from(self, folder: Path) -> str:
        """The Hub id or folder, for the adapter in `folder`."""
        return os.path.normpath(folder / self.source) if self.local else self.source

    def write(self, folder: Path) -> None:
        """Leave it in the adapter's folder."""
        (folder / BASE_FILE).write_text(self.to_json())

    def to_json(self) -> str:
        """What is in the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def check(self, model: nn.Module, folder: Path) -> None:
        """Raises UserError unless a model has the weights that the adapter in `folder` was trained beside."""
        if base_fingerprint(model) != self.fingerprint:
            raise UserError(
                f"{folder}: this adapter was trained on other weights than {self.found_from(folder)} holds now; put "
                f"that base back, or name it in {folder / BASE_FILE}"
            )


def base_fingerprint(model: nn.Module) -> str:
    """Hash of the names and values of all weights; none of weights without memory, as a rehearsed step has them."""
    if detect_fake_mode():
        return ""
    state = model.state_dict()
    return fingerprint(*(part for name in sorted(state) for part in (name, state[name])))


def adapter_folder(source: str) -> Path | None:
    """The folder of an adapter that we have saved: this one, or the one in this run folder; None: there is none."""
    return next((path for path in (Path(source), Path(source) / FOLDER) if (path / BASE_FILE).is_file()), None)


def read_base(folder: Path) -> Base:
    """What the adapter in a folder belongs to. Raises UserError when that can't be read."""
    try:
        record = json.loads((folder / BASE_FILE).read_text())
        quantise = record.get("quantise", "nf4" if record["quantised"] else None)  # which once was all there was
        return Base(**record | {"quantised": tuple(record["quantised"]), "quantise": quantise})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / BASE_FILE}: damaged ({error}); resume the run to write it again") from error
