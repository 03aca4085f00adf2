"""Sequences: the way from a Debian package to windows, and what is held out of them."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from entrecipes.cli import main
from entrecipes.data import prepared, sequences
from entrecipes.data.fetch import Package, fetch, read_member
from entrecipes.data.sequence_inspection import inspect_sequences
from entrecipes.data.sources import CATALOGUE
from entrecipes.data.sources import sequences as readers
from entrecipes.data.sources.base import Options
from entrecipes.data.sources.sequences import DNA, TEXT, plain_text
from entrecipes.errors import UserError
from entrecipes.recipe.data import PreparedData, SequenceData

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="a Debian package is built and read here")


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package `NAME_VERSION_all.deb` with these files."""
    name, version, _ = path.stem.split("_")
    root = path.parent / f"{path.stem}-root"
    for inside, content in files.items():
        (root / inside).parent.mkdir(parents=True, exist_ok=True)
        (root / inside).write_bytes(content)
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    (root / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "--build", root, path], check=True, capture_output=True)
    shutil.rmtree(root)
    return path


def windows_of(splits, alphabet: str) -> tuple[list[str], list[str]]:
    return tuple(["".join(alphabet[i] for i in row) for row in part.tensor.tolist()] for part in vars(splits).values())


# -- packages ---------------------------------------------------------------------------------------------------------


GENOME = "ACGTTGCAAC" * 30
FASTA = gzip.compress(f">a genome\n{GENOME[:70]}\n{GENOME[70:]}\n".encode())


