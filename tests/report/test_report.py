"""The HTML report: self-contained, escaped, and written from whatever there is."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from entrecipes.errors import UserError
from entrecipes.report.card import write_card
from entrecipes.report.report import write_report

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects ids, links, images and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: dict[str, str] = {}
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert tag not in {"script", "iframe", "object"}
        self.ids.add(attributes.get("id") or "")
        if tag in {"a", "link"}:
            self.links.append(attributes["href"] or "")
        if tag == "img":
            self.images[attributes["alt"] or ""] = attributes["src"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_report_of_a_finished_run(run_folder: Path) -> None:
    write_card(run_folder)
    path = write_report(run_folder)
    page = Page(path)
    sections = {"result", "samples", "curves", "noise-levels", "events", "recipe", "speed", "data", "environment"}
    assert sections <= page.ids
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert "README.md" in page.links
    assert "0.0123 ± 0.0008" in page.text and "EfficientNet-Lite0 at 112 px" in page.text
    assert "233.5 images/s" in page.text and "CC BY 4.0" in page.text
    assert "started with 1 process on cpu" in page.text


def test_report_needs_nothing_outside_itself(run_folder: Path) -> None:
    path = write_report(run_folder)
    html = path.read_text()
    page = Page(path)
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert len(page.images) == 3 + 4, "three sample grids and four curves"
    for source in page.images.values():
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.verify()


def test_what_users_write_is_escaped(run_folder: Path) -> None:
    html = write_report(run_folder).read_text()
    assert "opened block <3>" not in html and "opened block &lt;3&gt; of 6" in html
    assert "Digits <in>" not in html and "Digits &lt;in&gt; two minutes" in html


def test_report_while_the_run_goes_on(run_folder: Path) -> None:
    (run_folder / "run.json").unlink()
    page = Page(write_report(run_folder))
    assert "This run has not finished: 40,000 images seen so far." in page.text
    assert "0.0123 ± 0.0008" in page.text, "from metrics.jsonl"
    assert "Digits, class-conditional" in page.text
    assert "speed" not in page.ids and "README.md" not in page.links


def test_report_of_a_run_that_has_only_started(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "images": 0, "world_size": 2}\n')
    page = Page(write_report(tmp_path))
    assert "This run has not finished." in page.text and "started with 2 processes" in page.text
    assert not page.images and "curves" not in page.ids


def test_report_of_an_empty_folder(tmp_path: Path) -> None:
    assert tmp_path.name in Page(write_report(tmp_path)).text


def test_damage_is_an_error(run_folder: Path) -> None:
    (run_folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json:1"):
        write_report(run_folder)


def test_the_best_moment_is_named_when_it_is_not_the_last(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"held_out"' in line)
    worse = lines[last].replace('"nats": ', '"nats": 9')
    path.write_text("\n".join([*lines[:last], worse, *lines[last + 1 :]]) + "\n")
    assert "at 36,000 images" in Page(write_report(run_folder)).text
