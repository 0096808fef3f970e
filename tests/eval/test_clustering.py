"""Clusters against classes: by hand, and against scikit-learn."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from eval.metrics.clustering import agreement, contingency


def test_by_hand():
    found = agreement(np.array([[5, 1, 0], [4, 0, 0], [0, 0, 10]]))
    assert found.accuracy == pytest.approx(15 / 20)  # 1 + 4 + 10: better than 5 + 0 + 10 by no more than a tie
    assert found.purity == pytest.approx(19 / 20)
    assert found.sizes.tolist() == [6, 4, 10]
    renamed = agreement(np.array([[0, 7], [3, 0]]))
    assert (renamed.accuracy, renamed.purity, renamed.information) == pytest.approx((1, 1, 1))
    assert renamed.matching.tolist() == [1, 0]


def test_against_scikit_learn_and_all_matchings():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 300)
    clusters = np.where(rng.random(300) < 0.6, (classes + 1) % 4, rng.integers(0, 4, 300))
    table = contingency(clusters, classes, 4, 4)
    found = agreement(table)
    assert found.information == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-12)
    best = max(sum(table[a, b] for a, b in enumerate(order)) for order in itertools.permutations(range(4)))
    assert found.accuracy == pytest.approx(best / 300)


def test_more_clusters_than_classes_and_an_empty_one():
    found = agreement(contingency(np.array([0, 0, 1, 3]), np.array([0, 0, 1, 1]), 4, 2))
    assert found.accuracy == pytest.approx(3 / 4)
    assert found.purity == pytest.approx(1)
    assert found.sizes.tolist() == [2, 1, 0, 1]
    assert (found.matching >= 0).sum() == 2
    assert agreement(np.array([[3]])).information == 1


@pytest.mark.parametrize("clusters", [np.array([0, 5]), np.array([-1, 0]), np.array([0.0, 1.0]), np.array([0])])
def test_what_is_no_clustering_is_refused(clusters):
    with pytest.raises(ValueError, match="clusters"):
        contingency(clusters, np.array([0, 1]), 3, 2)
    with pytest.raises(ValueError, match="at least one"):
        agreement(np.zeros((2, 2)))
