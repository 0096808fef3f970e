"""Peak memory of EM: over packed MNIST and ten times as much, and of a large model over the model's own size.

It streams, so the first two are alike: the goal is a ratio of at most 1.10. The memory of a large model (images of
64x64x3) is about three times its parameters: the loadings, the projections made of them, and the statistics. Each runs
in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from mnist_files import pixels

from data.manifest import load_manifest
from data.shards import pack
from data.sources import SourceOptions, open_source
from trainer.fit import Fit
from trainer.models.mfa import MFA
from trainer.settings import EMSettings, TrainingSettings


def fit(shards: str) -> None:
    """Two iterations from a plain start; prints the peak resident memory in MiB."""
    import torch

    model = MFA(50, 784, 6, 1e-6)
    g = torch.Generator().manual_seed(0)
    means = torch.rand(50, 784, generator=g)
    model.set_components(torch.ones(50), means, torch.randn(50, 784, 6, generator=g) * 0.1, torch.full((50, 784), 0.1))
    settings = TrainingSettings(method="em", em=EMSettings(iterations=2, tolerance=None))
    Fit(model, load_manifest(shards), settings).run()
    print(_peak())


def fit_large(n_components: int) -> None:
    """Two iterations on 512 images of 12,288 random pixels, l = 10; prints parameters and peak memory in MiB."""
    import torch

    from trainer.em import fit_em

    before = _peak()
    with torch.no_grad():
        model = MFA(n_components, 12_288, 10, 1e-4)
        torch.nn.init.uniform_(model.means, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.factor_loadings, std=0.1, generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    x = model.sample(512, torch.Generator().manual_seed(1))
    fit_em(model, lambda: x.split(64), EMSettings(iterations=2, tolerance=None))
    print(size, _peak() - before)


def _peak() -> float:
    # Unlike getrusage, this does not count what the parent had when it started this process.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def main() -> None:
    train, _ = pixels()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            file, shards = Path(folder) / f"x{times}.npy", str(Path(folder) / f"shards{times}")
            np.save(file, np.tile(train, (times, 1)))
            pack(open_source(f"array:{file}", SourceOptions(test_fraction=0)), shards)
            file.unlink()
            peaks += _alone(shards)
            print(f"{times:>2} x 60,000 samples: peak {peaks[-1]:.0f} MiB")
    print(f"ratio {peaks[1] / peaks[0]:.3f} (goal 1.10)")
    found = []
    for n_components in (500, 1000):
        found.append(_alone("large", str(n_components)))
        print(f"K={n_components:,} d=12,288 l=10: parameters {found[-1][0]:,.0f} MiB, EM {found[-1][1]:,.0f} MiB more")
    slope = (found[1][1] - found[0][1]) / (found[1][0] - found[0][0])
    constant = found[0][1] - slope * found[0][0]
    large = (slope * 10 * found[1][0] + constant) / 1024
    print(f"EM takes {slope:.2f} times the parameters and {constant:,.0f} MiB; for K=10,000 that is {large:.1f} GiB")


def _alone(*arguments: str) -> list[float]:
    """The numbers that this script prints last, called in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["large"]:
        fit_large(int(sys.argv[2]))
    elif sys.argv[1:]:
        fit(sys.argv[1])
    else:
        main()
