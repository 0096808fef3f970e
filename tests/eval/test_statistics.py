"""What holds for every mergeable statistic: order, blocks and workers do not matter, and its arrays are all of it."""

import numpy as np
import pytest

from eval.metrics.moments import Moments
from eval.metrics.predictions import Predictions
from eval.metrics.sharpness import Sharpness


def moments():
    x = np.random.default_rng(0).normal(1e4, 1, (300, 5)).astype(np.float32)
    return lambda: Moments(5), lambda statistic, rows: statistic.update(x[rows])


def predictions():
    p = np.random.default_rng(1).dirichlet(np.ones(4), 300)
    return lambda: Predictions(4, splits=3), lambda statistic, rows: statistic.update(p[rows], rows)


def sharpness():
    images = np.random.default_rng(2).random((300, 9, 7, 3))
    images[::10] = images[::10, :1, :1]
    return lambda: Sharpness(1.5), lambda statistic, rows: statistic.update(images[rows])


@pytest.mark.parametrize("case", [moments, predictions, sharpness])
def test_parts_merged_in_any_order_equal_one_pass(case):
    new, update = case()
    whole = new()
    update(whole, np.arange(300))
    rng = np.random.default_rng(3)
    for _ in range(3):
        cuts = np.sort(rng.integers(0, 300, 6))
        parts = []
        for rows in np.split(rng.permutation(300), [*cuts[:2], cuts[2], *cuts[2:]]):
            part = new()
            update(part, rows)
            parts.append(type(part).from_arrays({name: array.copy() for name, array in part.arrays().items()}))
        total = new()
        for part in parts:
            total.merge(part)
        for name, array in whole.arrays().items():
            assert total.arrays()[name].dtype == array.dtype
            assert total.arrays()[name] == pytest.approx(array, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("case", [moments, predictions, sharpness])
def test_arrays_are_the_whole_state(case):
    new, update = case()
    statistic = new()
    update(statistic, np.arange(100))
    copy = type(statistic).from_arrays({name: array.copy() for name, array in statistic.arrays().items()})
    update(statistic, np.arange(100, 300))
    update(copy, np.arange(100, 300))
    for name, array in statistic.arrays().items():
        assert np.array_equal(copy.arrays()[name], array), name


def test_statistics_of_other_settings_do_not_merge():
    for one, other in [
        (Moments(2), Moments(3)),
        (Predictions(3, splits=1), Predictions(3, splits=2)),
        (Sharpness(1.0), Sharpness(2.0)),
    ]:
        with pytest.raises(ValueError, match="sigma|features|splits"):
            one.merge(other)
