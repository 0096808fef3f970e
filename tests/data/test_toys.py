"""Toy distributions: samples that fit their densities, the same for the same seed, packed like other data."""

import math

import numpy as np
import pytest
from scipy.stats import chi2, multivariate_normal

from data.errors import UserError
from data.shards import pack
from data.sources import SourceOptions, is_spec, open_source
from data.stream import read_blocks
from data.toys import Ring, SwissRoll, toy


@pytest.mark.parametrize("distribution", [Ring(), Ring(3, 1.0, 0.5, centre=True), SwissRoll(), SwissRoll(0.5, 1.0)])
def test_samples_fit_the_density(distribution):
    """χ² of 100,000 samples in the cells of a grid against the integrated density: false alarms below 1e-4."""
    x, labels = distribution.draw(100_000, np.random.default_rng(0))
    assert (x.dtype, labels.dtype) == (np.float32, np.int64)
    low, high = x.min(0), x.max(0)
    axes = [low[i] + (high[i] - low[i]) * (np.arange(120) + 0.5) / 120 for i in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    cell = np.prod((high - low) / 120)
    density = np.exp(distribution.log_density(grid)) * cell
    assert density.sum() == pytest.approx(1, abs=2e-3)
    expected = density.reshape(12, 10, 12, 10).sum((1, 3)).ravel() * len(x)
    place = np.clip(((x - low) / (high - low) * 12).astype(int), 0, 11)
    counts = np.bincount(place[:, 0] * 12 + place[:, 1], minlength=144)
    full = expected > 30
    statistic = ((counts - expected) ** 2 / expected)[full].sum()
    assert chi2.sf(statistic, full.sum()) > 1e-4


def test_the_ring_of_the_thesis():
    """Six components of radius 5 and covariance 0.1 I: mean -log p is log 6 + log(2πe 0.1) = 2.327 nats."""
    ring = toy("ring")
    x, labels = ring.draw(100_000, np.random.default_rng(1))
    parts = [multivariate_normal(mean, 0.1).logpdf(x) for mean in ring.means]
    assert np.allclose(ring.log_density(x), np.logaddexp.reduce(parts, axis=0) - math.log(6), atol=1e-10)
    error = 1 / math.sqrt(len(x))  # the standard deviation of -log p is 1
    assert -ring.log_density(x).mean() == pytest.approx(
        math.log(6) + math.log(2 * math.pi * math.e * 0.1), abs=5 * error
    )
    assert np.argmax(parts, axis=0).tolist() == labels.tolist()


def test_toys_are_packed_and_streamed_like_other_data(tmp_path):
    source = open_source("ring:8,samples=2000", SourceOptions(seed=4))
    assert (source.shape, source.dtype, source.levels) == ((2,), "float32", None)
    assert source.splits == {"train": 1600, "test": 400}
    again = next(open_source("ring:8,samples=2000", SourceOptions(seed=4)).blocks("train", 1600))
    other = next(open_source("ring:8,samples=2000", SourceOptions(seed=5)).blocks("train", 1600))
    manifest = pack(source, str(tmp_path / "ring"))
    block = {k: np.concatenate(v) for k, v in _columns(read_blocks(manifest, "train")).items()}
    assert np.array_equal(block["x"], again["x"])
    assert np.array_equal(block["label"], again["label"])
    assert not np.array_equal(block["x"], other["x"])
    assert set(block["label"]) == set(range(8))
    assert is_spec("swissroll:turns=2")


def _columns(blocks):
    found = list(blocks)
    return {name: [block[name] for block in found] for name in found[0]}


def test_options_of_toys():
    assert toy("ring:8,radius=2.5") == Ring(8, 2.5)
    assert toy("seven").means.shape == (7, 2)
    assert toy("swissroll:turns=2,noise=0.1,samples=100") == SwissRoll(2.0, 0.1, 100)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        *[
            ("ring:depth=3", "radius"),
            ("ring:2.5", "whole"),
            ("ring:0", "components"),
            ("ring:variance=-1", "variance"),
        ],
        *[("ring:variance=nan", "finite"), ("ring:radius=x", "finite"), ("swissroll:noise=0", "noise")],
        *[("ring:samples=1", "samples"), ("swissroll:turns=1e9", "turns"), ("seven:centre=2", "centre")],
    ],
)
def test_options_that_are_refused(spec, part):
    with pytest.raises(UserError, match=part) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)
