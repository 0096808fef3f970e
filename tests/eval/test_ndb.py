"""NDB and JS divergence against SciPy and an independent computation, at the edges, and for false alarms."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from eval.metrics.bin_tests import exact_test
from eval.metrics.ndb import js_divergence, score, two_proportion_z
from eval.metrics.resampling import flagged_bins, intervals, js_of_counts


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
    assert (result.direction(7), result.direction(3)) == ("missing", "more")
    listed = json.loads(json.dumps(result.to_dict(), allow_nan=False))["per_bin"]
    assert [row["bin"] for row in listed[:2]] == [7, 3]
    assert listed[0]["direction"] == "missing"
    assert len(listed) == 20


def test_a_bin_is_missing_where_it_is_all_but_empty_and_without_direction_where_it_is_not_flagged():
    reference = np.full(5, 2000)
    result = score(reference, np.array([200, 199, 1460, 2000, 3100]), z_threshold=3.0)
    # Of 6,959 samples; a tenth of the reference's share is 139 samples.
    assert [result.direction(k) for k in range(5)] == ["fewer", "fewer", "equal", "more", "more"]
    thinner = score(reference, np.array([200, 100, 1460, 2000, 3100]), z_threshold=3.0)
    assert [thinner.direction(k) for k in range(2)] == ["fewer", "missing"]
    assert thinner.fewer() == [1, 0]
    assert thinner.told() == "1 missing, 1 with fewer samples, 2 with more"
    # z = -1.3 is no finding.
    close = score(reference, np.array([2009, 1940, 2009, 2009, 2009]))
    assert {row["direction"] for row in close.to_dict()["per_bin"]} == {"equal"}


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


@pytest.mark.parametrize(("n1", "n2", "bins"), [(900, 800, 300), (60_000, 300, 150), (40, 5000, 20), (6, 5, 4)])
def test_small_bins_get_fisher_s_exact_test(n1, n2, bins):
    rng = np.random.default_rng(bins)
    a, b = (rng.multinomial(n, rng.dirichlet(np.ones(bins))) for n in (n1, n2))
    result = score(a, b)
    total, n = a + b, n1 + n2
    expected = np.stack([size * cell / n for size in (n1, n2) for cell in (total, n - total)])
    assert np.array_equal(result.exact, (expected < 5).any(0))
    assert result.exact.any()
    for k in range(bins):
        if result.exact[k]:
            p_value = stats.fisher_exact([[a[k], n1 - a[k]], [b[k], n2 - b[k]]])[1]
            assert result.p_values[k] == pytest.approx(p_value, rel=1e-7)
            assert result.flagged[k] == (result.p_values[k] < 0.05)
        else:
            assert result.p_values[k] == 2 * stats.norm.sf(abs(result.z[k]))


def test_an_exact_test_follows_the_z_rule_s_level():
    reference, samples = np.array([9, 5000, 4991]), np.array([0, 3000, 2000])
    table = [[9, 9991], [0, 5000]]
    p_value = stats.fisher_exact(table)[1]
    for z, flagged in ((stats.norm.isf(p_value / 2) - 0.01, True), (stats.norm.isf(p_value / 2) + 0.01, False)):
        result = score(reference, samples, z_threshold=z)
        assert result.exact.tolist() == [True, False, False]
        assert result.flagged[0] == flagged
    assert [row["test"] for row in result.to_dict()["per_bin"]] == ["z", "z", "exact"]


def test_expected_by_chance_is_the_rate_of_flagged_bins():
    """2000 pairs x 40 bins: the rate's standard error is below 0.03 bins, so 5 of them have odds below 1e-6."""
    rng = np.random.default_rng(2)
    proportions = rng.dirichlet(np.full(40, 0.7))
    a, b = rng.multinomial(600, proportions, 2000), rng.multinomial(300, proportions, 2000)
    found = [score(x, y, significance=0.1) for x, y in zip(a, b)]
    small = np.stack([r.flagged & r.exact for r in found]).sum(1).mean()
    expected = np.mean([r.expected_by_chance - 0.1 * np.count_nonzero(~r.exact) for r in found])
    assert small == pytest.approx(expected, abs=0.15)
    assert small < 0.5 * 0.1 * np.mean([r.exact.sum() for r in found])


def naive_adjusted(p_values):
    """Holm and Benjamini-Hochberg, straight from their definitions."""
    n = len(p_values)
    order = sorted(range(n), key=lambda k: p_values[k])
    by_holm, by_bh = np.empty(n), np.empty(n)
    for place, k in enumerate(order):
        by_holm[k] = min(1, max((n - i) * p_values[order[i]] for i in range(place + 1)))
        by_bh[k] = min(1, min(n / (i + 1) * p_values[order[i]] for i in range(place, n)))
    return by_holm, by_bh


