"""NDB and JS divergence against SciPy and an independent computation, at the edges, and for false alarms."""

import json

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from eval.ndb import js_divergence, score, two_proportion_z


def plain_ndb(reference_labels, sample_labels, n_bins, threshold):
    """NDB and z, bin by bin, straight from the two assignments."""
    flagged, statistics = 0, []
    for k in range(n_bins):
        n1, n2 = len(reference_labels), len(sample_labels)
        c1, c2 = np.sum(reference_labels == k), np.sum(sample_labels == k)
        p = (c1 + c2) / (n1 + n2)
        se = np.sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
        z = (c2 / n2 - c1 / n1) / se if se > 0 else 0.0
        statistics.append(z)
        flagged += abs(z) > threshold
    return flagged, np.array(statistics)


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_computation_on_the_same_assignment(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 30, 5000), np.minimum(rng.geometric(0.06, 3000) - 1, 29)
    expected, z = plain_ndb(a, b, 30, 3.0)
    result = score(np.bincount(a, minlength=30), np.bincount(b, minlength=30), z_threshold=3.0)
    assert result.ndb == expected > 0
    assert np.array_equal(result.z, z)
    distance = jensenshannon(np.bincount(a, minlength=30), np.bincount(b, minlength=30)) ** 2
    assert result.js == pytest.approx(distance, abs=1e-12)


def test_z_squared_is_the_chi_square_statistic_without_correction():
    reference, samples = np.array([120, 300, 580]), np.array([60, 100, 340])
    z = two_proportion_z(reference, samples)
    for k in range(3):
        table = [[reference[k], 1000 - reference[k]], [samples[k], 500 - samples[k]]]
        statistic, p_value, *_ = stats.chi2_contingency(table, correction=False)
        assert z[k] ** 2 == pytest.approx(statistic, rel=1e-12)
        assert score(reference, samples).p_values[k] == pytest.approx(p_value, rel=1e-9)


def test_identical_proportions_score_zero():
    result = score(np.array([10, 30, 60]), np.array([100, 300, 600]), significance=0.5)
    assert (result.ndb, result.js) == (0, 0.0)
    assert np.all(np.abs(result.z) < 1e-12)


def test_zero_counts_and_the_bin_that_holds_everything():
    result = score(np.array([100, 0, 0]), np.array([50, 50, 0]))
    assert result.z[2] == 0
    assert not result.flagged[2]
    assert result.flagged[:2].all()
    assert result.expected_by_chance == pytest.approx(0.05 * 2)
    everything = score(np.array([100, 0]), np.array([30, 0]))
    assert np.array_equal(everything.z, [0, 0])
    assert js_divergence(np.array([1, 0]), np.array([0, 1])) == pytest.approx(np.log(2), abs=1e-15)


def test_planted_missing_mode_is_flagged_and_comes_first():
    reference = np.full(20, 500)
    samples = np.full(20, 250)
    samples[7], samples[3] = 0, 320
    result = score(reference, samples, z_threshold=3.0)
    assert list(np.flatnonzero(result.flagged)) == [3, 7]
    assert (result.direction(7), result.direction(3)) == ("missing", "over-represented")
    listed = json.loads(json.dumps(result.to_dict(), allow_nan=False))["per_bin"]
    assert [row["bin"] for row in listed[:2]] == [7, 3]
    assert listed[0]["direction"] == "missing"
    assert len(listed) == 20


def test_z_threshold_and_significance_are_one_rule():
    rng = np.random.default_rng(0)
    a, b = rng.multinomial(5000, np.full(50, 0.02)), rng.multinomial(3000, np.full(50, 0.02))
    by_level = score(a, b, significance=0.2)
    assert np.array_equal(by_level.flagged, score(a, b, z_threshold=stats.norm.isf(0.1)).flagged)
    assert by_level.expected_by_chance == pytest.approx(10)
    assert score(a, b).threshold == "p < 0.05 (|z| > 1.96)"
    assert score(a, b, z_threshold=4).threshold == "|z| > 4"


def test_same_distribution_raises_no_false_alarm_at_four():
    """200 pairs x 100 bins: P(|z| > 4) is 6.3e-5, so 1.3 alarms are expected; more than 8 has odds of 2e-5."""
    rng = np.random.default_rng(1)
    proportions = rng.dirichlet(np.full(100, 5.0))
    alarms = sum(
        score(rng.multinomial(45_000, proportions), rng.multinomial(10_000, proportions), z_threshold=4.0).ndb
        for _ in range(200)
    )
    assert alarms <= 8


@pytest.mark.parametrize(
    ("reference", "samples", "rule", "words"),
    [
        ([1, 2], [1, 2, 3], {}, "one set of bins"),
        ([0, 0], [1, 2], {}, "zero"),
        ([1, -1], [1, 2], {}, "not negative"),
        ([1, 1.5], [1, 2], {}, "whole numbers"),
        ([1, 2], [1, 2], {"z_threshold": 3.0, "significance": 0.05}, "not both"),
        ([1, 2], [1, 2], {"z_threshold": -1.0}, "positive"),
        ([1, 2], [1, 2], {"significance": 5}, "between 0 and 1"),
    ],
)
def test_unusable_arguments_are_refused(reference, samples, rule, words):
    with pytest.raises(ValueError, match=words):
        score(np.array(reference), np.array(samples), **rule)
