"""Every score of a thinned set is that of its own module; thresholds and errors are what counting gives."""

import numpy as np
import pytest
from scipy import stats

from data.errors import UserError
from eval.arrays import bins_of, labels_of
from eval.bins import BinSettings
from eval.metrics import ndb
from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import manifold_scores
from eval.metrics.moments import Moments, frechet_distance
from eval.metrics.transport import sliced_wasserstein
from eval.planted import MEASURES, Measure, Measuring, measure, plant, room
from eval.power import Power, allowed, power_curves, power_of


def moments_of(x):
    found = Moments(x.shape[1])
    found.update(x)
    return found


def test_sets_have_one_size_and_the_shares_that_were_asked_for():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 6000, p=[0.5, 0.3, 0.2])
    keep = (0.0, 0.5, 0.75)
    n = room(labels, [0, 1, 2], keep)
    counts = np.bincount(labels)
    assert n == 6000 - counts[0]
    masks = plant(labels, [0, 1, 2], keep, n, rng)
    assert (masks.sum(axis=1) == n).all()
    for row, (label, share) in enumerate([(label, share) for label in range(3) for share in keep], 1):
        found = np.bincount(labels[masks[row]], minlength=3)
        left = counts.astype(float)
        left[label] = round(share * left[label])
        expected = left / left.sum()
        # Hypergeometric: beyond five standard deviations with odds of about 1e-6 a count.
        assert (np.abs(found / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()
        assert (found[label] == 0) == (share == 0)
    # What 0.5 keeps, 0.75 keeps too, before the trimming.
    whole = plant(labels, [1], (0.5, 0.75), 6000, np.random.default_rng(1))
    assert (whole[1] <= whole[2]).all()


@pytest.mark.parametrize("spare", [1, 40])
def test_scores_are_those_of_their_modules(spare):
    """With 40 constant features covariances are singular; few neighbours are left where a class is nearly all."""
    rng = np.random.default_rng(1)
    labels = rng.choice(3, 400, p=[0.6, 0.2, 0.2])
    x = np.float32(rng.normal(size=(400, 6)) + 3 * labels[:, None])
    x = np.concatenate([x, np.full((400, spare), 2, np.float32)], axis=1)
    reference, samples = x[:200], x[200:]
    keep, classes = (0.0, 0.5), [0, 1]
    masks = plant(labels[200:], classes, keep, room(labels[200:], classes, keep), rng)
    how = Measuring(n_bins=7, subsample=60)
    found = measure(reference, samples, masks, how, seed=5)
    assert list(found) == list(MEASURES)
    bins = bins_of(reference, BinSettings(n_bins=7, n_init=2, seed=5))
    for row, mask in enumerate(masks):
        own = samples[mask]
        result = ndb.score(bins.counts, np.bincount(labels_of(bins, own), minlength=7), significance=0.05)
        manifold = manifold_scores(reference[:60], own[:60])
        expected = {
            **{name: getattr(result, name) for name in ("ndb", "ndb_holm", "ndb_bh", "js")},
            **{name: getattr(manifold, name) for name in ("precision", "recall", "density", "coverage")},
            "kid": kernel_distance(reference[:60], own[:60], subsets=1, subset_size=60).mean,
            "sliced": sliced_wasserstein(reference[:60], own[:60], seed=5).value,
        }
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, rel=1e-9), name
        fid = frechet_distance(moments_of(reference), moments_of(own))
        # Roots of eigenvalues that are zero are the roots of rounding.
        assert found["fid"][row] == pytest.approx(fid, rel=1e-5, abs=1e-5)


def test_recall_where_few_of_the_nearest_are_left():
    """Of a tight cluster of 150 three stay: nearly all of their nearest are gone, and the search goes on."""
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat([0, 1], [150, 250]))
    x = np.where(labels[:, None] == 0, 0.01, 1.0) * rng.normal(size=(400, 5))
    reference = rng.normal(size=(400, 5))
    masks = plant(labels, [0], (0.02,), room(labels, [0], (0.02,)), rng)
    assert masks.sum(axis=1).tolist() == [253, 253]
    found = measure(reference, x, masks, Measuring(("recall",)), seed=0)["recall"]
    assert found.tolist() == [manifold_scores(reference[:253], x[mask]).recall for mask in masks]


def test_power_counts_alarms_beyond_the_threshold():
    """Of 40 untouched values the worst two alarm: 38 and 39; the threshold for all other splits is 38, for these 37."""
    calibration, null = np.arange(36.0), np.array([36.0, 37.0, 38.0, 39.0])
    thinned = np.array([[[40, 38], [0, 38]], [[40, 0], [0, 0]], [[40, 38], [0, 0]], [[40, 0], [40, 37]]])
    found = power_of(Measure("x"), 0.05, calibration, null, thinned)
    assert (found.threshold, found.nominal, found.false_alarms) == (37.5, 0.05, 0.5)
    assert found.class_rates == [[1.0, 0.25], [0.25, 0.0]]
    assert found.rates == [0.625, 0.125]
    assert found.class_errors[1][0] == pytest.approx(np.sqrt(0.25 * 0.75 / 4))
    assert found.errors[0] == pytest.approx(np.std([0.5, 0.5, 0.5, 1]) / 2)
    assert found.false_alarm_error == pytest.approx(stats.hypergeom(40, 2, 4).std() / 4)
    downwards = power_of(Measure("x", -1), 0.05, -calibration, -null, -thinned)
    assert (downwards.rates, downwards.threshold) == (found.rates, -37.5)
    test = power_of(Measure("x", calibrated=False), 0.05, np.zeros(39), np.array([0, 0, 0, 1.0]), thinned)
    assert (test.n_null, test.false_alarms, test.nominal) == (43, 1 / 43, 0.05)
    with pytest.raises(UserError, match="19 splits cannot calibrate"):
        allowed(19, 0.05)
    assert allowed(20, 0.05) == 1


def test_threshold_holds_its_level():
    """2,000 studies of 20 judged splits: one in 20 untouched sets may alarm, and one in 20 new ones."""
    rng = np.random.default_rng(3)
    studies = [
        power_of(Measure("x"), 0.05, *rng.normal(size=(2, 20)), rng.normal(size=(20, 3, 1))) for _ in range(2000)
    ]
    rates, error = np.array([found.false_alarms for found in studies]), studies[0].false_alarm_error
    # Five standard errors: odds below 1e-6. The spread over studies is the error that each of them states.
    assert abs(rates.mean() - 0.05) < 5 * error / np.sqrt(2000)
    assert rates.std() == pytest.approx(error, rel=0.1)
    new = np.array([found.rates[0] for found in studies])
    assert abs(new.mean() - 0.05) < 5 * new.std() / np.sqrt(2000)


def test_figure_shows_every_score():
    power = Power([1.0, 0.3], [0.0, 0.1], [[1.0, 0.3]], [[0.0, 0.1]], 0.05, 0.05, 0.05, 20, 0.0)
    assert power_curves(dict.fromkeys(MEASURES, power), (0.0, 0.5), 0.05, "Power").startswith(b"\x89PNG")
