"""The gallery of many runs: one page, whole, that says what it shows and what it lacks."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from chromium import PROGRAM, Chromium
from comparison_case import comparison, falling
from comparison_case import write_run as write_arm
from matplotlib.figure import Figure
from PIL import Image
from report_case import METRICS, RECIPE, RUN, gaussian_row, make_run, records, write_run
from test_noise_plots import add, noise_rows
from tiny import tiny_recipe

from entrecipes import cli
from entrecipes.errors import UserError
from entrecipes.report.comparison.page import to_json
from entrecipes.report.gallery import images
from entrecipes.report.gallery.folder import Place, TolerantFolder
from entrecipes.report.gallery.page import Gallery, write_gallery
from entrecipes.report.gallery.plots import plot_profile
from entrecipes.report.gallery.run import GalleryRun
from entrecipes.report.gallery.table import columns, summary
from entrecipes.report.plots import save_moving
from entrecipes.training.loop import train
from entrecipes.training.publish import facts
from entrecipes.training.run import Run

VOID = {"meta", "link", "img", "br"}
LEARNED = RECIPE | {"noise": {"type": "infonoise"}, "prune": {"type": "none"}, "optimizer": {"learning_rate": 0.002}}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what there is."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if attributes.get("id") else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.sources += [attributes[key] for key in ("src", "href", "srcset") if tag != "a" and attributes.get(key)]
        self.images += [attributes] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def learned(folder: Path) -> Path:
    """A finished run with a learned noise schedule, a better KID, other precision, a clip of its samples."""
    make_run(folder)
    (folder / "recipe.yaml").write_text(json.dumps(LEARNED))
    (folder / "metrics.jsonl").write_text("")
    add(folder, [row for row in records() if row["kind"] == "train"] + noise_rows())
    kid, precision = (metric.to_json() for metric in METRICS)
    found = [kid | {"value": 0.01}, precision | {"origin": precision["origin"] | {"steps": 50}}]
    write_run(folder, RUN | {"metrics": found})
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    save_moving(frames, folder / "samples" / "final.gif", scale=2)
    return folder


def torn(folder: Path) -> Path:
    """An unfinished run of which a grid, a line and a record are damaged."""
    make_run(folder)
    (folder / "run.json").unlink()
    (folder / "samples" / "images-000000020000.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    path = folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"held_out"' not in line]
    stage = json.dumps({"kind": "prune", "images": 4000, "stage": 1})
    path.write_text("\n".join([*lines[:50], '{"kind": "tra', stage, *lines[50:]]) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Two finished runs, a damaged one that goes on, and a comparison with a run of each of its arms."""
    folder = tmp_path_factory.mktemp("gallery")
    runs = [make_run(folder / "a" / "plain"), learned(folder / "b" / "learned <1>"), torn(folder / "torn")]
    compared, few = folder / "compared", {"measured": [100, 1000, 10_000]}
    arms = {
        "base": {0: write_arm(compared / "runs" / "base" / "seed-0", 0, falling(6), **few)},
        "fast arm": {0: write_arm(compared / "runs" / "fast-arm" / "seed-0", 0, falling(8), **few)},
    }
    (compared / "comparison.json").write_text(json.dumps(to_json(comparison(arms))))
    Image.new("RGB", (90, 60), "white").save(compared / "speedup.png")
    before = snapshot(folder)
    gallery = write_gallery([*runs, compared, runs[0]], folder / "pages" / "all.html")
    assert snapshot(folder) == before | {gallery.path: digest(gallery.path)}, "nothing is written into the folders"
    return gallery


@pytest.fixture(scope="module")
def page(made: Gallery) -> Page:
    return Page(made.path)


def snapshot(folder: Path) -> dict[Path, str]:
    return {path: digest(path) for path in folder.rglob("*") if path.is_file()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_whole(made: Gallery, page: Page) -> None:
    assert made.runs == 5 and made.comparisons == 1 and made.pictures == len(page.images) > 15
    assert made.bytes == made.path.stat().st_size < 3 * 2**20
    assert page.tags.count("h1") == 1 and len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids) and all(link.startswith("#") for link in page.links)
    assert not {"iframe", "object", "embed"} & set(page.tags)


