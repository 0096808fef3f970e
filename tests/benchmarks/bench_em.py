"""EM and likelihoods of mixtures of factor analysers on MNIST against bare matrix products, and what they reach.

1. Isotropic noise, K = 50, l = 6, pixels v / 255, all 60,000 images: the time of an iteration and of `log_prob`
   over that of the matrix products of the dense algorithm (E-step: x with the means and with the projections; M-step:
   responsibilities with x, and responsibilities times factors with x), fastest of alternating runs. Goals: 1.8 and 2.
   Then the test log-likelihood after 8 iterations. Goal: 418 nats.
2. Diagonal noise on dequantised pixels (v + u) / 256: test log-likelihood. Goals: 2,300 nats (K = 50, l = 6) and
   2,470 (K = 200, l = 8). Prior and iterations were chosen by the last 10,000 training images.
3. What twice the samples, components and factors cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from mnist_files import dequantised, scaled

from eval.likelihood import summarise
from trainer.em import fit_em
from trainer.initialise import initialise_mfa
from trainer.models.mfa import MFA
from trainer.settings import EMSettings, InitialisationSettings

CHUNK = 2048


def fastest(*functions: Callable[[], object], runs: int = 5) -> list[float]:
    """Seconds of each function, the best of alternating runs."""
    best = [float("inf")] * len(functions)
    for _ in range(runs):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def products(x: torch.Tensor, k: int, n_factors: int, *, m_step: bool) -> Callable[[], None]:
    """The dense algorithm's matrix products, in chunks that stay in cache."""
    d = x.shape[1]
    means, projections = torch.rand(k, d), torch.rand(k * n_factors, d)
    r, u = torch.rand(CHUNK, k), torch.rand(CHUNK, k * n_factors)

    def run() -> None:
        first, cross = torch.zeros(k, d), torch.zeros(k * n_factors, d)
        for rows in x.split(CHUNK):
            rows @ means.T
            rows @ projections.T
            if m_step:
                first.addmm_(r[: len(rows)].T, rows)
                cross.addmm_(u[: len(rows)].T, rows)

    return run


def iterate(model: MFA, x: torch.Tensor, iterations: int = 1) -> None:
    fit_em(model, lambda: [x], EMSettings(iterations=iterations, tolerance=None))


def held_out_likelihood(model: MFA, x: torch.Tensor, levels: int | None = None) -> str:
    with torch.inference_mode():
        values = torch.cat([model.log_prob(part) for part in x.split(1000)]).double().numpy()
    found = summarise(values, n_dimensions=None if levels is None else 784, levels=levels or 256)
    return f"{found} nats" if levels is None else f"{found} nats, {found.bits_per_dimension:.3f} bits/dim"


def isotropic() -> None:
    train, test = scaled()
    x, held_out = torch.from_numpy(train), torch.from_numpy(test)
    model = MFA(50, 784, 6, 1e-6, "isotropic")
    began = time.perf_counter()
    initialise_mfa(model, train, InitialisationSettings(kmeans_samples=20_000, n_init=1, n_starts=6), seed=0)
    print(f"isotropic K=50 l=6: starting point (best of 6) {time.perf_counter() - began:.1f} s")
    iterate(model, x, 8)
    print(f"  after 8 iterations: test log-likelihood {held_out_likelihood(model, held_out)} (goal 418)")
    bare, ours = fastest(products(x, 50, 6, m_step=True), lambda: iterate(model, x))
    print(f"  iteration {ours:.3f} s, matrix products {bare:.3f} s, ratio {ours / bare:.2f} (goal 1.8)")
    with torch.inference_mode():
        bare, ours = fastest(products(held_out, 50, 6, m_step=False), lambda: model.log_prob(held_out))
    print(f"  log_prob of 10,000 {ours:.4f} s, matrix products {bare:.4f} s, ratio {ours / bare:.2f} (goal 2)")


def diagonal(k: int, n_factors: int, iterations: int, goal: int) -> None:
    train, test = dequantised()
    model = MFA(k, 784, n_factors, 1e-6)
    settings = InitialisationSettings(kmeans_samples=20_000, n_init=3, noise_prior_count=0.5, noise_prior_smoothing=1.0)
    began = time.perf_counter()
    initialise_mfa(model, train, settings, seed=0, shape=(28, 28))
    started = time.perf_counter() - began
    iterate(model, torch.from_numpy(train), iterations)
    seconds = time.perf_counter() - began
    reached = held_out_likelihood(model, torch.from_numpy(test), 256)
    print(f"diagonal K={k} l={n_factors}: {seconds:.0f} s (start {started:.0f} s), test {reached} (goal {goal})")


def scaling() -> None:
    train, _ = dequantised()

    def seconds(n: int, k: int, n_factors: int) -> float:
        model = MFA(k, 784, n_factors, 1e-6)
        x = np.ascontiguousarray(train[:n])
        start = InitialisationSettings(kmeans_samples=5000, n_init=1, noise_prior_count=1, max_samples=10_000)
        initialise_mfa(model, x[:10_000], start, seed=0)
        return fastest(lambda: iterate(model, torch.from_numpy(x)), runs=3)[0]

    base = seconds(20_000, 50, 6)
    print(f"seconds of an iteration: {base:.3f} (20,000 samples, K=50, l=6); ratio to it with twice as many")
    for name, sizes in (("samples", (40_000, 50, 6)), ("components", (20_000, 100, 6)), ("factors", (20_000, 50, 12))):
        print(f"  {name:<10} {seconds(*sizes) / base:.2f}")


if __name__ == "__main__":
    isotropic()
    diagonal(50, 6, 15, 2300)
    diagonal(200, 8, 12, 2470)
    scaling()
