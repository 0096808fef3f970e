"""Peak memory of EM over packed MNIST, and over ten times as much: it streams, so the two are alike.

Each runs in a process of its own; the goal is a ratio of at most 1.10.
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
    settings = TrainingSettings(method="em", em=EMSettings(iterations=2, tolerance=-1))
    Fit(model, load_manifest(shards), settings).run()
    # Unlike getrusage, this does not count what the parent had when it started this process.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def main() -> None:
    train, _ = pixels()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            file, shards = Path(folder) / f"x{times}.npy", str(Path(folder) / f"shards{times}")
            np.save(file, np.tile(train, (times, 1)))
            pack(open_source(f"array:{file}", SourceOptions(test_fraction=0)), shards)
            file.unlink()
            done = subprocess.run(
                [sys.executable, __file__, shards], capture_output=True, text=True, check=True, timeout=600
            )
            peaks.append(float(done.stdout.split()[-1]))
            print(f"{times:>2} x 60,000 samples: peak {peaks[-1]:.0f} MiB")
    print(f"ratio {peaks[1] / peaks[0]:.3f} (goal 1.10)")


if __name__ == "__main__":
    fit(sys.argv[1]) if len(sys.argv) > 1 else main()
