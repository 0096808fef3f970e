"""Sharpness against SciPy's Gaussian filter, and what it must not depend on."""

import numpy as np
import pytest
from scipy import ndimage

from eval.metrics.sharpness import Sharpness, sharpness


def one_by_one(images, sigma):
    scores = []
    for image in images:
        grey = image - image.mean()
        high = grey - ndimage.gaussian_filter(grey, sigma)
        scores.append(np.log(np.square(high).sum()) - np.log(np.square(grey).sum()))
    return np.array(scores)


def scored(images, sigma=1.0):
    statistic = Sharpness(sigma)
    statistic.update(images)
    return statistic.score()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_real_images_score_as_with_scipy(digits, compare, sigma):
    images = digits.reference.reshape(-1, 28, 28)
    expected = one_by_one(images, sigma)
    result = scored(images, sigma)
    compare(f"sharpness of MNIST, sigma {sigma}", result.mean, expected.mean(), rel=1e-9)
    assert sharpness(images, sigma) == pytest.approx(expected, rel=1e-9)
    assert result.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(1000), rel=1e-9)


def test_scale_and_offset_change_nothing_and_blur_lowers_it():
    images = np.random.default_rng(0).random((20, 16, 12))
    assert sharpness(-300 * images + 7) == pytest.approx(sharpness(images), abs=1e-9)
    assert sharpness(images + 1e6) == pytest.approx(sharpness(images), abs=1e-6)
    widths = [scored(ndimage.gaussian_filter(images, (0, width, width))).mean for width in (0.5, 1, 2)]
    assert scored(images).mean > widths[0] > widths[1] > widths[2]


def test_colour_images_are_scored_by_their_luminance():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (10, 8, 9, 3)).astype(np.uint8)
    grey = images @ np.array([0.299, 0.587, 0.114])
    assert sharpness(images) == pytest.approx(one_by_one(grey, 1.0), rel=1e-9)
    assert sharpness(grey[..., None]) == pytest.approx(sharpness(images), rel=1e-9)


def test_constant_images_are_counted_apart():
    rng = np.random.default_rng(2)
    images = rng.random((6, 8, 8, 3))
    images[3], images[4], images[5] = 0, 0.1, [1e6, 0.3, 1e-3]
    result = scored(images)
    assert (result.n, result.n_constant) == (3, 3)
    assert result.mean == pytest.approx(scored(images[:3]).mean)
    assert np.isnan(sharpness(images)).sum() == 3
    single = np.zeros((2, 1, 1))
    with pytest.raises(ValueError, match="2 constant"):
        scored(single)


@pytest.mark.parametrize(
    ("images", "sigma", "words"),
    [
        (np.zeros((2, 4, 4, 2)), 1.0, "1 or 3"),
        (np.zeros((4, 4)), 1.0, "1 or 3"),
        (np.full((2, 4, 4), np.nan), 1.0, "finite"),
        (np.zeros((2, 4, 4)), 0.0, "sigma"),
        (np.zeros((2, 4, 4)), np.inf, "sigma"),
    ],
)
def test_unusable_images_are_refused(images, sigma, words):
    with pytest.raises(ValueError, match=words):
        sharpness(images, sigma)
