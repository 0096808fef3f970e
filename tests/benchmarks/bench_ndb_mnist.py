"""NDB on MNIST, where the truth is known: held-out data of the same split, the same without a digit, the test set.

Per seed: the 60,000 training images are permuted, 45,000 are the reference (K = 100, pixels v / 255), and 10,000
are drawn from the other 15,000 for each of the first two queries. The official test set is from other
writers, so it differs a little, and NDB sees it. Arguments: the number of seeds (default 3), and max_samples for
K-means (default: all).
"""

from __future__ import annotations

import sys

import numpy as np
from mnist_files import blocks

from data.pixels import scale
from eval.bins import BinSettings, fit_bins
from eval.evaluate import evaluate_samples
from eval.ndb import score


def main(seeds: int = 3, max_samples: int | None = None) -> None:
    train, held_out = blocks()
    images, digits, test = scale(train["x"], 256), train["label"], scale(held_out["x"], 256)
    print(f"{'seed':>4}  {'samples':<22}{'NDB z>4':>8}{'NDB z>3':>8}{'JS':>9}")
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(images))
        known, held = order[:45_000], order[45_000:]
        settings = BinSettings(seed=seed, max_samples=max_samples)
        bins = fit_bins(images[known], settings, reference_name="MNIST", reference_fingerprint=f"seed {seed}")
        assert np.array_equal(bins.count(images[known]), bins.counts), "the reference must count as it was counted"
        labels = bins.assign(images[known])
        queries = {
            "validation": images[held[:10_000]],
            "validation without 9": images[held[digits[held] != 9][:10_000]],
            "test": test,
        }
        for name, x in queries.items():
            found = evaluate_samples(bins, x, name=name, scale="pixels in [0, 1]", z_threshold=4.0).result
            at_three = score(bins.counts, np.bincount(bins.assign(x), minlength=100), z_threshold=3.0)
            print(f"{seed:>4}  {name:<22}{found.ndb:>8}{at_three.ndb:>8}{found.js:>9.4f}")
            if name == "validation without 9":
                for k in at_three.by_evidence()[: at_three.ndb]:
                    share = np.mean(digits[known][labels == k] == 9)
                    told = f"bin {k:>3} {found.direction(k):<17} z {found.z[k]:+6.1f}  9s {share:4.0%}"
                    print(f"      {told}{'' if found.flagged[k] else '  (z>3 only)'}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
