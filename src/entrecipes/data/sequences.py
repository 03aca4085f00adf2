"""Sequences of symbols as a data set: windows of one length, cut from texts, genomes or a set of short sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from entrecipes.data.images import ImageSet, Splits, split_indices
from entrecipes.data.prepared import facts, prepared_folder, read_prepared
from entrecipes.data.sources import source as find_source
from entrecipes.data.sources.sequences import TEXT, plain_text
from entrecipes.data.tables import label_names, labels_of, require_columns
from entrecipes.errors import UserError
from entrecipes.fingerprint import fingerprint
from entrecipes.recipe.data import SequenceData, WindowData

EMBEDDED = "pride"
EMBEDDED_SOURCE = "The opening chapters of Jane Austen's Pride and Prejudice (1813) as letters and spaces, 27 symbols."


@dataclass(frozen=True)
class Sequences:
    """Whole sequences, not yet split or cut into windows.

    Attributes:
        alphabet: The symbols that occur, in the order of their ids.
        texts: The sequences.
        independent: Each sequence is an example of its own (so that they are split at random), not a stretch of a text.
    """

    name: str
    source: str
    license: str
    alphabet: str
    texts: list[str]
    labels: torch.Tensor | None = None
    label_names: tuple[str, ...] | None = None
    independent: bool = False

    def ids(self) -> list[np.ndarray]:
        """Each sequence as symbol ids, uint8 [L]."""
        position = np.zeros(256, np.uint8)
        position[np.frombuffer(self.alphabet.encode("ascii"), np.uint8)] = np.arange(len(self.alphabet))
        return [position[np.frombuffer(text.encode("ascii"), np.uint8)] for text in self.texts]


def load(section: SequenceData, *, length: int, alphabet: str) -> Splits:
    """Windows uint8 [N, length] of symbol ids, and their labels where the set has them.

    Texts and genomes are held out from their end, so that no window of one side overlaps one of the other; sequences
    that are examples of their own are drawn. Held-out windows never overlap each other.

    Raises:
        UserError: The set is not prepared, holds no sequences or another alphabet, or is too short for a window.
    """
    whole = read_sequences(section.name, section.label_column)
    if whole.alphabet != alphabet:
        raise UserError(
            f"data.name: '{section.name}' is written in the {len(whole.alphabet)} symbols '{whole.alphabet}', but the "
            f"model's are '{alphabet}'; set pipeline.build.model.config.alphabet: '{whole.alphabet}'"
        )
    return split_windows(whole, section, length)


def split_windows(whole: Sequences, section: WindowData, length: int) -> Splits:
    """Cut what is trained on and what is held out into windows. Raises UserError when none fits into either."""
    train, held_out = _split(whole, section)
    stride = section.stride or length
    splits = Splits(_windows(whole, train, length, stride), _windows(whole, held_out, length, length))
    if splits.train is None or (section.held_out and splits.held_out is None):
        longest = max(len(ids) for _, ids in train)
        raise UserError(
            f"data: no window of {length} symbols fits into '{whole.name}' (its longest training part has {longest} "
            f"symbols) on both sides of the split; lower the model's sample_size, or change data.held_out"
        )
    if section.max_images:
        keep = np.random.default_rng(section.split_seed).permutation(len(splits.train))[: section.max_images]
        splits.train = splits.train.subset(np.sort(keep).tolist())
    return splits


def read_sequences(name: str, label_column: str | None = "label") -> Sequences:
    """The embedded set, a text file (`NAME.txt`), or a set that `entrecipes data prepare` has built.

    Raises:
        UserError: It is not there or not prepared, holds no sequences, or lacks the column (`label` may be missing).
    """
    if name == EMBEDDED:
        return _text_file(Path(__file__).with_name(f"{EMBEDDED}.txt"), EMBEDDED_SOURCE, "public domain")
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        return _text_file(path, f"The letters and spaces of {path.name}.", "not stated")
    return _prepared(name, label_column)


Parts = list[tuple[int, np.ndarray]]
"""Stretches of sequences (symbol ids), each with the number of its sequence."""


def _split(whole: Sequences, section: WindowData) -> tuple[Parts, Parts]:
    numbered = list(enumerate(whole.ids()))
    if whole.independent:
        train, kept = split_indices(len(numbered), section.held_out, section.split_seed, place="data")
        return [numbered[i] for i in train], [numbered[i] for i in kept]
    cuts = [len(ids) - round(len(ids) * section.held_out) for _, ids in numbered]
    before = [(i, ids[:cut]) for (i, ids), cut in zip(numbered, cuts, strict=True)]
    return before, [(i, ids[cut:]) for (i, ids), cut in zip(numbered, cuts, strict=True)]


def _windows(whole: Sequences, parts: Parts, length: int, stride: int) -> ImageSet | None:
    """All windows of the parts as a set in memory; None when there are none."""
    cut, owners = [], []
    for number, ids in parts:
        if len(ids) >= length:
            cut.append(np.lib.stride_tricks.sliding_window_view(ids, length)[::stride])
            owners += [number] * len(cut[-1])
    if not owners:
        return None
    windows = torch.from_numpy(np.concatenate(cut))
    return ImageSet(
        name=whole.name,
        source=whole.source,
        license=whole.license,
        label_names=whole.label_names,
        labels=None if whole.labels is None else whole.labels[owners],
        tensor=windows,
        fingerprint=fingerprint(whole.name, whole.alphabet, windows, whole.labels),
    )


def _text_file(path: Path, source: str, license: str) -> Sequences:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.name: {path} can't be read as UTF-8 text ({error})") from None
    return Sequences(path.stem, source, license, TEXT, [plain_text(text)])


def _prepared(name: str, label_column: str | None) -> Sequences:
    """A set that `entrecipes data prepare` has built, by its name or its folder."""
    folder = Path(name)
    if facts(folder) is None:
        if find_source(name).alphabet is None:
            raise UserError(f"data.name: '{name}' holds images; say data.type: prepared")
        folder = prepared_folder(name)
    noted = facts(folder)
    if noted is None:
        command = f"entrecipes data prepare {name}"
        raise UserError(f"data.name: '{name}' is not prepared on this machine yet: run `{command}`")
    table = read_prepared(folder)
    names = None
    if label_column in table.dataset.column_names:
        names = label_names([table.dataset], label_column, table.place)
    elif label_column not in (None, "label"):
        require_columns(table.dataset.column_names, {"label_column": label_column}, table.place)
    return Sequences(
        name=table.name,
        source=table.source,
        license=table.license,
        alphabet=noted["alphabet"],
        texts=table.dataset["sequence"][:],
        labels=None if names is None else labels_of(table.dataset, label_column, names),
        label_names=names,
        independent=noted["independent"],
    )
