"""Train the same recipes by one process and by two, and say where what they leave differs."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

DRIVER = Path(__file__).with_name("drive.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
CLOCK = {"seconds", "images_per_second", "peak_memory_gib", "scoring_seconds", "measuring_seconds", "ce"}
"""What a row says of the machine, and not of the model."""
LATEST = 300
"""Seconds after which processes that have not ended are a failure."""


def write(
    folder: Path, recipes: dict[str, dict[str, Any]], part: str, changes: Mapping[str, list[str]] = MappingProxyType({})
) -> Path:
    """A list for the driver; the runs go to folders of their names in `part`."""
    entries = []
    for name, recipe in recipes.items():
        path = folder / f"{slug(name)}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))  # plain, since recipes know no aliases
        entries.append([str(path), str(folder / part / slug(name)), *changes.get(name, [])])
    listed = folder / f"{part}.json"
    listed.write_text(json.dumps(entries))
    return listed


def slug(name: str) -> str:
    """A case's name as a folder's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def together(command: Sequence[object], folder: Path, processes: int = 2) -> list[subprocess.Popen]:
    """Start a python command in several gloo processes, as a launcher would; what they say goes to `folder`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with said(folder, rank).open("w") as log:
            environment = {**os.environ, **ENVIRONMENT, **group, **own}
            call = [sys.executable, *map(str, command)]
            started.append(subprocess.Popen(call, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def said(folder: Path, rank: int) -> Path:
    """Where a process says what it does."""
    return folder / f"process-{rank}.log"


def wait(started: Sequence[subprocess.Popen], folder: Path) -> None:
    """Until all have ended well."""
    try:
        codes = [process.wait(LATEST) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(said(folder, rank).read_text()[-2000:] for rank in range(len(codes)))


def lines(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The log's rows of these kinds."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] in kinds]


def losses(folder: Path) -> list[float]:
    """The loss curve."""
    return [row["loss"] for row in lines(folder, "train")]


def apart(one: Any, two: Any, relative: float, absolute: float, place: str = "") -> Iterator[str]:
    """Where two nested values differ by more than that much, in words."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one.keys() - CLOCK:
            yield from apart(one[key], two[key], relative, absolute, f"{place}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for i, pair in enumerate(zip(one, two, strict=True)):
            yield from apart(*pair, relative, absolute, f"{place}[{i}]")
    elif isinstance(one, float) and isinstance(two, float):
        if not math.isclose(one, two, rel_tol=relative, abs_tol=absolute):
            yield f"{place}: {one} and {two}"
    elif one != two:
        yield f"{place}: {one} and {two}"


def weights(folder: Path) -> dict[str, Tensor]:
    """The final checkpoint's weights and their average."""
    last = sorted(folder.glob("checkpoints/images-*"))[-1]
    files = [last / f"{part}.safetensors" for part in ("model", "ema")]
    return {f"{path.stem} {name}": v for path in files if path.exists() for name, v in load_file(path).items()}


def picture(path: Path) -> np.ndarray:
    """An image's numbers."""
    with Image.open(path) as image:
        return np.asarray(image).astype(int)
