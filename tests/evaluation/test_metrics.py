from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from entrecipes.errors import UserError
from entrecipes.evaluation.features import FeatureExtractor
from entrecipes.evaluation.metrics import compare, embed, fid, kid, precision_recall


class Projection(FeatureExtractor):
    """A small real extractor: a fixed random projection of 4x4 pixels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        network = nn.Linear(48, 8, bias=False)
        network.weight.data = torch.randn(8, 48, generator=generator)
        super().__init__(network, name="a random projection", tag="projection", version="1", num_features=8)
        self.calls = 0

    def _features(self, images):
        self.calls += 1
        return self.network(images.float().flatten(1) / 255)


def gaussian(n, dimensions=6, shift=0.0, scale=1.0, seed=0):
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed)) * scale + shift


def pixels(n, low=0, high=256, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, channels, 4, 4), generator=generator, dtype=torch.uint8)


def test_fid_is_the_closed_formula():
    real, fake = gaussian(300), gaussian(200, shift=0.5, scale=1.3, seed=1)
    a, b = real.double().numpy(), fake.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert fid(real, fake) == pytest.approx(expected, rel=1e-8)


def test_fid_of_identical_sets_is_zero_in_spite_of_large_features():
    features = gaussian(200, shift=1000.0)
    assert abs(fid(features, features)) < 1e-4


def test_kid_is_unbiased_on_one_distribution_and_positive_on_two():
    same = [kid(gaussian(400, seed=2 * i), gaussian(400, seed=2 * i + 1))[0] for i in range(12)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    mean, deviation = kid(gaussian(400), gaussian(400, shift=0.5, seed=1))
    assert mean > 10 * np.std(same) and deviation > 0


def test_kid_is_the_unbiased_estimate_of_its_formula():
    real, fake = gaussian(200).double(), gaussian(200, shift=0.5, seed=1).double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (len(a) * (len(a) - 1))

    expected = within(real) + within(fake) - 2 * kernel(real, fake).mean()
    mean, deviation = kid(real, fake)
    assert mean == pytest.approx(float(expected), abs=4 * deviation / np.sqrt(50))


def test_kid_draws_by_its_seed_and_leaves_the_global_generator_alone():
    real, fake = gaussian(100), gaussian(100, seed=1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = kid(real, fake, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert kid(real, fake, seed=3) == first
    assert kid(real, fake, seed=4) != first


def test_precision_and_recall_are_exact_on_points_of_a_line():
    real = torch.arange(6.0)[:, None]  # third neighbours at 3, 2, 2, 2, 2, 3: the manifold is [-3, 8]
    fake = torch.tensor([[-3.0], [2.5], [8.0], [8.5], [100.0], [101.0]])
    assert precision_recall(real, fake, neighbours=3) == (0.5, 1.0)
    # third neighbours of [0, 1, 2, 3] are 3, 2, 2, 3: [-3, 6] covers the real points up to 5, not 50 and 60
    far = torch.cat([real, torch.tensor([[50.0], [60.0]])])
    assert precision_recall(far, torch.arange(4.0)[:, None], neighbours=3) == (1.0, 0.75)


def test_compare_names_each_number_and_its_origin():
    found = compare(
        ["kid", "fid", "precision_recall"], Projection(), pixels(60), pixels(40, seed=1),
        seed=5, origin={"split": "train", "steps": 20, "seed": 9},
    )  # fmt: skip
    assert [metric.name.removesuffix("_projection_40") for metric in found] == ["kid", "fid", "precision", "recall"]
    assert [metric.higher_is_better for metric in found] == [False, False, True, True]
    for metric in found:
        assert metric.origin["samples"] == 40 and metric.origin["reference_samples"] == 60
        assert metric.origin["extractor"] == "a random projection" and "sha256" in metric.origin["extractor_version"]
        assert metric.origin["split"] == "train" and metric.origin["steps"] == 20 and metric.origin["seed"] == 9
    assert found[0].origin["subset_seed"] == 5 and found[0].origin["subset_size"] == 20
    assert found[0].spread > 0 and found[1].origin["torchmetrics"]


def test_batches_of_any_size_and_device_order_give_the_same():
    extractor, images = Projection(), pixels(50)
    whole = embed(images, extractor, 50)
    assert torch.allclose(embed(images.split(7), extractor, 3), whole, atol=1e-6)


def test_features_of_known_real_images_are_kept():
    extractor, real, fake = Projection(), pixels(60), pixels(60, seed=1)
    first = compare(["kid"], extractor, real, fake, real_fingerprint="digits")
    calls = extractor.calls
    again = compare(["kid"], extractor, iter(()), fake, real_fingerprint="digits")
    assert again == first and extractor.calls == calls + 1
    other = compare(["kid"], extractor, pixels(60, high=100), fake, real_fingerprint="dark digits")
    assert other[0].value > first[0].value


@pytest.mark.parametrize(
    ("metrics", "count", "message"),
    [(["kdi"], 40, "did you mean 'kid'"), (["kid"], 3, "3 generated images"), (["fid"], 0, "no images")],
)
def test_what_can_not_be_measured_is_refused(metrics, count, message):
    with pytest.raises(UserError, match=message):
        compare(metrics, Projection(), pixels(40), pixels(count) if count else [])


def test_features_that_are_not_finite_are_no_result():
    extractor = Projection()
    extractor.network.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="kid_projection_40.*nan"):
        compare(["kid"], extractor, pixels(40), pixels(40, seed=1))
