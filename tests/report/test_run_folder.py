"""Reading a run folder: what it holds, and what is said of missing and damaged files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from entrecipes.errors import UserError
from entrecipes.report.run_folder import RunFolder


def test_reads_what_the_run_wrote(run_folder: Path) -> None:
    folder = RunFolder(run_folder)
    assert folder.run["name"] == "digits/unet"
    assert folder.recipe["training"]["images"] == 40_000
    assert folder.recipe_text.startswith("# Digits")
    train = folder.metrics("train")
    assert len(train) == 100 and train[-1]["images"] == 40_000
    assert [record["kind"] for record in folder.metrics("start", "event")] == ["start", "event"]
    assert [label for label, _ in folder.samples] == ["20,000 images", "40,000 images", "final"]


def test_a_line_cut_short_by_a_kill_is_left_out(run_folder: Path) -> None:
    before = len(RunFolder(run_folder).metrics("train"))
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ima')
    assert len(RunFolder(run_folder).metrics("train")) == before


@pytest.mark.parametrize(
    ("name", "content", "reads", "message"),
    [
        ("run.json", None, "run", r"run\.json: not there.*entrecipes run"),
        ("run.json", '{"name": "x",\n', "run", r"run\.json:2: .*resume the run"),
        ("run.json", '{"name": "x"}', "run", r"run\.json: description, license, .* missing"),
        ("run.json", "[]", "run", r"run\.json: name, .* missing"),
        ("recipe.source.yaml", None, "recipe_text", r"recipe\.source\.yaml: not there"),
        ("recipe.yaml", "a: [1,\nb: }", "recipe", r"recipe\.yaml:2: not valid YAML"),
        ("recipe.yaml", b"\xff\xfe\x00", "recipe", r"recipe\.yaml:1: not UTF-8 text"),
    ],
)
def test_damage_is_named_with_what_to_do(
    run_folder: Path, name: str, content: str | bytes | None, reads: str, message: str
) -> None:
    if content is None:
        (run_folder / name).unlink()
    else:
        (run_folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        getattr(RunFolder(run_folder), reads)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("line", ["{half", '{"kind": "train"}', "[1, 2]"])
def test_a_damaged_record_in_the_middle_is_an_error(run_folder: Path, line: str) -> None:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:5: "):
        RunFolder(run_folder).metrics("train")


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        RunFolder(tmp_path / "nothing")
