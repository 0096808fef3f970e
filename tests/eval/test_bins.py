"""Bins: their definition, what they survive, and what they refuse; and evaluations made with them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial.distance import cdist

from data import kmeans
from data.errors import UserError
from eval.arrays import bins_of, judge_array, labels_of
from eval.bins import Bins, BinSettings
from eval.evaluate import Rule
from eval.observed import sample_ids

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
FEW = BinSettings(n_bins=6, n_init=2)


def blobs(n, seed, centres=6, shape=(4, 3, 1)):
    """Samples around `centres` fixed points, float32 [n, *shape], and the point of each."""
    points = np.random.default_rng(99).uniform(0, 1, (centres, *shape))
    rng = np.random.default_rng(seed)
    which = rng.integers(0, centres, n)
    return (points[which] + 0.08 * rng.standard_normal((n, *shape))).astype(np.float32), which


def fitted(x, settings=FEW):
    return bins_of(x, settings, name="blobs", fingerprint="abc")


@pytest.fixture(scope="module")
def reference():
    return blobs(3000, 0)[0]


@pytest.mark.parametrize("settings", [
    BinSettings(n_bins=9, n_init=2),
    BinSettings(n_bins=9, n_init=2, max_dimensions=5, max_samples=700),
    BinSettings(n_bins=9, n_init=2, max_dimensions=5, whiten=True),
])  # fmt: skip
def test_centres_are_the_means_of_all_assigned_samples(reference, settings):
    bins = fitted(reference, settings)
    flat = reference.reshape(len(reference), -1)
    std = flat.std(axis=0, dtype=np.float64) if settings.whiten else np.ones(12)
    chosen = np.sort(np.argsort(sample_ids("memory 0", len(flat)))[: settings.max_samples])
    found = kmeans.fit((flat / std).astype(np.float32)[chosen], 9, n_init=2, max_dimensions=settings.max_dimensions)
    scaled = (flat / std)[:, found.dimensions]
    first = cdist(scaled, found.centroids).argmin(axis=1)
    means = np.stack([flat[first == k].mean(axis=0, dtype=np.float64) for k in range(9)])
    second = cdist(scaled, (means / std)[:, found.dimensions]).argmin(axis=1)
    counts = np.bincount(second, minlength=9)
    order = np.argsort(-counts, kind="stable")
    assert np.array_equal(bins.dimensions, found.dimensions)
    np.testing.assert_allclose(bins.centres, means[order], atol=2e-6)
    assert np.array_equal(bins.counts, counts[order])
    assert np.array_equal(np.bincount(labels_of(bins, reference)), bins.counts)
    assert bins.n_reference == len(reference)


def test_whitening_does_not_see_the_unit_of_a_feature(reference):
    settings = BinSettings(n_bins=6, n_init=2, whiten=True)
    other = reference.copy()
    other[:, 0, 0, 0] *= 64
    bins, rescaled = fitted(reference, settings), fitted(other, settings)
    assert np.array_equal(bins.counts, rescaled.counts)
    np.testing.assert_allclose(rescaled.centres[:, 0], 64 * bins.centres[:, 0], rtol=1e-5)
    plain = BinSettings(n_bins=6, n_init=2)
    assert not np.array_equal(fitted(other, plain).counts, fitted(reference, plain).counts)


def test_constant_features_are_divided_by_one(reference):
    x = reference.copy()
    x[:, 0, 0, 0], x[:, 1, 0, 0] = 0.1, 0.0
    bins = fitted(x, BinSettings(n_bins=6, n_init=2, whiten=True))
    assert bins.std[0] == bins.std[3] == 1
    assert np.isfinite(bins.centres).all()


def test_empty_bins_are_kept():
    x = np.repeat(np.eye(3, 4, dtype=np.float32), 20, axis=0)
    bins = fitted(x, BinSettings(n_bins=8, n_init=2))
    assert bins.centres.shape == (8, 4)
    assert np.isfinite(bins.centres).all()
    assert (bins.counts.sum(), np.count_nonzero(bins.counts == 0)) == (60, 5)
    assert judge_array(bins, x, name="same", scale="0..1").result.ndb == 0


def test_same_seed_same_bins_and_round_trip(reference, tmp_path):
    settings = BinSettings(n_bins=6, n_init=2, max_dimensions=7, whiten=True, seed=3)
    bins = fitted(reference, settings)
    assert bins.fingerprint == fitted(reference, settings).fingerprint
    assert bins.fingerprint != fitted(reference, settings.model_copy(update={"seed": 4})).fingerprint
    bins.save(str(tmp_path))
    loaded = Bins.load(str(tmp_path))
    assert loaded.fingerprint == bins.fingerprint
    assert loaded.settings == settings
    assert np.array_equal(labels_of(loaded, reference), labels_of(bins, reference))
    facts = json.loads((tmp_path / "bins.json").read_text())
    (tmp_path / "bins.json").write_text(json.dumps({**facts, "reference_name": "another"}))
    with pytest.raises(UserError, match="changed"):
        Bins.load(str(tmp_path))
    (tmp_path / "bins.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read the bins"):
        Bins.load(str(tmp_path))


def test_refuses_what_it_cannot_bin(reference):
    with pytest.raises(UserError, match="5 samples for 6 bins"):
        fitted(reference[:5])
    with pytest.raises(UserError, match="3 samples for 6 bins"):
        fitted(reference, BinSettings(n_bins=6, max_samples=3))
    broken = reference.copy()
    broken[17, 0] = np.nan
    with pytest.raises(UserError, match="blobs: .*NaN"):
        fitted(broken)
    with pytest.raises(UserError, match="blobs: all samples are alike"):
        fitted(np.ones((40, 4)))
    with pytest.raises(UserError, match="numbers of one shape"):
        fitted(np.array([["a", "b"]]))
    with pytest.raises(ValidationError):
        BinSettings(n_bin=3)


def test_refuses_samples_that_do_not_fit(reference):
    bins = fitted(reference)
    with pytest.raises(UserError, match="reference is 4x3x1, the samples are 28x28x1"):
        labels_of(bins, np.zeros((10, 28, 28, 1)))
    named = {"name": "gan", "scale": "0..1"}
    with pytest.raises(UserError, match="gan: 5 samples for 6 bins"):
        judge_array(bins, reference[:5], **named)
    with pytest.raises(UserError, match="gan: .*one scale"):
        judge_array(bins, 255 * reference, **named)
    with pytest.raises(UserError, match="not both"):
        judge_array(bins, reference, **named, rule=Rule(3.0, 0.1))
    infinite = reference.copy()
    infinite[0] = np.inf
    with pytest.raises(UserError, match="infinite"):
        judge_array(bins, infinite, **named)


def test_evaluation_finds_the_planted_mode_and_carries_its_protocol(reference):
    bins = fitted(reference)
    samples, which = blobs(2000, 1)
    whole = judge_array(bins, samples, name="whole", scale="0..1", rule=Rule(4.0))
    assert whole.result.ndb == 0  # P(|z| > 4) is 6e-5 per bin
    part = judge_array(
        bins, samples[which != 2], name="part", scale="0..1", rule=Rule(4.0), extras={"features": "none"}
    )
    worst = part.result.by_evidence()[0]
    assert part.result.direction(worst) == "missing"
    assert worst == np.bincount(labels_of(bins, samples[which == 2])).argmax()
    told = json.loads(json.dumps(part.to_dict(), allow_nan=False))
    assert {"ndb", "ndb_over_k", "js", "bins", "n_reference", "n_samples", "protocol"} <= told.keys()
    assert told["protocol"] | {
        "reference": "blobs", "reference_fingerprint": "abc", "bins_fingerprint": bins.fingerprint, "bins": 6,
        "n_reference": 3000, "n_samples": int((which != 2).sum()), "dimensions_used": 12, "whitening": "none",
        "seed": 0, "initialisations": 2, "threshold": "|z| > 4", "scale": "0..1", "features": "none",
    } == told["protocol"]  # fmt: skip


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the repository")
def test_mnist_without_a_digit_misses_its_bins():
    def idx(name, offset):
        return np.frombuffer(gzip.decompress((MNIST / name).read_bytes()), np.uint8, offset=offset)

    digits = idx("t10k-labels-idx1-ubyte.gz", 8)
    x = idx("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    bins = bins_of(x[::2], BinSettings(n_bins=20, n_init=1), name="MNIST")
    held, kept = x[1::2], digits[1::2] != 9
    assert judge_array(bins, held, name="all", scale="0..1", rule=Rule(4.0)).result.ndb == 0
    result = judge_array(bins, held[kept], name="no 9", scale="0..1", rule=Rule(4.0)).result
    labels = labels_of(bins, x[::2])
    missing = np.flatnonzero(result.flagged & (result.z < 0))
    assert len(missing) >= 1
    assert all(np.mean(digits[::2][labels == k] == 9) > 0.3 for k in missing)