@pytest.fixture
def tiny_genome(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dna` in the catalogue stands for 300 bases whose package is downloaded already."""
    package = Package("apt", "tiny-genome", "1.0-1")
    (own_home / "downloads").mkdir()
    inside = "usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz"
    deb(own_home / "downloads" / "tiny-genome_1.0-1_all.deb", {inside: FASTA})
    monkeypatch.setattr(readers, "GENOME_COUNTS", [GENOME.count(base) for base in DNA])
    monkeypatch.setitem(CATALOGUE, "dna", replace(CATALOGUE["dna"], packages=(package,)))


@needs_dpkg
def test_a_genome_from_its_package_to_windows(tiny_genome, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "dna"]) == 0
    assert "1 sequences" in (told := capsys.readouterr().out) and "type: sequences, name: dna" in told
    splits = sequences.load(SequenceData(name="dna", held_out=0.2), length=20, alphabet=DNA)
    assert windows_of(splits, DNA) == (
        [GENOME[i : i + 20] for i in range(0, 240, 20)],
        [GENOME[i : i + 20] for i in range(240, 300, 20)],
    )
    assert "tiny-genome=1.0-1" in splits.train.source and splits.train.labels is None
    assert main(["data", "inspect", "dna"]) == 0
    told = capsys.readouterr().out
    assert "1 of 300 symbols" in told and "'A' 30.0%" in told and GENOME[:40] in told.replace("window     ", "")
    with pytest.raises(UserError, match="say data.type: sequences"):
        prepared.load(PreparedData(name="dna"), image_size=8, channels=1)


@needs_dpkg
def test_a_prepared_folder_may_be_named(tiny_genome, tmp_path: Path) -> None:
    folder = prepared.prepare("dna", output=tmp_path / "elsewhere")
    assert len(sequences.load(SequenceData(name=str(folder)), length=30, alphabet=DNA).train) == 9


@needs_dpkg
def test_another_genome_is_refused(tiny_genome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "GENOME_COUNTS", [1, 2, 3, 4])
    with pytest.raises(UserError, match="counts differ"):
        prepared.prepare("dna")


def r_factor(values: list[int]) -> bytes:
    """A factor as R serializes it: type, length, big-endian integers."""
    return b"\0\0\x03\x0d" + struct.pack(f">i{len(values)}i", len(values), *values)


@needs_dpkg
def test_splice_junctions_from_their_r_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoding of the data's documentation: A 100, C 010, G 001, T 000, as factors with levels 1 and 2."""
    monkeypatch.setattr(readers, "JUNCTIONS", {"ei": 1, "ie": 1, "n": 2})
    monkeypatch.setattr(readers, "JUNCTION_LENGTH", 4)
    rows = ["ACGT", "TTTT", "GATC", "CCAG"]
    codes = {"A": (2, 1, 1), "C": (1, 2, 1), "G": (1, 1, 2), "T": (1, 1, 1)}
    columns = [[codes[row[place]][bit] for row in rows] for place in range(4) for bit in range(3)]
    content = b"RDX2\nX\n" + b"".join(r_factor(column) + b"levels" for column in [*columns, [3, 1, 3, 2]])
    inside = "usr/lib/R/site-library/mlbench/data/DNA.rda"
    archive = deb(tmp_path / "mlbench_1_all.deb", {inside: lzma.compress(content)})
    read = list(readers.junctions([archive], Options()))
    assert [row["sequence"] for row in read] == rows
    assert [row["label"] for row in read] == ["n", "ei", "n", "ie"]
    archive = deb(tmp_path / "mlbench_2_all.deb", {inside: lzma.compress(content[:-60])})
    with pytest.raises(UserError, match="181 columns"):
        list(readers.junctions([archive], Options()))


@needs_dpkg
def test_novels_from_their_r_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "NOVELS", ("Emma", "Persuasion"))
    content = b""
    for lines in (["EMMA", "", "handsome, clever,", "and rich"], ["PERSUASION", "Sir Walter\N{EM DASH}1814"]):
        strings = b"".join(b"\0\4\0\t" + struct.pack(">i", len(raw := line.encode())) + raw for line in lines)
        content += b"size" + zlib.compress(b"X\n" + strings + b"\0\4\0\t\xff\xff\xff\xff")  # the last one is missing
    inside = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    archive = deb(tmp_path / "austen_1_all.deb", {inside: content})
    assert list(readers.novels([archive], Options())) == [
        {"sequence": "emma handsome clever and rich", "title": "Emma"},
        {"sequence": "persuasion sir walter", "title": "Persuasion"},
    ]
    with pytest.raises(UserError, match="holds no file nothing"):
        read_member(archive, "nothing")


def test_the_apt_client_is_called_by_name_and_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_home: Path
) -> None:
    client = tmp_path / "apt-get"
    client.write_text('#!/bin/sh\nprintf "!<arch>\\n%s" "$*" > tiny_1%3a2_all.deb\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = fetch(Package("apt", "tiny", "1%3a2"), own_home / "downloads")
    assert found.read_text() == "!<arch>\ndownload --quiet tiny=1%3a2"
    with pytest.raises(UserError, match="delivered a file with sha256.*Take pride"):
        fetch(Package("apt", "tiny", "1%3a2", "0" * 64, otherwise="Take pride."), own_home / "downloads")
    monkeypatch.setenv("PATH", str(own_home))
    with pytest.raises(UserError, match="apt is not installed.*Debian.*Take pride"):
        fetch(Package("apt", "other", "1", otherwise="Take pride."), own_home / "downloads")


# -- windows ----------------------------------------------------------------------------------------------------------


def test_the_embedded_text_is_cut_whole_and_held_out_from_its_end() -> None:
    text = plain_text((Path(sequences.__file__).parent / "pride.txt").read_text())
    assert text.startswith("chapter it is a truth universally acknowledged") and set(text) == set(TEXT)
    splits = sequences.load(SequenceData(held_out=0.25), length=64, alphabet=TEXT)
    train, held_out = windows_of(splits, TEXT)
    assert splits.train.tensor.dtype == torch.uint8 and splits.train.tensor.shape[1] == 64
    cut = len(text) - round(len(text) * 0.25)
    assert text.startswith("".join(train)) and cut - 64 < 64 * len(train) <= cut
    assert text[cut:].startswith("".join(held_out)) and len(held_out) == (len(text) - cut) // 64


def test_overlapping_windows_never_reach_into_the_held_out_part() -> None:
    plain = sequences.load(SequenceData(), length=64, alphabet=TEXT)
    dense = sequences.load(SequenceData(stride=5), length=64, alphabet=TEXT)
    train, held_out = windows_of(dense, TEXT)
    assert len(train) > 12 * len(plain.train) and train[0][5:] == train[1][:-5]
    assert torch.equal(plain.held_out.tensor, dense.held_out.tensor)
    assert plain.train.fingerprint != dense.train.fingerprint
    whole = sequences.load(SequenceData(held_out=0), length=64, alphabet=TEXT)
    assert whole.held_out is None
    assert (
        windows_of(sequences.Splits(whole.train, whole.train), TEXT)[0][: len(plain.train)]
        == windows_of(plain, TEXT)[0]
    )


def test_fewer_windows_are_drawn_by_the_split_seed() -> None:
    sets = [
        sequences.load(SequenceData(max_images=50, split_seed=seed), length=32, alphabet=TEXT) for seed in (0, 0, 1)
    ]
    assert [len(part.train) for part in sets] == [50] * 3
    assert torch.equal(sets[0].train.tensor, sets[1].train.tensor)
    assert not torch.equal(sets[0].train.tensor, sets[2].train.tensor)
    assert torch.equal(sets[0].held_out.tensor, sets[2].held_out.tensor)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> sequences.Sequences:
    """40 labelled sequences that are examples of their own: `ACGT...` written as digits of base 4."""
    texts = ["".join(DNA[i // 4**place % 4] for place in range(6)) for i in range(40)]
    labels = torch.arange(40) % 3
    whole = sequences.Sequences("splice", "source", "license", DNA, texts, labels, ("a", "b", "c"), independent=True)
    monkeypatch.setattr(sequences, "read_sequences", lambda name, label_column: whole)
    return whole


def test_examples_are_held_out_at_random_with_their_labels(examples: sequences.Sequences) -> None:
    section = SequenceData(name="splice", held_out=0.25)
    splits = sequences.load(section, length=6, alphabet=DNA)
    train, held_out = windows_of(splits, DNA)
    assert sorted(train + held_out) == sorted(examples.texts) and len(held_out) == 10
    assert held_out != examples.texts[-10:]
    for part, texts in ((splits.train, train), (splits.held_out, held_out)):
        assert part.labels.tolist() == [examples.texts.index(text) % 3 for text in texts]
    assert splits.train.label_counts().keys() == {"a", "b", "c"}
    halves = sequences.load(section.model_copy(update={"stride": 3}), length=3, alphabet=DNA)
    assert len(halves.train) == 60 and halves.train.labels[::2].tolist() == splits.train.labels.tolist()


def test_what_does_not_fit_is_told(examples: sequences.Sequences) -> None:
    with pytest.raises(UserError, match="alphabet: 'ACGT'"):
        sequences.load(SequenceData(), length=6, alphabet=TEXT)
    with pytest.raises(UserError, match="no window of 7 symbols.*has 6"):
        sequences.load(SequenceData(), length=7, alphabet=DNA)


def test_a_text_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely - " * 3)
    train = sequences.load(SequenceData(name=str(tmp_path / "mine.txt"), held_out=0.3), length=16, alphabet=TEXT).train
    assert train.name == "mine" and "".join(TEXT[i] for i in train.tensor[0]) == "call me ishmael "
    assert main(["data", "inspect", str(tmp_path / "mine.txt")]) == 0
    assert "call me ishmael" in capsys.readouterr().out
    with pytest.raises(UserError, match="none.txt can't be read"):
        sequences.load(SequenceData(name=str(tmp_path / "none.txt")), length=16, alphabet=TEXT)


def test_names_that_hold_nothing_are_told() -> None:
    with pytest.raises(UserError, match="run `entrecipes data prepare austen`"):
        sequences.load(SequenceData(name="austen"), length=8, alphabet=TEXT)
    with pytest.raises(UserError, match="holds images; say data.type: prepared"):
        sequences.load(SequenceData(name="mnist"), length=8, alphabet=TEXT)
    with pytest.raises(UserError, match="did you mean 'austen'"):
        sequences.load(SequenceData(name="austin"), length=8, alphabet=TEXT)


def test_entropies_are_those_of_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform independent bases hold ln 4 nats each; behind a doubled base, the second one holds none."""
    bases = np.random.default_rng(0).choice(list(DNA), 40_000)
    for text, expected in (("".join(bases), [np.log(4)] * 4), ("AC" * 500, [np.log(2), 0, 0, 0])):
        whole = sequences.Sequences("x", "source", "license", DNA, [text])
        monkeypatch.setattr("entrecipes.data.sequence_inspection.read_sequences", lambda name, whole=whole: whole)
        found = inspect_sequences("x", count=3)
        assert found.entropies == pytest.approx(expected, abs=0.01)
        assert all(window in text and len(window) == 64 for window in found.examples)
