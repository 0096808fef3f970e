"""Real images for the scores: held-out digits against training digits, and the same slightly spoilt."""

from types import SimpleNamespace

import numpy as np
import pytest

from data.sources import SourceOptions, open_source


@pytest.fixture(scope="session")
def digits(mnist_folder):
    """MNIST: `reference` and `samples` [1000, 784] in [0, 1], the samples faded and noisy, and `labels` [1000]."""
    source = open_source(f"mnist:{mnist_folder}", SourceOptions(shuffle=False))
    train, test = next(source.blocks("train", 1000)), next(source.blocks("test", 1000))
    noise = np.random.default_rng(0).normal(0, 0.03, (1000, 784))
    return SimpleNamespace(
        reference=train["x"].reshape(1000, 784) / 255,
        samples=test["x"].reshape(1000, 784) / 255 * 0.9 + noise,
        labels=train["label"],
    )


@pytest.fixture
def compare():
    """Prints our figure beside the established one, and asks for four digits."""

    def check(name, ours, theirs, rel=1e-4):
        print(f"{name}: {ours:.8g}, established {float(theirs):.8g}")
        assert ours == pytest.approx(float(theirs), rel=rel)

    return check
