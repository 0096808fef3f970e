"""What fitting bins costs beyond K-means itself: `bins_of` against `faiss.Kmeans` called directly, on MNIST.

Prints the ratio of the fastest of two alternating runs each; both train on the same 45,000 x 784 values with
K = 100 and 10 starts, FAISS with its usual 25 iterations of each. The goal is a ratio of at most 1.10. Then the
two objectives: what is fitted here may not be worse.
"""

from __future__ import annotations

import time

import faiss
from mnist_files import scaled

from data import kmeans
from eval.arrays import bins_of
from eval.bins import BinSettings


def main() -> None:
    flat = scaled()[0][:45_000]
    x = flat.reshape(-1, 28, 28, 1)
    direct, fitted, objectives = [], [], []
    for _ in range(2):
        start = time.perf_counter()
        objectives.append(
            faiss.Kmeans(784, 100, niter=25, nredo=10, seed=0, max_points_per_centroid=len(x)).train(flat)
        )
        direct.append(time.perf_counter() - start)
        start = time.perf_counter()
        bins_of(x, BinSettings(), name="MNIST", fingerprint="")
        fitted.append(time.perf_counter() - start)
    ratio = min(fitted) / min(direct)
    print(f"bins_of {min(fitted):.1f} s, faiss.Kmeans {min(direct):.1f} s, ratio {ratio:.3f}")
    ours = kmeans.fit(flat, 100).objective
    print(f"sum of squared distances: {ours:.5g}, faiss.Kmeans {objectives[0]:.5g}, ratio {ours / objectives[0]:.5f}")


if __name__ == "__main__":
    main()
