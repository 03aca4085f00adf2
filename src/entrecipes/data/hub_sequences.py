"""Sequences of symbols from a data set of the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets

from entrecipes.data.hub import ask
from entrecipes.data.images import Splits
from entrecipes.data.sequences import Sequences, split_windows
from entrecipes.data.tables import label_names, labels_of, require_columns
from entrecipes.errors import UserError
from entrecipes.recipe.data import HubSequenceData

logger = logging.getLogger(__name__)


def load(section: HubSequenceData, *, length: int, alphabet: str) -> Splits:
    """Windows uint8 [N, length] of symbol ids, and their labels where the set has them; rows are split at random.

    Raises:
        UserError: Unknown or gated id, no network, missing columns, no row in the alphabet, or none long enough.
    """
    place = f"the data set {section.id}"
    table = _table(section)
    require_columns(table.column_names, {"sequence_column": section.sequence_column}, place)
    allowed = set(alphabet)
    rows = [i for i, text in enumerate(table[section.sequence_column][:]) if text and allowed.issuperset(text)]
    if not rows:
        raise UserError(
            f"data.sequence_column: no row of {place} is written in '{alphabet}' alone; set "
            "pipeline.build.model.config.alphabet to the symbols of that column"
        )
    if len(rows) < len(table):
        logger.warning("%d of %d rows of %s have other symbols than %s and are left out",
                       len(table) - len(rows), len(table), section.id, alphabet)  # fmt: skip
    table = table.select(rows)
    names, column = None, section.label_column
    if column in table.column_names:
        names = label_names([table], column, place)
    elif column not in (None, "label"):
        require_columns(table.column_names, {"label_column": column}, place)
    whole = Sequences(
        name=section.id,
        source=f"Split {section.split} of the data set {section.id}"
        + (f" ({section.config})." if section.config else "."),
        license=table.info.license or "see the data set's card",
        alphabet=alphabet,
        texts=table[section.sequence_column][:],
        labels=None if names is None else labels_of(table, column, names),
        label_names=names,
        independent=True,
    )
    return split_windows(whole, section, length)


def _table(section: HubSequenceData) -> datasets.Dataset:
    saved = Path(section.id).expanduser()
    if not (saved / "state.json").exists() and not (saved / "dataset_dict.json").exists():
        return ask(
            section,
            lambda: datasets.load_dataset(section.id, section.config, split=section.split, revision=section.revision),
        )
    parts = datasets.load_from_disk(str(saved))
    return parts if isinstance(parts, datasets.Dataset) else parts[section.split]
