"""What flows reach on the ring, and what a step of theirs costs.

1. `ring`: 5,000 batches of 300, every sample seen once (1.5 million), five seeds of data and of networks: the gap
   E[log p_true - log p_model] over 20,000 fresh samples in nats per sample, both on the same samples, with its standard
   error; before training and after it. Goals: MixFlow at most 0.005 on every seed, the single flow at most 0.8. Beside
   them the naive start, without an affine layer at the data.
2. `speed`: a step (loss, gradients, Adam) of MixFlow with 10 components over that of a loop over 10 single flows
   (goal: half), and a NICE step over those of zuko, nflows and normflows with the same sizes, those that are installed
   (goal: no slower than the fastest); one thread, CPU time, best of alternating runs.

    python tests/benchmarks/bench_flow.py [ring] [speed]
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.recipe import Recipe, load_recipe
from data.shards import pack
from data.sources import open_source
from data.toys import toy
from trainer.fit import Fit, trained_tensors
from trainer.models.flow import Flow

SEEDS, FRESH = 5, 20_000
GOALS = {"ring-mixflow": 0.005, "ring-flow": 0.8}


def gap(model: Any, seed: int) -> tuple[float, float]:
    """Nats per sample below the true density of the ring, and the standard error, over fresh samples."""
    ring = toy("ring")
    x, _ = ring.draw(FRESH, np.random.default_rng([seed, 2**40]))
    with torch.no_grad():
        values = ring.log_density(x) - model.eval().log_prob(torch.from_numpy(x)).double().numpy()
    return float(values.mean()), float(values.std() / FRESH**0.5)


def gaps(recipe: Recipe, seed: int) -> tuple[float, float, float, float]:
    """The gap before training, after it, its standard error, and the seconds of training."""
    training, family = recipe.training.model_copy(update={"seed": seed}), recipe.model
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(str(recipe.data.source), recipe.data.options.model_copy(update={"seed": seed}))
        manifest = pack(source, folder)
        torch.manual_seed(seed)
        model: Any = family.build(manifest)
        family.initialise(model, manifest, training, recipe.initialisation)
        start = gap(model, seed)[0]
        began = time.perf_counter()
        state = trained_tensors(Fit(model.train(), manifest, training, objective=family.objective).run())
        seconds = time.perf_counter() - began
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return start, *gap(model, seed), seconds


def ring() -> None:
    print(f"{'ring, gap in nats per sample':<34} seed  at step 0     after   ± s.e.  seconds")
    for name, overrides in (
        ("ring-mixflow", []),
        ("ring-mixflow", ["model.weights=em"]),
        ("ring-mixflow", ["model.affine=none"]),
        ("ring-flow", []),
    ):
        found = []
        title = " ".join([name, *overrides])
        for seed in range(SEEDS):
            start, after, error, seconds = gaps(load_recipe(name, overrides), seed)
            found.append(after)
            print(f"{title:<34} {seed:>4} {start:>10.4f} {after:>9.5f} {error:>8.5f} {seconds:>8.0f}", flush=True)
        goal = f" (goal {GOALS[name]})" if overrides != ["model.affine=none"] else " (naive)"
        print(f"{title:<34} mean {np.mean(found):.5f}, largest {max(found):.5f}{goal}")


def step_of(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.Adam(parameters, 1e-4)

    def step() -> None:
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step


def fastest(functions: dict[str, Callable[[], None]], runs: int = 12, repeats: int = 4) -> dict[str, float]:
    """CPU seconds of each function, the best of alternating runs."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(runs):
        for name, function in functions.items():
            began = time.process_time()
            for _ in range(repeats):
                function()
            best[name] = min(best[name], (time.process_time() - began) / repeats)
    return best


def components(d: int, width: int, n_layers: int, batch: int) -> None:
    options: dict[str, Any] = {"n_couplings": 3, "width": width, "n_layers": n_layers}
    x = torch.randn(batch, d)
    mixture, singles = Flow([d], 10, **options), nn.ModuleList(Flow([d], **options) for _ in range(10))
    logits = nn.Parameter(torch.zeros(10))

    def loop() -> torch.Tensor:
        # A ModuleList gives modules, of which mypy knows no log_prob.
        parts = torch.stack([one.log_prob(x) for one in singles], 1)  # type: ignore[operator]
        return -(parts + logits.log_softmax(0)).logsumexp(1).mean()

    times = fastest(
        {
            "batched": step_of(lambda: -mixture(x)[0].mean(), list(mixture.parameters())),
            "loop": step_of(loop, [*singles.parameters(), logits]),
        }
    )
    ratio = times["batched"] / times["loop"]
    print(
        f"MixFlow step, T=10, d={d}, width {width}, {n_layers} hidden layers, batch {batch}: "
        f"{times['batched'] * 1e3:.1f} ms, a loop {times['loop'] * 1e3:.1f} ms, ratio {ratio:.2f} (goal 0.5)"
    )


