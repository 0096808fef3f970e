"""Sets of samples to be scored, and the commands that score them."""

import numpy as np

FEW = ("--bins", 10, "--n-init", 1, "--subsample", 200, "--scores", "none")


def blobs(n, seed=0):
    """Samples [n, 8, 8, 1] of a mixture of ten modes."""
    rng = np.random.default_rng(seed)
    points = np.random.default_rng(5).random((10, 8, 8, 1))
    x = points[rng.integers(0, 10, n)] + 0.1 * rng.standard_normal((n, 8, 8, 1))
    return x.astype(np.float32)


def run(*arguments):
    """Calls the command line; typer's result, with the exception that it ended with."""
    from typer.testing import CliRunner

    from cluster.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
