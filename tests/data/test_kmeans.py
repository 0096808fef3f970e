import numpy as np
import pytest

from data import kmeans
from data.errors import UserError


def blobs(n=600, d=6, k=4):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(k, d)) * 20
    return (centres[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(np.float32), centres


def test_finds_blobs_and_its_objective_is_the_sum_of_squared_distances():
    x, centres = blobs()
    result = kmeans.fit(x, 4)
    squared = ((x[:, None].astype(np.float64) - result.centroids[None]) ** 2).sum(-1)
    labels, distances = kmeans.assign(x, result.centroids)
    assert result.centroids.dtype == np.float32
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, squared.argmin(1))
    np.testing.assert_allclose(distances, squared.min(1), rtol=1e-3, atol=1e-3)
    # The objective is that of the assignment before the last update of the centroids.
    assert result.objective == pytest.approx(squared.min(1).sum(), rel=1e-3)
    nearest = np.sqrt(((centres[:, None] - result.centroids[None]) ** 2).sum(-1)).min(1)
    assert nearest.max() < 1


def test_repeats_for_a_seed_and_uses_subsets():
    x, _ = blobs()
    first, second = (kmeans.fit(x, 4, max_samples=200, max_dimensions=3, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.centroids, second.centroids)
    np.testing.assert_array_equal(first.dimensions, second.dimensions)
    assert first.centroids.shape == (4, 3)
    assert (np.diff(first.dimensions) > 0).all()
    labels, _ = kmeans.assign(x[:, first.dimensions], first.centroids)
    assert len(labels) == len(x)


def test_uses_every_sample_where_faiss_would_drop_some():
    # 256 per centroid is FAISS's own limit: with one cluster the centroid must be the mean of all.
    x = np.random.default_rng(1).normal(size=(5000, 3)).astype(np.float32)
    np.testing.assert_allclose(kmeans.fit(x, 1).centroids[0], x.mean(0), atol=1e-5)


@pytest.mark.parametrize("n_clusters", [5, 29, 30])
def test_duplicated_points(n_clusters, capfd):
    x = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    result = kmeans.fit(x, n_clusters)
    assert np.isfinite(result.centroids).all()
    assert result.objective < 1e-3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("offset", [0, 8, 100, 10_000])
def test_an_offset_costs_no_precision(offset):
    """Expanded as |x|² - 2xc + |c|² in float32, squares of 10,000 leave nothing of distances of 1."""
    rng = np.random.default_rng(0)
    x, centroids = (np.float32(rng.normal(size=(n, 50)) + offset) for n in (3000, 40))
    labels, distances = kmeans.assign(x, centroids)
    exact = np.square(x[:, None].astype(np.float64) - centroids).sum(2)
    nearest = exact.min(1)
    assert exact[np.arange(3000), labels] == pytest.approx(nearest, rel=1e-4)
    assert np.mean(labels == exact.argmin(1)) > 0.999
    assert distances == pytest.approx(nearest, rel=1e-4)
    here, there = (kmeans.fit(x - shift, 5, n_init=2) for shift in (0, np.float32(offset)))
    assert here.objective == pytest.approx(there.objective, rel=0.02)
    assert np.square(x - here.centroids[kmeans.assign(x, here.centroids)[0]]).sum() < 1.01 * here.objective


def test_bad_input_is_the_users_fault():
    x, _ = blobs(50)
    with pytest.raises(UserError, match="fewer clusters"):
        kmeans.fit(x, 51)
    with pytest.raises(UserError, match="fewer clusters"):
        kmeans.fit(x, 20, max_samples=10)
    with pytest.raises(UserError, match="n_clusters"):
        kmeans.fit(x, 0)
    with pytest.raises(UserError, match="features"):
        kmeans.assign(x[:, :2], x[:3])
    x[7, 1] = np.nan
    with pytest.raises(UserError, match="sample 7"):
        kmeans.fit(x, 3)
    x[7, 1] = -1e30
    with pytest.raises(UserError, match="sample 7 .* rescale"):
        kmeans.fit(x, 3)
    with pytest.raises(UserError, match="sample 7 .* rescale"):
        kmeans.assign(x, x[:3])
    x[7, 1] = np.inf
    with pytest.raises(UserError, match="sample 7"):
        kmeans.assign(x, x[:3])
