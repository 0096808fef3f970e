"""KID against torchmetrics, and without bias."""

import numpy as np
import pytest
import torch

from eval.metrics.kernel import kernel_distance


def test_kid_of_real_images_equals_torchmetrics(digits, compare):
    """With subsets that are the whole sets the draw does not matter."""
    image = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    metric = image.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=2, subset_size=1000)
    metric.update(torch.from_numpy(digits.reference), real=True)
    metric.update(torch.from_numpy(digits.samples), real=False)
    result = kernel_distance(digits.reference, digits.samples, subsets=2, subset_size=1000)
    compare("KID of MNIST pixels", result.mean, metric.compute()[0])
    assert result.standard_deviation == pytest.approx(0, abs=1e-12)


def test_subsets_are_drawn_by_the_seed_and_averaged():
    image = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.normal(0.5, 1, size=(200, 6))
    draw, values = np.random.default_rng(7), []
    for _ in range(20):
        a, b = (torch.from_numpy(z[draw.choice(len(z), 50, replace=False)]) for z in (x, y))
        values.append(float(image.poly_mmd(a, b)))
    result = kernel_distance(x, y, subsets=20, subset_size=50, seed=7)
    assert result.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert result.standard_deviation == pytest.approx(np.std(values), rel=1e-9)
    assert result == kernel_distance(x, y, subsets=20, subset_size=50, seed=7)


def test_equal_distributions_score_zero_on_average():
    """A mean over 400 independent pairs within 4 standard errors of 0: odds of 6e-5 for a false alarm."""
    rng = np.random.default_rng(1)
    values = [
        kernel_distance(rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), subsets=1, subset_size=20).mean
        for _ in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_edges():
    constant = np.full((5, 2), 3.0)
    assert kernel_distance(constant, constant, subset_size=5).mean == pytest.approx(0, abs=1e-9)
    assert np.isfinite(kernel_distance(np.eye(2) + 1e6, np.eye(2), subset_size=2).mean)
    with pytest.raises(ValueError, match="smaller set"):
        kernel_distance(constant, constant)
    with pytest.raises(ValueError, match="2 features, b 3"):
        kernel_distance(constant, np.zeros((5, 3)), subset_size=2)
