"""Recipes travel in the wheel, and the launcher configs start as many processes as they say."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from entrecipes.recipe.load import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_the_wheel_holds_every_recipe_and_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("src", "recipes"):
        leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=leave)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    subprocess.run([*command, str(tmp_path), str(source)], check=True, timeout=120)
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    recipes = {
        f"entrecipes/recipes/{path.relative_to(RECIPES)}"
        for path in RECIPES.rglob("*")
        if path.suffix in (".yaml", ".md")
    }
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/entrecipes").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/entrecipes").rglob("*.jinja")}
    modules |= {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/entrecipes").rglob("*.txt")}
    assert recipes and recipes <= held
    assert {path for path in modules if "/recipes/" not in path} <= held


@pytest.mark.parametrize("config, processes", [("cpu", 1), ("ddp", 2)])
def test_a_launcher_config_starts_its_processes(config: str, processes: int, tmp_path: Path) -> None:
    script = tmp_path / "size.py"
    script.write_text("from accelerate import PartialState\nprint(f'of {PartialState(cpu=True).num_processes};')\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launch, "--config_file", RECIPES / f"accelerate/{config}.yaml", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"of {processes};") == processes


@pytest.mark.parametrize("config", ["cpu", "ddp", "fsdp", "fsdp_zero2", "multi_node"])
def test_a_launcher_config_is_one_that_accelerate_reads(config: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = RECIPES / "accelerate" / f"{config}.yaml"
    read = load_config_from_file(str(path))
    assert read.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert re.search(
        rf"accelerate launch --config_file recipes/accelerate/{config}\.yaml .*scripts/train\.py", path.read_text()
    )
