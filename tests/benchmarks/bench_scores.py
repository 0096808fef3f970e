"""What each score costs beyond the matrix products that it cannot do without: 10,000 samples of 784 features.

Prints seconds, those of the same products by NumPy in the same precision in the same run, and the ratio. The goal is
about 2. Scores whose work is not products (the decompositions of FID, the sorts of the sliced distance, the passes
over Sinkhorn's cost matrix) are measured against a plain call of that work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import linalg

from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import manifold_scores, nearest_neighbours
from eval.metrics.moments import Moments, frechet_distance, frechet_standard_error
from eval.metrics.predictions import Predictions
from eval.metrics.sharpness import Sharpness
from eval.metrics.transport import sinkhorn_divergence, sliced_wasserstein

N = 10_000


def seconds(call: Callable[[], object], repeats: int = 2) -> float:
    """The fastest of a few."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def line(name: str, score: Callable[[], object], yardstick: Callable[[], object], what: str, times: float = 1) -> None:
    own, plain = seconds(score), times * seconds(yardstick)
    print(f"{name:34} {own:7.2f} s   {plain:7.2f} s {what:42} ratio {own / plain:5.2f}", flush=True)


def frechet(d: int, rng: np.random.Generator) -> None:
    mixing = rng.normal(size=(d, d)).astype(np.float32) / np.sqrt(d)
    x, y = (rng.normal(size=(N, d)).astype(np.float32) @ mixing for _ in range(2))
    x64 = x.astype(np.float64)
    moments = [Moments(d), Moments(d)]
    line(f"moments, d = {d}", lambda: Moments(d).update(x), lambda: x64.T @ x64, "product of the features, float64")
    moments[0].update(x)
    moments[1].update(y)
    a, b = (m.covariance() for m in moments)
    line(
        f"FID, d = {d}",
        lambda: frechet_distance(*moments),
        lambda: (linalg.cholesky(a), a @ b, torch.linalg.svdvals(torch.from_numpy(b))),
        "Cholesky, product, singular values",
    )
    line(
        f"FID's standard error, d = {d}",
        lambda: frechet_standard_error(moments[0], moments[1], x[:5000], y[:5000]),
        lambda: (a @ b, torch.linalg.svd(torch.from_numpy(b)), x64 @ a),
        "product, singular vectors, two halves",
    )


def main() -> None:
    rng = np.random.default_rng(0)
    for d in (784, 2048):
        frechet(d, rng)
    d = 784
    # Twenty directions carry nearly all, as in real features: distances are far from equal.
    mixing = rng.normal(size=(20, d))
    x, y = ((rng.normal(size=(N, 20)) @ mixing + 0.3 * rng.normal(size=(N, d))).astype(np.float32) for _ in range(2))
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    part = x64[:1000], y64[:1000]
    line(
        "KID, 100 subsets of 1,000",
        lambda: kernel_distance(x, y),
        lambda: (part[0] @ part[0].T, part[1] @ part[1].T, part[0] @ part[1].T),
        "300 products, float64",
        100,
    )
    line("precision, recall, density, cov.", lambda: manifold_scores(x, y), lambda: x @ y.T, "3 products, float32", 3)
    line("nearest neighbours", lambda: nearest_neighbours(y, x, 1), lambda: x @ y.T, "1 product, float32", 1)
    directions = rng.normal(size=(500, d))
    projected = directions @ x64.T
    line(
        "sliced Wasserstein, 500",
        lambda: sliced_wasserstein(x, y),
        lambda: (directions @ x64.T, np.sort(projected, axis=1)),
        "2 products and 2 sorts, float64",
        2,
    )
    cost = torch.rand(5000, 5000)
    passes = sinkhorn_divergence(x[:5000], y[:5000]).iterations + 2
    line(
        f"Sinkhorn, n = 5,000, {passes - 2} iterations",
        lambda: sinkhorn_divergence(x[:5000], y[:5000]),
        lambda: (x64[:5000] @ y64[:5000].T, [torch.exp(cost) for _ in range(passes)]),
        f"3 products, 3 x {passes} exponentials",
        3,
    )
    p = rng.dirichlet(np.ones(1000), N)
    members = rng.random((10, N))
    line(
        "predictions, 1,000 classes",
        lambda: Predictions(1000).update(p, np.arange(N)),
        lambda: (members @ p, np.log(p)),
        "product and logarithms, float64",
    )
    images, filters = x.reshape(N, 28, 28), rng.normal(size=(28, 28))
    line(
        "sharpness, 28 x 28",
        lambda: Sharpness().update(images),
        lambda: filters @ x64.reshape(N, 28, 28) @ filters,
        "2 products per image, float64",
    )


if __name__ == "__main__":
    main()
