"""Distance of codes to their prior, and the codes that pictures are decoded from."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import integrate

from eval.code_figures import code_scatter, image_sheet, wasserstein_against_js
from eval.codes import interpolations, plane_grid, principal_walk, prior_distance, shifted_uniforms
from eval.metrics.transport import sliced_wasserstein


def square(n, seed):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 2)).astype(np.float32)


def test_draws_of_the_prior_are_about_as_near_as_each_other():
    """The ratio of the prior's own draws is one; within its standard error, some 8 % of floor and 20 % of draws."""
    found = prior_distance(square(2000, 10**6), square)
    assert found.ratio == pytest.approx(1, abs=0.8)
    assert found.floor_error < 0.25 * found.floor
    smaller = prior_distance(square(500, 10**6), square)
    assert smaller.floor == pytest.approx(4 * found.floor, rel=0.5)  # as 1 / n


def test_distance_equals_the_sliced_wasserstein_score():
    codes = square(300, 5) + np.array([0.3, 0])
    found = prior_distance(codes, square, draws=2, pairs=2, projections=50, seed=4)
    each = [sliced_wasserstein(codes, square(300, 5 + i), projections=50, seed=4).value ** 2 for i in range(2)]
    assert found.squared == pytest.approx(np.mean(each), rel=1e-9)
    pairs = [
        sliced_wasserstein(square(300, 7 + 2 * i), square(300, 8 + 2 * i), projections=50, seed=4).value ** 2
        for i in range(2)
    ]
    assert found.floor == pytest.approx(np.mean(pairs), rel=1e-9)
    assert found.to_dict()["ratio"] == found.squared / found.floor


def test_codes_that_are_none():
    with pytest.raises(ValueError, match="codes have 3 features"):
        prior_distance(np.zeros((5, 3)), square)
    with pytest.raises(ValueError, match="finite"):
        prior_distance(np.full((5, 2), np.nan), square)


def test_principal_walk_runs_along_the_axes_in_standard_deviations():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(50_000, 3)) * [1, 3, 0.5] + [7, 0, 0]
    walk = principal_walk(codes, components=2)
    assert walk.shape == (2, 7, 3)
    np.testing.assert_allclose(walk[0, 6] - walk[0, 3], [0, 9, 0], atol=0.2)
    np.testing.assert_allclose(walk[1, 0] - walk[1, 3], [-3, 0, 0], atol=0.2)
    np.testing.assert_allclose(walk[:, 3], np.tile(codes.mean(0), (2, 1)), atol=1e-5)
    assert principal_walk(rng.normal(size=(100, 1))).shape == (1, 7, 1)


def test_lines_and_grids():
    line = interpolations(np.zeros((1, 2)), np.array([[4.0, 8.0]]), 5)
    np.testing.assert_allclose(line[0], [[0, 0], [1, 2], [2, 4], [3, 6], [4, 8]])
    grid = plane_grid(square(20_000, 0), 3)
    np.testing.assert_allclose(grid[:3], [[-1, 1], [0, 1], [1, 1]], atol=0.02)  # the top row
    np.testing.assert_allclose(grid[-1], [1, -1], atol=0.02)


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.9, 2.5])
def test_w1_and_js_of_shifted_uniforms_against_integrals(shift):
    """W₁ = ∫ |F - G|; JS by the densities, both by quadrature between the edges."""
    edges = sorted({-3.5, -0.5, 0.5, shift - 0.5, shift + 0.5, 3.5})
    p, q = (lambda x, m=m: float(abs(x - m) < 0.5) for m in (0.0, shift))
    cdf = lambda x, m: np.clip(x - m + 0.5, 0, 1)  # noqa: E731
    term = lambda a, b: a * np.log(2 * a / (a + b)) if a else 0.0  # noqa: E731
    parts = list(itertools.pairwise(edges))
    w1 = sum(integrate.quad(lambda x: abs(cdf(x, 0) - cdf(x, shift)), *part)[0] for part in parts)
    js = sum(integrate.quad(lambda x: term(p(x), q(x)) + term(q(x), p(x)), *part)[0] for part in parts)
    distance, divergence = shifted_uniforms(np.array([shift]))
    assert distance[0] == pytest.approx(w1, abs=1e-9)
    assert divergence[0] == pytest.approx(js, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pictures_are_drawn(k):
    rng = np.random.default_rng(0)
    codes, prior = rng.normal(size=(2, 300, k)).astype(np.float32)
    drawn = [
        code_scatter(codes, rng.integers(0, 12, 300), prior),
        code_scatter(codes, rng.integers(-1, 2, 300), prior, ["no", "yes"]),
        code_scatter(codes, None, prior),
        image_sheet(rng.random((3, 7, 8, 8)), "title", [str(i) for i in range(7)], ["a", "b", "c"]),
        wasserstein_against_js(),
    ]
    for picture in drawn:
        assert min(Image.open(io.BytesIO(picture)).size) > 100
