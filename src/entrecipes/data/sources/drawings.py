"""Drawn pictures with names and categories: four styles of emoji, game icons, flags. Rendered from SVG at any size."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source, expect
from entrecipes.errors import UserError

TONE = r"(?:medium-light|medium-dark|light|medium|dark)"


@dataclass(frozen=True)
class Style:
    """What tells one of these packages from another."""

    icons: int
    """Drawings in the pinned package."""
    tone: re.Pattern[str] = re.compile(rf"(?:^|-){TONE}-skin-tone")
    """The part of a name that says the skin tone."""
    caption: str = "{}"
    background: str = "#ffffff"
    foreground: str = "#000000"
    """For drawings of one colour."""


def render(icons: dict[str, Any], name: str, size: int, background: str, foreground: str) -> np.ndarray:
    """One drawing as uint8 [size, size, 3]. Raises UserError without resvg_py; ValueError when it can't be drawn."""
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "Drawing SVG needs resvg-py: pip install 'entrecipes[data]' and run the command again."
        ) from None
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">'
        f"{icon['body'].replace('currentColor', foreground)}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background=background)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def base_name(name: str, tone: re.Pattern[str]) -> str:
    """The name without skin tones and without who does it, so that variants of one drawing share it.

    `man-artist-dark-skin-tone`, `woman-artist` and `artist` all give `artist`.
    """
    plain = tone.sub("", name).strip("-") or name
    return re.sub(r"^(?:man|woman|person|men|women|people|adult)-", "", plain)


def choose(names: list[str], style: Style, skin_tones: str) -> list[str]:
    """The drawings to keep, by what is to be done with skin-tone variants (see Options)."""
    if skin_tones == "keep":
        return names
    if skin_tones == "drop":
        return [name for name in names if not style.tone.search(name)]
    variants = defaultdict(list)
    for name in names:
        variants[style.tone.sub("", name).strip("-") or name].append(name)
    turn = itertools.count()
    return [group[0] if len(group) == 1 else sorted(group)[next(turn) % len(group)] for group in variants.values()]


def drawings(files: list[Path], options: Options, *, style: Style) -> Iterator[dict[str, Any]]:
    """Every drawing that is current and has a category (in packages with categories), rendered on the background.

    The packages also carry superseded drawings, marked hidden and without a category: near copies, left out.
    Drawings with the same SVG under several names share a group.
    """
    (archive,) = files
    icons = json.loads(read_member(archive, "package/icons.json"))
    categories = json.loads(read_member(archive, "package/metadata.json")).get("categories", {})
    expect(len(icons["icons"]) == style.icons, f"{len(icons['icons'])} drawings, not {style.icons}", archive)
    category = {name: label for label, names in categories.items() for name in names}
    names = [name for name in icons["icons"] if not categories or name in category]
    group_of_body: dict[str, str] = {}
    failed = []
    for name in choose(names, style, options.skin_tones):
        try:
            image = render(icons, name, options.size, style.background, style.foreground)
        except ValueError as error:
            failed.append(f"{name} ({error})")
            continue
        group = group_of_body.setdefault(icons["icons"][name]["body"], base_name(name, style.tone))
        row = {"image": image, "caption": style.caption.format(name.replace("-", " ")), "group": group}
        yield row | ({"label": category[name]} if categories else {})
    expect(len(failed) <= 10, f"{len(failed)} drawings can't be rendered: {', '.join(failed[:10])}", archive)


def _source(
    name: str, what: str, license: str, package: str, version: str, sha256: str, mb: float, style: Style
) -> Source:
    return Source(
        name=name,
        description=what,
        license=license,
        packages=(
            Package(
                "npm",
                f"@iconify-json/{package}",
                version,
                sha256,
                otherwise="Without npm: animals, mnist_5k and photos come by pip, digits needs nothing.",
            ),
        ),
        download_mb=mb,
        rows=functools.partial(drawings, style=style),
        any_size=True,
    )


SOURCES = (
    _source(
        "noto",
        "Noto emoji in colour, any size, captions, 9 categories",
        "Apache-2.0",
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        3.1,
        Style(icons=3819),
    ),
    _source(
        "twemoji",
        "Twemoji in flat colour, any size, captions, 9 categories",
        "CC BY 4.0",
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        1.6,
        Style(icons=4169),
    ),
    _source(
        "openmoji",
        "OpenMoji, outlined emoji, any size, captions, 11 categories",
        "CC BY-SA 4.0",
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        1.3,
        Style(icons=4579),
    ),
    _source(
        "fluent",
        "Fluent emoji, flat, any size, captions, 9 categories",
        "MIT",
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1.2,
        Style(icons=3174, tone=re.compile(rf"(?:-{TONE})+$")),
    ),
    _source(
        "game_icons",
        "Game icons, white on black, any size, captions, no classes",
        "CC BY 3.0",
        "game-icons",
        "1.2.4",
        "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
        2.7,
        Style(icons=4134, background="#000000", foreground="#ffffff", tone=re.compile(r"(?!)")),
    ),
    _source(
        "circle_flags",
        "Round flags in colour, any size, country codes as captions, no classes",
        "MIT",
        "circle-flags",
        "1.2.11",
        "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
        0.1,
        Style(icons=718, caption="flag {}", tone=re.compile(r"(?!)")),
    ),
)
