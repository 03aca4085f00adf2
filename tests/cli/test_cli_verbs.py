"""The command line: its surface, its exit codes, its speed, and that reading recipes never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrecipes import cli
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.load import RECIPES, load, packaged

GOOD = """\
description: A small recipe
pipeline: {pretrained: some/model}
data: {type: digits}
training: {images: 50k}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_verbs_are_these() -> None:
    assert cli.VERBS == (
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


def test_help_names_every_verb_and_imports_no_torch() -> None:
    code = "import sys; from entrecipes.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(cli.VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "entrecipes 0.1.0\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["shwo"], "error: there is no verb 'shwo'; did you mean 'show'? `entrecipes --help` lists them\n"),
        (["show", "digits/dmo"], "error: there is no recipe 'digits/dmo'; did you mean 'digits/demo'?"),
        (["ls", "nose"], "error: there is nothing called 'nose' to list; did you mean 'noise'? Try: recipes, "),
        (["validate", "nowhere"], "error: there is no recipe 'nowhere'. `entrecipes ls recipes` lists"),
        (["validate", "."], "error: .: no recipe (*.yaml) in this folder"),
        (["show"], "usage: entrecipes show"),
        (["show", "digits/demo", "--resolvd"], "usage: entrecipes show"),
        (["schema", "-o", "no/such.json"], "error: no/such.json: can't be written (No such file or directory)\n"),
    ],
)
def test_mistakes_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.out == ""


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("entrecipes.cli.show.load", interrupt, raising=False)
    assert cli.main(["show", "digits/demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


QUICK = [["ls"], ["show", "digits/demo"], ["validate", str(RECIPES)]]


@pytest.mark.parametrize("argv", QUICK, ids=lambda argv: argv[0])
def test_looking_at_recipes_is_quick_and_torch_free(argv: list[str]) -> None:
    code = "import sys; from entrecipes.cli import main; sys.exit(main(sys.argv[1:]) + 10 * ('torch' in sys.modules))"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        if min(seconds) < 1:
            return
    pytest.fail(f"entrecipes {argv[0]} took {min(seconds):.2f} s")


def test_ls_lists_recipes_and_every_registered_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == {*packaged(), *(name for wing in REGISTRY.values() for name in wing)}
    assert any(line.split(maxsplit=1) == ["digits/demo", load("digits/demo").recipe.description] for line in lines)


def test_ls_lists_one_wing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "noise"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "noise" and [row.split()[0] for row in rows] == list(REGISTRY["noise"])
    assert "  log_normal    EDM's normal density over log sigma. [Karras et al. 2022 (EDM)]" in rows


def test_show_prints_the_file_or_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "digits/demo"]) == 0
    assert capsys.readouterr().out == packaged()["digits/demo"].read_text()
    assert cli.main(["show", "digits/demo", "--resolved", "training.images=4k"]) == 0
    Path("r.yaml").write_text(capsys.readouterr().out)
    assert load("r.yaml").recipe == load("digits/demo", ["training.images=4k"]).recipe


def test_options_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "digits/demo", "training.images=4k", "--resolved", "training.seed=3"]) == 0
    assert "seed: 3" in capsys.readouterr().out


def test_show_warns_of_keys_without_effect(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD + "objective: {p2_k: 2}\n")
    assert cli.main(["show", "r.yaml"]) == 0
    warning = "warning: r.yaml:5: objective.p2_k: has no effect with objective.weighting: none\n"
    assert capsys.readouterr().err == warning


def test_validate_searches_in_depth_and_skips_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.yaml", "deep/er/b.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(GOOD)
    Path("accelerate").mkdir()
    Path("accelerate/cpu.yaml").write_text("use_cpu: true\n")
    assert cli.main(["validate", ".", "a.yaml"]) == 0
    assert capsys.readouterr().out == "2 recipes valid\n"


def test_validate_counts_every_packaged_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path for path in RECIPES.rglob("*.yaml") if "accelerate" not in path.parts}
    assert cli.main(["validate", str(RECIPES)]) == 0
    assert capsys.readouterr().out == f"{len(files)} recipes valid\n"


def test_validate_reports_all_files_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.yaml").write_text(GOOD + "a: 1\n")
    Path("v.yaml").write_text("extends: base.yaml\nb: 1\n")
    Path("w.yaml").write_text("extends: base.yaml\n")
    assert cli.main(["validate", "."]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 2 problems"
    assert [line.split(": ")[:2] for line in lines[1:]] == [["  base.yaml:5", "a"], ["  v.yaml:2", "b"]]


def test_cp_copies_verbatim_and_keeps_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cp", "digits/demo"]) == 0
    assert Path("demo.yaml").read_bytes() == packaged()["digits/demo"].read_bytes()
    Path("demo.yaml").write_text("mine")
    assert cli.main(["cp", "digits/demo"]) == 2
    assert "demo.yaml exists; give another name, or overwrite it with --force" in capsys.readouterr().err
    assert Path("demo.yaml").read_text() == "mine"
    assert cli.main(["cp", "digits/demo", "--force"]) == 0
    assert load("demo.yaml").recipe == load("digits/demo").recipe


@pytest.mark.parametrize("name", packaged())
def test_a_copy_of_any_recipe_loads_anywhere(name: str) -> None:
    assert cli.main(["cp", name, "some/where/mine.yaml"]) == 0
    assert load("some/where/mine.yaml").recipe == load(name).recipe


def test_a_copied_variant_still_finds_its_base() -> None:
    Path("my recipes").mkdir()
    Path("my recipes/base.yaml").write_text(GOOD)
    Path("my recipes/v.yaml").write_text("# a variant\nextends: 'base.yaml'  # the base\ntraining: {seed: 3}\n")
    assert cli.main(["cp", "my recipes/v.yaml", "there/w.yaml"]) == 0
    assert Path("there/w.yaml").read_text() == (
        '# a variant\nextends: "../my recipes/base.yaml"  # the base\ntraining: {seed: 3}\n'
    )
    assert load("there/w.yaml").recipe == load("my recipes/v.yaml").recipe


def test_schema_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert cli.main(["schema", "-o", "schema.json"]) == 0
    assert json.loads(Path("schema.json").read_text()) == printed
    assert printed["properties"].keys() >= {"extends", "pipeline", "data", "noise", "training"}
