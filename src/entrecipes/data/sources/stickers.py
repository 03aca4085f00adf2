"""Animated emoji: WebP files in four packages, their names, groups and keywords in two more. Nothing is unpacked."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entrecipes.data.fetch import Package, read_member
from entrecipes.errors import UserError

OTHERWISE = (
    "Without npm: get the package's .tgz elsewhere and name it with --archive; "
    "the embedded set (data.name: stickers) needs nothing."
)
LICENSE = (
    "MIT: the animations are Copyright (c) Microsoft Corporation (github.com/microsoft/fluentui-emoji-animated), "
    "packed as WebP by LobeHub (Copyright (c) 2023 LobeHub); "
    "names and keywords are Copyright (c) Mu-An Chiou (unicode-emoji-json, emojilib), MIT"
)


def _package(name: str, version: str, sha256: str) -> Package:
    return Package("npm", name, version, sha256, OTHERWISE)


PACKS = {
    number: _package(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha256)
    for number, sha256 in {
        1: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
        2: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
        3: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
        4: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
    }.items()
}
"""By number: 1 objects, animals, men; 2 women and bodies; 3 faces and travel; 4 the newer ones. 165 MB is the first."""
NAMES = _package("unicode-emoji-json", "0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401")
KEYWORDS = _package("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")

TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
JOINER, AS_EMOJI = 0x200D, 0xFE0F
SIGNS = ("\u2640", "\u2642")
"""Female, male."""
LIKE = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3}
"""Man and woman as person, boy and girl as child, old man and old woman as older person."""
FLAGS = "Flags"
WORDS = 2
"""Keywords in a caption."""


@dataclass(frozen=True)
class Item:
    """A sticker to be decoded: its file (or what is in it) and what is known of it.

    Attributes:
        id: Unique in its set.
        suffix: What the file's name ends in.
        caption: `still_caption` takes its place for a file of one frame, where it is given.
        base: What variants of one drawing share: never on both sides of a split.
    """

    id: str
    file: bytes | Path
    suffix: str
    caption: str
    still_caption: str = ""
    keywords: tuple[str, ...] = ()
    group: str = ""
    base: str = ""
    tone: str = ""


class Names:
    """Captions of emoji by their code points, from the two packages of names and keywords."""

    def __init__(self, names: Path, keywords: Path) -> None:
        known = json.loads(read_member(names, "package/data-by-emoji.json"))
        self.known = {emoji.replace(chr(AS_EMOJI), ""): (emoji, about) for emoji, about in known.items()}
        self.keywords = json.loads(read_member(keywords, "package/dist/emoji-en-US.json"))

    def item(self, stem: str, content: bytes) -> Item | None:
        """The item of a file called by its code points, `1f468-1f3fd-200d-1f3a8`; None for one that has no name."""
        points = [int(part, 16) for part in re.split("[-_]", stem)]
        plain = [point for point in points if point not in TONES and point != AS_EMOJI]
        found = self.known.get("".join(map(chr, plain))) or self.known.get("".join(map(chr, points)))
        if found is None:
            return None
        emoji, about = found
        tone = " and ".join(dict.fromkeys(TONES[point] for point in points if point in TONES))
        name = about["name"].replace(":", ",")
        words = [word.replace("_", " ") for word in self.keywords.get(emoji, [])[1:]]
        words = [word for word in words if re.fullmatch(r"[a-z][a-z ]+", word) and word not in name.lower()]
        subject = ", ".join([f"{name} with {tone} skin" if tone else name, *words[:WORDS]])
        return Item(
            id=stem,
            file=content,
            suffix=".webp",
            caption=f"an animated sticker of {subject}",
            still_caption=f"a sticker of {subject}",
            keywords=tuple(words),
            group=about["group"],
            base="".join(map(chr, base_of(plain))),
            tone=tone,
        )


def base_of(points: list[int]) -> list[int]:
    """Code points (without tones) of what this is a variant of: `man artist` and `woman artist` are one drawing.

    So are all families of grown-ups and a child, however many, and all couples: their figures are the same ones.
    """
    parts = "".join(chr(LIKE.get(point, point)) for point in points).split(chr(JOINER))
    parts = [part for part in dict.fromkeys(parts) if part not in SIGNS]
    return [ord(character) for character in chr(JOINER).join(parts)]


def package_name(archive: Path) -> str:
    """The name of the package in a .tgz. Raises UserError for any other file, or one that is cut short."""
    try:
        return json.loads(read_member(archive, "package/package.json"))["name"]
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(f"--archive: {archive} is no package of npm's (a .tgz): {error}") from None


def stickers(packs: list[Path], names: Path, keywords: Path, *, flags: bool = False) -> Iterator[Item]:
    """The WebP files of the packs in the order in which they stand there, each archive read once as a stream.

    Args:
        packs: Archives of `PACKS`.
        flags: Also the still ones of the group Flags, 250 of the first pack.
    """
    known = Names(names, keywords)
    for pack in packs:
        with tarfile.open(pack, "r|gz") as archive:
            for member in archive:
                if not member.name.endswith(".webp"):
                    continue
                content = archive.extractfile(member).read()
                item = known.item(Path(member.name).stem, content)
                if item is not None and (flags or item.group != FLAGS or b"ANIM" in content[:64]):
                    yield item
