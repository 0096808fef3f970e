"""Samples that are drawn while they are judged: what is kept of them belongs to one model, one size, one grid."""

import numpy as np

from eval.drawn import DrawnPartitions, partition_seed
from eval.measure import local_pass
from eval.observed import Extent
from eval.stored import observe_stored


class Normal:
    def sample(self, n, seed):
        return np.random.default_rng(seed).standard_normal((n, 4)).astype(np.float32)


def drawn(n=20_000, identity="a", shape=(4,), levels=None, seed=0):
    return DrawnPartitions(Normal, n, seed, name="m", identity=identity, shape=shape, levels=levels)


def test_a_store_never_gives_the_statistics_of_other_draws(tmp_path):
    """One store for all: another number, model, shape, grid or seed is another set, and a longer one is whole."""

    def stored(*args):
        return observe_stored(*args, store=str(tmp_path))

    cases = [drawn(10_000), drawn(20_000), drawn(identity="b"), drawn(shape=(2, 2)), drawn(levels=16), drawn(seed=1)]
    for parts in cases:
        found = local_pass(parts, observe=stored)({"extent": Extent()})["extent"]
        alone = local_pass(parts)({"extent": Extent()})["extent"]
        assert vars(found) == vars(alone)
        assert found.n == parts.n
    # Those of 10,000 are 8,192 and 1,808: the first partition of 20,000 is the same and is not drawn again.
    assert len(list(tmp_path.iterdir())) == sum(map(len, cases)) - 1


def test_no_two_partitions_of_a_set_draw_the_same():
    """PyTorch takes the lower 32 bits of a seed: random ones would meet among 200,000 with odds of 99 %."""
    seeds = [partition_seed(7, number) for number in range(200_000)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)
    assert len({partition_seed(seed, 0) >> 32 for seed in range(1000)}) == 1000
    np.testing.assert_array_equal(*(np.concatenate([p.x for p in drawn().pieces(1)]) for _ in range(2)))
