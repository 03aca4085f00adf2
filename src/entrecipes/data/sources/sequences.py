"""Sequences of symbols: a genome, splice junctions, novels. All from Debian packages, read without R."""

from __future__ import annotations

import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrecipes.data.fetch import Package, read_member
from entrecipes.data.sources.base import Options, Source, expect

DNA = "ACGT"
TEXT = " abcdefghijklmnopqrstuvwxyz"
OTHERWISE = "Without it: data.type: sequences, name: pride is there after installation."

GENOME_COUNTS = [1222723, 1251581, 1243439, 1221177]
JUNCTIONS = {"ei": 767, "ie": 765, "n": 1654}
JUNCTION_LENGTH = 60
NOVELS = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility")


def plain_text(text: str) -> str:
    """Lower-case letters and single spaces: the 27 symbols of text8 (Mahoney 2006), without its spelt-out digits."""
    return re.sub("[^a-z]+", " ", text.lower()).strip()


def genome(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """One row: the whole chromosome."""
    (archive,) = files
    fasta = gzip.decompress(read_member(archive, "usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")).decode()
    title, *lines = fasta.splitlines()
    bases = "".join(lines)
    expect([bases.count(base) for base in DNA] == GENOME_COUNTS, "the bases' counts differ", archive)
    expect(len(bases) == sum(GENOME_COUNTS), "there are other symbols than A, C, G and T", archive)
    yield {"sequence": bases, "title": title.removeprefix(">")}


def junctions(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """One row a sequence of 60 bases, labelled by what lies in its middle.

    The R file holds 180 columns of factors with two levels, three a base (100 A, 010 C, 001 G, 000 T), and the class.
    Each is a vector of big-endian integers behind its type and its length.
    """
    (archive,) = files
    content = lzma.decompress(read_member(archive, "usr/lib/R/site-library/mlbench/data/DNA.rda"))
    count = sum(JUNCTIONS.values())
    head = b"\0\0\x03\x0d" + struct.pack(">i", count)  # an integer vector with attributes, of that length
    starts = [found.end() for found in re.finditer(re.escape(head), content)]
    expect(len(starts) == 3 * JUNCTION_LENGTH + 1, "there are not 181 columns", archive)
    *bits, classes = (np.frombuffer(content, ">i4", count, start) - 1 for start in starts)
    names = np.array(list(JUNCTIONS))[classes]
    expect(np.bincount(classes).tolist() == list(JUNCTIONS.values()), "the classes' counts differ", archive)
    a, c, g = np.stack(bits, axis=1).reshape(count, JUNCTION_LENGTH, 3).transpose(2, 0, 1)
    for row, name in zip(3 - 3 * a - 2 * c - g, names, strict=True):
        yield {"sequence": "".join(DNA[base] for base in row), "label": str(name)}


def novels(files: list[Path], options: Options) -> Iterator[dict[str, Any]]:
    """One row a novel. Each is an R object of its own, zlib behind four bytes of length, its lines as strings in it."""
    (archive,) = files
    content = read_member(archive, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    for title in NOVELS:
        stream = zlib.decompressobj()
        text = plain_text("\n".join(_strings(stream.decompress(content[4:]))))
        expect(text.startswith(plain_text(title)), f"{title} is not where it was", archive)
        yield {"sequence": text, "title": title}
        content = stream.unused_data
    expect(not content, "there are more than six novels", archive)


def _strings(content: bytes) -> Iterator[str]:
    """The native strings of a serialized R object, in order."""
    at = content.find(b"\0\4\0\t")
    while at >= 0:
        (length,) = struct.unpack(">i", content[at + 4 : at + 8])
        end = at + 8 + max(length, 0)  # -1 is a missing string
        yield content[at + 8 : end].decode()
        at = content.find(b"\0\4\0\t", end)


SOURCES = (
    Source(
        name="austen",
        description="Six novels by Jane Austen as 3.9 M letters and spaces, 27 symbols",
        license="public domain (the R package: MIT)",
        packages=(
            Package(
                "apt",
                "r-cran-janeaustenr",
                "1.0.0-1",
                "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
                otherwise=OTHERWISE,
            ),
        ),
        download_mb=1.6,
        rows=novels,
        alphabet=TEXT,
    ),
    Source(
        name="dna",
        description="The genome of Escherichia coli 536, 4,938,920 bases, 4 symbols",
        license="Artistic-2.0 (the package's)",
        packages=(
            Package(
                "apt",
                "bowtie-examples",
                "1.3.1-1",
                "3cec5c9f6460ea2236cf3d2688665328ab18d90eb2f8eaa0183dd1cd05c212ee",
                otherwise=OTHERWISE,
            ),
        ),
        download_mb=6.3,
        rows=genome,
        alphabet=DNA,
    ),
    Source(
        name="splice",
        description="3,186 pieces of primate DNA of 60 bases, 4 symbols, 3 classes of splice junctions",
        license="GPL-2 (the R package's)",
        # a binary package, one file a processor: held to the counts in it
        packages=(Package("apt", "r-cran-mlbench", "2.1-3-1", otherwise=OTHERWISE),),
        download_mb=1.0,
        rows=junctions,
        alphabet=DNA,
        independent=True,
    ),
)
