"""The comparison script runs and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml
from tiny import tiny

SCRIPTS = Path(__file__).parents[2] / "scripts"


def call(folder: Path, script: str, *arguments: str) -> tuple[str, dict]:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    command = [sys.executable, str(SCRIPTS / script), *arguments, "--json", "numbers.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "numbers.json").read_text())


def test_the_speed_comparison_times_all_three(tmp_path):
    arguments = ["--recipe", "tiny.yaml", "--repetitions", "3", "--steps", "2"]
    said, numbers = call(tmp_path, "benchmark_training.py", *arguments)
    assert set(numbers["images_per_second"]) == {"trainer", "bare", "usual form"}
    assert all(len(rates) == 3 and min(rates) > 0 for rates in numbers["images_per_second"].values())
    assert "trainer against the usual form" in said