def test_it_asks_for_nothing_outside_itself(made: Gallery, page: Page) -> None:
    html = made.path.read_text()
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    alts = [image["alt"] for image in page.images]
    assert all(alts) and len(set(alts)) == len(alts), "each picture is told apart in words"
    kinds = set()
    for image in page.images:
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").partition("base64,")[2]))) as picture:
            picture.load()
            kinds.add((picture.format, getattr(picture, "n_frames", 1) > 1))
    assert ("PNG", False) in kinds and ("GIF", True) in kinds


def test_every_run_says_its_state_method_and_numbers(page: Page) -> None:
    for words in (
        "5 runs, 1 comparison",
        "plain",
        "learned <1>",
        "base seed 0",
        "fast arm seed 0",
        "noise infonoise",
        "Learned from the run's own losses",
        "0.0123 ± 0.0008",
        "233.5",
        "1.23M",
        "unfinished: 40,000 of 40,000 (100%) images seen",
        "Differs from plain in 3 keys",
        "optimizer",
        "# Digits <in> two minutes.",
        "opened block <3> of 6",
    ):
        assert words in page.text, words


def test_what_is_missing_or_damaged_is_named(made: Gallery, page: Page) -> None:
    told = [problem for problem in made.problems if problem.startswith("torn: ")]
    assert len(told) == len(set(told)) >= 3
    for words in ("metrics.jsonl:51: no record", "samples/images-000000020000.png: ", "prune plots: KeyError"):
        assert any(words in problem for problem in told), (words, told)
        assert words in page.text
    assert not any(problem.startswith(("plain", "learned")) for problem in made.problems)
    assert str(made.path.parent.parent) not in made.path.read_text(), "no path of the machine"


def test_a_comparison_shows_its_arms(page: Page) -> None:
    assert "a <case> compared" in page.text and "fewer images fewer seconds" in page.text
    assert "How many times fewer images and seconds each arm needs" in page.text
    assert "baseline" in page.text and "noise.type uniform" in page.text


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(360, 800), (1280, 900)], ids=["phone", "desk"])
def test_a_browser_shows_it(
    made: Gallery, browser: Chromium, size: tuple[int, int], dark: bool, tmp_path: Path
) -> None:
    browser.open(made.path, *size, dark=dark)
    opened = "document.querySelectorAll('details').forEach(each => each.open = true)"
    broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.alt)"
    assert browser.evaluate(broken) == [] and browser.evaluate("document.images.length") == made.pictures
    browser.evaluate(opened)
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0], "only boxes scroll sideways"
    assert browser.evaluate("[...document.images].every(image => image.getBoundingClientRect().width <= innerWidth)")
    assert browser.complaints == [] and [asked for asked in browser.requests if not asked.startswith("data:")] == [
        made.path.as_uri()
    ]
    with Image.open(browser.screenshot(tmp_path / "page.png")) as shot:
        corner = shot.convert("L").getpixel((2, 2))
    assert corner < 64 if dark else corner > 192


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
def test_headings_sort_by_tap_and_by_key(made: Gallery, browser: Chromium) -> None:
    browser.open(made.path, 360, 800)
    order = "[...document.querySelectorAll('.sortable tbody th')].map(cell => cell.dataset.value)"
    heads = "[...document.querySelectorAll('.sortable thead th')]"
    number = f"{heads}.findIndex(head => head.textContent.includes('kid_efflite0_1k'))"
    assert browser.evaluate(order) == ["plain", "learned <1>", "torn", "base seed 0", "fast arm seed 0"]
    browser.evaluate(f"{heads}[{number}].querySelector('button').click()")
    assert browser.evaluate(order)[0] == "learned <1>", "0.01 before 0.0123; no value comes last"
    assert browser.evaluate(f"{heads}[{number}].ariaSort") == "ascending"
    browser.evaluate(f"{heads}[0].querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert browser.evaluate(order) == ["base seed 0", "fast arm seed 0", "learned <1>", "plain", "torn"]
    assert browser.evaluate(f"{heads}.map(head => head.ariaSort).filter(Boolean)") == ["ascending"]


# -- the table --------------------------------------------------------------------------------------------------------


def rows_of(folders: dict[str, Path], tmp_path: Path) -> list[GalleryRun]:
    return [GalleryRun(Place(path), name, name, n, tmp_path / str(n)) for n, (name, path) in enumerate(folders.items())]


def with_metrics(folder: Path, kid: float, origin: dict[str, Any] | None = None, **recipe: Any) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | recipe))
    metric = METRICS[0].to_json()
    write_run(folder, RUN | {"metrics": [metric | {"value": kid, "origin": metric["origin"] | (origin or {})}]})
    return folder


