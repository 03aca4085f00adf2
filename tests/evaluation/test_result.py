from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from entrecipes.errors import UserError
from entrecipes.evaluation.result import Metric, count_tag, metric_name


def make(value, spread=None, **origin):
    return Metric("kid_efflite0_1k", value, spread, origin, higher_is_better=False)


@pytest.mark.parametrize("scalar", [np.float32(0.5), torch.tensor(0.5), np.array(0.5), 0.5])
def test_scalars_become_floats_that_json_holds(scalar):
    metric = make(scalar, scalar, samples=np.int64(3), steps=torch.tensor(20), split="train", guidance_scale=None)
    assert type(metric.value) is float and type(metric.spread) is float
    assert metric.origin == {"samples": 3, "steps": 20, "split": "train", "guidance_scale": None}
    assert Metric.from_json(json.loads(json.dumps(metric.to_json(), allow_nan=False))) == metric


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="kid_efflite0_1k.*value"):
        make(bad)
    with pytest.raises(UserError, match="kid_efflite0_1k.*spread"):
        make(1.0, bad)


@pytest.mark.parametrize("record", [{}, {**make(1.0).to_json(), "value": "much"}, {**make(1.0).to_json(), "split": 1}])
def test_a_record_that_is_no_metric_is_refused(record):
    with pytest.raises(UserError, match="metric record"):
        Metric.from_json(record)


def test_names_tell_extractor_and_count():
    assert [count_tag(count) for count in (500, 1000, 1500, 50_000)] == ["500", "1k", "1500", "50k"]
    assert metric_name("fid", "efflite0", 1000) == "fid_efflite0_1k"
