"""How sharp images are: the energy of their fine detail relative to their own.

Source: E. Richardson and Y. Weiss, "On GANs and GMMs", NeurIPS 2018, supplement section 1.4. Imports only NumPy and
SciPy; faults raise `ValueError`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy import ndimage

from eval.metrics import checks

# The paper names no width; one pixel separates edges and texture from shape at the sizes it uses.
DEFAULT_SIGMA = 1.0
_SMALLEST_SIGMA = 0.3
_BLOCK_VALUES = 2**22
# Red, green, blue (ITU-R BT.601).
_LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class SharpnessScore:
    """Mean over `n` images and its standard error; `n_constant` images had no detail at all and were left out."""

    mean: float
    standard_error: float
    n: int
    n_constant: int
    sigma: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def sharpness(images: np.ndarray, sigma: float = DEFAULT_SIGMA) -> np.ndarray:
    """The score `[n]` of each image of `[n, height, width]` or `[n, height, width, 1 or 3]`; NaN for constant images.

        x = luminance - its mean,   high = x - Gaussian(sigma) * x,   score = log Σ high² - log Σ x²

    Natural logarithms: 0 would be nothing but detail, and blur makes it more negative. Multiplying an image by a
    constant, or adding one, changes nothing. `sigma` is in pixels; the Gaussian is cut at 4 sigma, and images are
    mirrored at their edges (the edge pixel twice), as `scipy.ndimage.gaussian_filter` does by default.

    Raises:
        ValueError: another shape, values that are not finite, or a sigma under 0.3 pixels.
    """
    grey = _luminance(images)
    n, height, width = grey.shape
    vertical, horizontal = _low_pass(height, sigma), _low_pass(width, sigma)
    scores = np.empty(n)
    rows = max(1, _BLOCK_VALUES // (height * width))
    for start in range(0, n, rows):
        x = grey[start : start + rows]
        # What is left of a constant image is rounding, of this size at the most.
        rounding = height * width * np.square(64 * np.finfo(np.float64).eps * np.abs(x).max(axis=(1, 2)))
        x = x - x.mean(axis=(1, 2), keepdims=True)
        high = x - vertical @ x @ horizontal.T
        energy, fine = np.einsum("nhw,nhw->n", x, x), np.einsum("nhw,nhw->n", high, high)
        constant = energy <= rounding
        ratio = fine / np.where(constant, 1.0, energy)
        # Far below what rounding leaves of any image, so that a logarithm is always finite.
        scores[start : start + rows] = np.where(constant, np.nan, np.log(np.maximum(ratio, 1e-30)))
    return scores


class Sharpness:
    """Mean and spread of `sharpness` over images; constant images are counted apart."""

    def __init__(self, sigma: float = DEFAULT_SIGMA) -> None:
        _check_sigma(sigma)
        self.sigma = sigma
        self.n = 0
        self.mean = 0.0
        self.squares = 0.0
        self.n_constant = 0

    def update(self, images: np.ndarray) -> None:
        """Takes in images as `sharpness` does; they need not be of one size.

        Raises:
            ValueError: as `sharpness`.
        """
        scores = sharpness(images, self.sigma)
        kept = scores[~np.isnan(scores)]
        self.n_constant += len(scores) - len(kept)
        if len(kept):
            mean = float(kept.mean())
            self._add(len(kept), mean, float(np.square(kept - mean).sum()))

    def merge(self, other: Self) -> None:
        """Takes in what another one has seen.

        Raises:
            ValueError: another sigma.
        """
        if other.sigma != self.sigma:
            raise ValueError(f"sharpness at sigma {self.sigma} and at {other.sigma} cannot be merged")
        self.n_constant += other.n_constant
        if other.n:
            self._add(other.n, other.mean, other.squares)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state: sigma, n, mean, sum of squared deviations, constant images."""
        return {
            "sigma": np.asarray(self.sigma, np.float64),
            "n": np.asarray(self.n, np.int64),
            "mean": np.asarray(self.mean, np.float64),
            "squares": np.asarray(self.squares, np.float64),
            "n_constant": np.asarray(self.n_constant, np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The statistic of that state."""
        statistic = cls(float(arrays["sigma"]))
        statistic.n, statistic.n_constant = int(arrays["n"]), int(arrays["n_constant"])
        statistic.mean, statistic.squares = float(arrays["mean"]), float(arrays["squares"])
        return statistic

    def score(self) -> SharpnessScore:
        """Mean and standard error, s / √n.

        Raises:
            ValueError: fewer than two images that are not constant.
        """
        if self.n < 2:
            raise ValueError(
                f"sharpness needs at least 2 images that are not constant, got {self.n} "
                f"(and {self.n_constant} constant): take more"
            )
        error = float(np.sqrt(self.squares / (self.n - 1) / self.n))
        return SharpnessScore(self.mean, error, self.n, self.n_constant, self.sigma)

    def _add(self, n: int, mean: float, squares: float) -> None:
        total, delta = self.n + n, mean - self.mean
        self.squares += squares + delta * delta * self.n * n / total
        self.mean += delta * n / total
        self.n = total


def _luminance(images: np.ndarray) -> np.ndarray:
    """One channel, `[n, height, width]` float64."""
    x = np.asarray(images)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape[1:3] or x.dtype.kind not in "fiub":
        raise ValueError(f"images [n, height, width, 1 or 3] are needed, got {np.asarray(images).dtype} {x.shape}")
    checks.finite(x, "images")
    if x.shape[-1] == 1:
        return x[..., 0].astype(np.float64)
    red, green, blue = (weight * x[..., channel].astype(np.float64) for channel, weight in enumerate(_LUMINANCE))
    return red + green + blue


def _check_sigma(sigma: float) -> None:
    if not _SMALLEST_SIGMA <= sigma < np.inf:
        raise ValueError(f"sigma must be at least {_SMALLEST_SIGMA} pixels, got {sigma}")


@functools.lru_cache(maxsize=16)
def _low_pass(size: int, sigma: float) -> np.ndarray:
    """The Gaussian filter along one axis as a matrix `[size, size]`, edges included."""
    _check_sigma(sigma)
    return np.ascontiguousarray(ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0))