def test_the_best_is_marked_only_among_the_same_metric(tmp_path: Path) -> None:
    runs = rows_of(
        {
            "a": with_metrics(tmp_path / "a", 0.2, {"training_seed": 1, "images": 7}),
            "b": with_metrics(tmp_path / "b", 0.1),
            "c": with_metrics(tmp_path / "c", 0.05, {"steps": 50}),
            "d": with_metrics(tmp_path / "d", 0.01, data={"type": "digits", "image_size": 16, "num_workers": 3}),
            "e": with_metrics(tmp_path / "e", 0.3, data={"type": "digits", "image_size": 16}),
        },
        tmp_path,
    )
    shown = columns(runs)
    assert [(column.note, sorted(column.found)) for column in shown] == [
        ("steps 20, no image_size", ["run-1", "run-2"]),
        ("steps 20, image_size 16", ["run-4", "run-5"]),
        ("steps 50", ["run-3"]),
    ]
    best = {run: [cell.best for cell in cells[4:]] for run, cells in summary(runs, shown).items()}
    assert best == {
        "run-1": [False] * 3,
        "run-2": [True, False, False],
        "run-3": [False] * 3,
        "run-4": [False, True, False],
        "run-5": [False] * 3,
    }
    assert [cell.text for cell in summary(runs, shown)["run-1"][:4]] == ["40,000", "233.5", "0.71", "1.23M"]


