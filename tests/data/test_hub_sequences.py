"""Sequences from a column of a data set, here a folder that `datasets` saved."""

from __future__ import annotations

import datasets
import pytest

from entrecipes.data.hub_sequences import load
from entrecipes.errors import UserError
from entrecipes.recipe.data import HubSequenceData


@pytest.fixture
def promoters(tmp_path):
    """Ten sequences of twelve bases, one with an unknown base, one too short."""
    texts = ["ACGTACGTACGT", "TTTTAAAACCCC", "GGGGGGGGGGGG", "ACACACACACAC"] * 2 + ["ACGTNCGTACGT", "ACG"]
    table = datasets.Dataset.from_dict({"dna": texts, "label": [i % 2 for i in range(10)]})
    table.save_to_disk(str(tmp_path / "promoters"))
    return str(tmp_path / "promoters")


def test_rows_become_windows_with_their_labels(promoters, caplog):
    section = HubSequenceData(id=promoters, sequence_column="dna", held_out=0.25, stride=4)
    splits = load(section, length=8, alphabet="ACGT")
    assert "1 of 10 rows" in caplog.text and "left out" in caplog.text
    assert splits.train.tensor.shape[1] == splits.held_out.tensor.shape[1] == 8
    assert splits.train.tensor.max() <= 3 and splits.train.label_names == ("0", "1")
    assert len(splits.train) == len(splits.train.labels) and len(splits.train) % 2 == 0, "two windows of each sequence"


def test_mistakes_name_the_key(promoters):
    with pytest.raises(UserError, match="data.sequence_column.*did you mean 'dna'|has no column 'sequence'"):
        load(HubSequenceData(id=promoters), length=8, alphabet="ACGT")
    with pytest.raises(UserError, match="no row .* is written in 'XY' alone"):
        load(HubSequenceData(id=promoters, sequence_column="dna"), length=8, alphabet="XY")
    with pytest.raises(UserError, match="no window of 99 symbols"):
        load(HubSequenceData(id=promoters, sequence_column="dna"), length=99, alphabet="ACGT")
    with pytest.raises(UserError, match="data.label_column"):
        load(HubSequenceData(id=promoters, sequence_column="dna", label_column="kind"), length=8, alphabet="ACGT")
    with pytest.raises(UserError, match="'nobody/none'"):
        load(HubSequenceData(id="nobody/none"), length=8, alphabet="ACGT")