def test_corrections_for_many_bins():
    rng = np.random.default_rng(3)
    a = rng.multinomial(20_000, np.full(50, 0.02))
    b = rng.multinomial(5000, np.concatenate([np.full(45, 0.02), [0.001, 0.015, 0.03, 0.0252, 0.0288]]))
    result = score(a, b, z_threshold=3.0)
    by_holm, by_bh = naive_adjusted(result.p_values)
    np.testing.assert_allclose(result.p_holm, by_holm, rtol=1e-12)
    np.testing.assert_allclose(result.p_bh, by_bh, rtol=1e-12)
    np.testing.assert_allclose(result.p_bh, stats.false_discovery_control(result.p_values), rtol=1e-12)
    level = 2 * stats.norm.sf(3.0)
    told = result.to_dict()
    assert (told["ndb_holm"], told["ndb_bh"]) == ((by_holm < level).sum(), (by_bh < level).sum())
    assert told["level"] == pytest.approx(level)
    at_5 = {"level": 0.05, "ndb_holm": (by_holm < 0.05).sum(), "ndb_bh": (by_bh < 0.05).sum()}
    assert told["corrected"] == [{"level": level, "ndb_holm": result.ndb_holm, "ndb_bh": result.ndb_bh}, at_5]
    assert len(score(a, b).to_dict()["corrected"]) == 1


def test_bins_that_are_empty_in_both_sets_are_no_tests():
    a, b = np.array([500, 300, 200]), np.array([260, 130, 110])
    plain, padded = score(a, b), score(np.append(a, [0] * 7), np.append(b, [0] * 7))
    np.testing.assert_array_equal(padded.p_holm, np.append(plain.p_holm, np.ones(7)))
    np.testing.assert_array_equal(padded.p_bh, np.append(plain.p_bh, np.ones(7)))
    assert padded.expected_by_chance == pytest.approx(plain.expected_by_chance)


def test_js_floor_is_the_chi_square_s_and_tells_a_difference():
    """The mean of 499 draws has a relative standard error of 0.6 %, the quantile one of 1.3 %."""
    rng = np.random.default_rng(4)
    proportions = rng.dirichlet(np.full(100, 20.0))
    a, b = rng.multinomial(45_000, proportions), rng.multinomial(20_000, proportions)
    floor = score(a, b).js_floor
    scale = (1 / 45_000 + 1 / 20_000) / 8
    assert floor.mean == pytest.approx(99 * scale, rel=0.03)
    assert floor.quantile == pytest.approx(stats.chi2.ppf(0.95, 99) * scale, rel=0.06)
    chi_square = stats.chi2.sf(js_divergence(a, b) / scale, 99)
    assert floor.p_value == pytest.approx(chi_square, abs=0.11)  # 5 standard errors
    b[0] = 0
    assert score(a, b).js_floor.p_value == 1 / 500
    assert score(a, a).js_floor.p_value == 1


def test_the_js_of_sparse_bins_alarms_at_its_rate():
    """300 pairs of 2 samples a bin: beyond 2 to 33 alarms at 5 % odds are below 1e-4; 7 at 0.4 %: below 1e-3.

    With multinomial draws from the pooled proportions a quarter of the pairs would alarm.
    """
    rng = np.random.default_rng(11)
    proportions = rng.dirichlet(np.full(60, 2.0))
    found = [score(rng.multinomial(120, proportions), rng.multinomial(120, proportions)) for _ in range(300)]
    p_values = np.array([each.js_floor.p_value for each in found])
    assert 2 < np.count_nonzero(p_values <= 0.05) < 33
    assert p_values.mean() == pytest.approx(0.5, abs=0.085)  # 5 standard errors
    assert sum(each.js > each.js_floor.quantile for each in found) < 33
    assert sum(each.js > each.js_limit(0.004) for each in found) < 7


def test_the_js_floor_of_billions():
    """From a billion on, sets are drawn otherwise; the mean of 499 draws has a relative standard error of 4.5 %."""
    for a, b in ([[4e9, 3e9, 3e9], [4e8, 3e8, 3e8]], [[4e9, 3e9, 3e9], [2e3, 1e3, 1e3]]):
        floor = score(np.array(a), np.array(b)).js_floor
        assert floor.mean == pytest.approx(2 / 8 * (1 / sum(a) + 1 / sum(b)), rel=0.25)