def test_an_unfinished_run_is_never_the_best(tmp_path: Path) -> None:
    folders = {name: with_metrics(tmp_path / name, 0.2) for name in "ab"}
    row = METRICS[0].to_json() | {"kind": "metric", "images": 100, "value": 0.001}
    going = tmp_path / "going"
    going.mkdir()
    (going / "recipe.yaml").write_text(json.dumps(RECIPE))
    (going / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    runs = rows_of(folders | {"going": going}, tmp_path)
    cells = [cells[4] for cells in summary(runs, columns(runs)).values()]
    assert [cell.value for cell in cells] == [0.2, 0.2, 0.001] and [cell.best for cell in cells] == [True, True, False]
    assert runs[2].state == "unfinished: 100 of 40,000 (0%) images seen"


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_the_heat_map_holds_the_gated_rate() -> None:
    rows = [gaussian_row(0, 3.0), gaussian_row(1000, 0.5), gaussian_row(2000, 0.1)]
    nats = [np.array(row["rate"]) * np.array(row["gate"]) for row in rows]
    axes = Figure().subplots()
    plot_profile(axes, rows, nats, learned=False)
    drawn = axes.collections[0].get_array().reshape(32, 3)
    assert np.allclose(drawn, np.stack(nats, axis=1))
    assert axes.get_xlim() == (0, 2000) and axes.get_ylabel() == "log sigma"


def test_the_heat_map_marks_the_window_of_the_draws() -> None:
    rows = noise_rows(pivot=0.2)
    axes = Figure().subplots()
    plot_profile(axes, rows, [np.ones(32)] * len(rows), learned=True)
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert np.allclose(lines["90 % of the draws"], np.log([row["quantiles"][0] for row in rows]))
    assert np.allclose(lines["pivot of the gate"], np.log(0.2))


def test_pictures_stay_light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LIGHT", 1000), monkeypatch.setattr(images, "LIGHT_MOVING", 1000)
    noise = np.random.default_rng(0).integers(0, 256, (60, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    frames = [Image.fromarray(noise[:, at : at + 600]) for at in range(0, 900, 100)]
    frames[0].save(tmp_path / "large.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)
    for source, limit in ((images.still(tmp_path / "large.png"), 1200), (images.moving(tmp_path / "large.gif"), 600)):
        with Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) as picture:
            assert picture.format == "WEBP" and picture.width == limit
            assert getattr(picture, "n_frames", 1) == (9 if limit == 600 else 1)
        assert len(source) < (tmp_path / ("large.png" if limit == 1200 else "large.gif")).stat().st_size


def test_a_small_grid_stays_exact(run_folder: Path) -> None:
    path = run_folder / "samples" / "final.png"
    with Image.open(io.BytesIO(base64.b64decode(images.still(path).partition("base64,")[2]))) as kept:
        assert np.array_equal(np.asarray(kept.convert("L")), np.asarray(Image.open(path)))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "metrics.jsonl", "recipe.source.yaml"])
def test_a_damaged_file_counts_as_missing(run_folder: Path, name: str, tmp_path: Path) -> None:
    (run_folder / name).write_bytes(b"\xff\xfe{")
    folder = TolerantFolder(run_folder, tmp_path)
    assert not folder.has(name) and any(problem.startswith(f"{name}:1: ") for problem in folder.problems)
    run = GalleryRun(Place(run_folder), "x", "x", 0, tmp_path)
    assert run.finished == (name != "run.json") and len(run.samples) == 2 and run.recipe_text


def test_a_run_that_has_only_started_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "start", "images": 0, "world_size": 2}\n')
    page = Page(write_gallery([tmp_path / "run"], tmp_path).path)
    assert "unfinished: 0 images seen" in page.text and "recipe.yaml is missing" in page.text
    assert "No samples so far." in page.text and not page.images


def test_a_real_run_has_a_page(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = tiny_recipe(training={"images": 96, "log_every": 32}, evaluation={"every": 32})
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    (folder / "recipe.source.yaml").write_text("description: tiny\n")
    run = Run(recipe, folder)
    train(run)
    (folder / "run.json").write_text(json.dumps(facts(run, "tiny", peak_gib=0.5)))
    gallery = write_gallery([folder], tmp_path / "tiny.html", title="A <tiny> run")
    page = Page(gallery.path)
    assert gallery.problems == () and "A <tiny> run" in page.text and "noise log_normal" in page.text
    shown = " ".join(image["alt"] or "" for image in page.images)
    for what in ("Sample grid of tiny", "Training loss against", "Nats at each noise level over the images seen"):
        assert what in shown, what
    assert "heldout_nats" in page.text


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("entrecipes.report.gallery.page.HEAVY", 100)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(RECIPE))
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "deep" / "page.html")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/deep/page.html: 1 run, 0.0 MB\n"
    assert "warning: run: metrics.jsonl is missing or damaged: there are no curves\n" in said.err
    assert "which opens slowly on a phone: give fewer runs to a page" in said.err


def test_mistakes_are_told(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there is no such folder; give run folders"):
        write_gallery([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(UserError, match=r"samples: no run folder: none of recipe.yaml, metrics.jsonl, run.json"):
        write_gallery([run_folder / "samples"], tmp_path)
    with pytest.raises(UserError, match=rf"there are runs below it: entrecipes report {run_folder}$"):
        write_gallery([run_folder.parent], tmp_path)
    with pytest.raises(UserError, match=r"page\.htm: the gallery is one HTML file; name it page\.html"):
        write_gallery([run_folder], tmp_path / "page.htm")