def libraries(d: int, width: int, n_layers: int, batch: int, n_couplings: int = 4) -> None:
    x = torch.randn(batch, d)
    model = Flow([d], n_couplings=n_couplings, width=width, n_layers=n_layers, affine="none")
    steps = {"ours": step_of(lambda: -model(x)[0].mean(), list(model.parameters()))}
    for name, make in (("zuko", _zuko), ("nflows", _nflows), ("normflows", _normflows)):
        try:
            flow, log_prob = make(d, width, n_layers, n_couplings)
        except ImportError:
            print(f"{name} is not installed: pip install {name}")
            continue
        # The default keeps this round's function; mypy cannot infer its type.
        steps[name] = step_of(lambda log_prob=log_prob: -log_prob(x).mean(), list(flow.parameters()))  # type: ignore[misc]
    times = fastest(steps)
    ours = times.pop("ours")
    others = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in times.items()) or "no library installed"
    ratio = f", ratio to the fastest {ours / min(times.values()):.2f} (goal 1)" if times else ""
    print(
        f"NICE step, d={d}, {n_couplings} couplings, {n_layers} x {width}, batch {batch}: {ours * 1e3:.1f} ms; {others}"
        f"{ratio}"
    )


def _zuko(d: int, width: int, n_layers: int, n_couplings: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    flows, transforms = (importlib.import_module(f"zuko.{name}") for name in ("flows", "transforms"))
    layers = [
        flows.GeneralCouplingTransform(
            d,
            mask=torch.arange(d) % 2 == i % 2,
            univariate=transforms.AdditiveTransform,
            shapes=[()],
            hidden_features=[width] * n_layers,
        )
        for i in range(n_couplings)
    ]
    normal, lazy = importlib.import_module("zuko.distributions").DiagNormal, importlib.import_module("zuko.lazy")
    base = lazy.UnconditionalDistribution(normal, torch.zeros(d), torch.ones(d), buffer=True)
    flow = flows.Flow(layers, base)
    return flow, lambda x: flow().log_prob(x)


def _nflows(d: int, width: int, n_layers: int, n_couplings: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    realnvp = importlib.import_module("nflows.transforms")
    flows, normal = (importlib.import_module(f"nflows.{name}") for name in ("flows.base", "distributions.normal"))
    layers = [
        realnvp.AdditiveCouplingTransform(
            (torch.arange(d) + i) % 2,
            lambda n_in, n_out: _perceptron(n_in, n_out, width, n_layers),
        )
        for i in range(n_couplings)
    ]
    flow = flows.Flow(realnvp.CompositeTransform(layers), normal.StandardNormal([d]))
    return flow, flow.log_prob


def _normflows(d: int, width: int, n_layers: int, n_couplings: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    library = importlib.import_module("normflows")
    layers: list[nn.Module] = []
    for _ in range(n_couplings):
        network = library.nets.MLP([d // 2, *[width] * n_layers, d - d // 2], init_zeros=True)
        layers += [library.flows.AffineCouplingBlock(network, scale=False), library.flows.Permute(d, mode="swap")]
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(d, trainable=False), layers)
    return flow, flow.log_prob


def _perceptron(n_in: int, n_out: int, width: int, n_layers: int) -> nn.Module:
    sizes = [n_in, *[width] * n_layers]
    hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]  # noqa: RUF007
    layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], n_out))
    # nflows gives its networks a second argument, which these do not take.
    layers.forward = (lambda run: lambda x, context=None: run(x))(layers.forward)  # type: ignore[method-assign]
    return layers


def speed() -> None:
    torch.set_num_threads(1)
    components(2, 50, 3, 300)
    components(2, 50, 3, 30)
    components(64, 100, 3, 30)
    components(64, 100, 3, 128)
    components(784, 200, 3, 128)
    libraries(2, 100, 5, 300)
    libraries(64, 200, 3, 256)
    libraries(784, 1000, 5, 200)


if __name__ == "__main__":
    for part in sys.argv[1:] or ("ring", "speed"):
        {"ring": ring, "speed": speed}[part]()