def test_totals_by_the_hundred_thousand_take_no_memory_of_their_own():
    """Sets of very different size: tables of all totals at once would take 800 MB."""
    rng = np.random.default_rng(12)
    reference, samples = rng.permutation(200_000)[:100_000] + 1, rng.integers(0, 3, 100_000)
    sizes = 10**9, 20_000
    tracemalloc.start()
    p_values, _ = exact_test(reference, samples, *sizes, 0.05)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()
    for k in rng.integers(0, 100_000, 20):
        table = [[samples[k], sizes[1] - samples[k]], [reference[k], sizes[0] - reference[k]]]
        assert p_values[k] == pytest.approx(stats.fisher_exact(table)[1], rel=1e-6)


def situations():
    """No difference; a tenth of the bins moderately different (3 to 4 standard errors); a collapsed mode."""
    p = np.random.default_rng(5).dirichlet(np.full(40, 8.0))
    moderate, collapsed = p.copy(), p.copy()
    moderate[:4] += np.array([3.0, -3.0, 4.0, -4.0]) * np.sqrt(p[:4] * (1 / 12_000 + 1 / 6000))
    collapsed[np.argsort(p)[30]] = 0
    return {"none": (p, p), "moderate": (p, moderate / moderate.sum()), "collapsed": (p, collapsed / collapsed.sum())}


@pytest.mark.parametrize("situation", ["none", "moderate", "collapsed"])
def test_intervals_cover_the_mean_of_the_scores(situation):
    """60 pairs: at a coverage of 0.95 more than 12 misses have odds of 2e-5; widths are known to about 5 %."""
    p, q = situations()[situation]
    rng = np.random.default_rng(6)
    a, b = rng.multinomial(12_000, p, 2000), rng.multinomial(6000, q, 2000)
    rule = {"level": 0.05, "z_threshold": stats.norm.isf(0.025)}
    scores = {"ndb_over_k": flagged_bins(a, b, **rule).mean(1), "js": js_of_counts(a, b)}
    found = [intervals(x, y, **rule, seed=0) for x, y in zip(a[:60], b[:60])]
    for name, values in scores.items():
        low, high = np.array([getattr(each, name) for each in found]).T
        assert np.sum((low <= values.mean()) & (values.mean() <= high)) >= 48
        assert ((low <= values[:60]) & (values[:60] <= high)).all()
        if name == "js":  # those of NDB are cut at 0
            assert 0.8 < np.mean(high - low) / np.ptp(np.quantile(values, [0.025, 0.975])) < 1.25


def test_simulations_are_fixed_by_the_seed():
    rng = np.random.default_rng(7)
    a, b = rng.multinomial(900, np.full(20, 0.05)), rng.multinomial(500, np.full(20, 0.05))
    assert score(a, b).to_dict() == score(a, b).to_dict()
    assert score(a, b, seed=1).to_dict() != score(a, b).to_dict()
    with pytest.raises(ValueError, match="seed"):
        score(a, b, seed=-1)


@pytest.mark.parametrize(
    ("reference", "samples"),
    [
        ([70, 30], [9, 1]),
        ([50], [20]),
        ([0, 80, 0], [0, 7, 0]),
        ([40, 0, 10], [40, 0, 10]),
        ([1, 0, 0], [0, 1, 0]),
        ([10**9, 3 * 10**9, 20], [12, 30, 5]),
        ([0, 10**6], [3000, 0]),
    ],
)
def test_extreme_counts_score_without_nan(reference, samples):
    result = score(np.array(reference), np.array(samples))
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["per_bin"][0]["p_value"] == min(row["p_value"] for row in told["per_bin"])
    assert told["intervals"]["js"][0] <= result.js <= told["intervals"]["js"][1]
    assert 0 <= result.ndb_holm <= result.ndb_bh <= len(reference)
    if reference == samples or len(np.flatnonzero(np.add(reference, samples))) == 1:
        assert (result.ndb, result.js) == (0, 0)


def test_two_bins_are_one_test():
    result = score(np.array([996, 4]), np.array([491, 9]))
    assert result.exact.tolist() == [True, True]
    assert result.p_values[0] == result.p_values[1] == pytest.approx(stats.fisher_exact([[996, 4], [491, 9]])[1])


def test_ten_thousand_bins_are_judged_within_a_second():
    rng = np.random.default_rng(8)
    p = rng.dirichlet(np.full(10_000, 3.0))
    a, b = rng.multinomial(10**8, p), rng.multinomial(20_000, p)
    started = time.process_time()
    result = score(a, b)
    assert time.process_time() - started < 0.5
    assert result.exact.sum() > 9000
    assert result.intervals.replicates == 100
