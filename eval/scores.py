"""The scores beside NDB and JS: what one pass has to gather for them, and the table that comes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from data.errors import UserError
from eval.canvas import is_image
from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import Memorisation, manifold_scores
from eval.metrics.moments import MAX_FEATURES, Moments, frechet_distance, frechet_standard_error
from eval.metrics.predictions import Predictions
from eval.metrics.sharpness import Sharpness
from eval.metrics.transport import sinkhorn_divergence, sliced_wasserstein
from eval.observed import Observed, Sketch

SCORES = ("fid", "kid", "manifold", "transport", "sharpness", "classes", "memorisation")
_PAIRWISE = {"fid", "kid", "manifold", "transport"}
# Between entropic transport plans every iteration costs n^2.
_SINKHORN_SAMPLES = 2000


@dataclass(frozen=True)
class ScoreSettings:
    """Which scores are taken, and from how many samples those that compare pairs."""

    names: tuple[str, ...] = SCORES
    subsample: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.names) - set(SCORES)
        if unknown:
            raise UserError(f"unknown scores {', '.join(sorted(unknown))}: choose from {', '.join(SCORES)}")
        if self.subsample < 10:
            raise UserError(f"{self.subsample} samples are too few for scores of pairs: take at least 10")

    def facts(self) -> dict[str, Any]:
        """For protocols."""
        if not self.names:
            return {"scores": "none"}
        return {"scores": ", ".join(self.names), "pairs_subsample": self.subsample, "scores_seed": self.seed}


@dataclass(frozen=True)
class Score:
    """One score: its value, its standard error or spread where it has one, and how it was taken, in words."""

    name: str
    value: float
    error: float | None
    better: str
    protocol: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")


class Summary:
    """What the scores need to know of a set: moments, a random subset, class predictions, labels, sharpness."""

    def __init__(self, settings: ScoreSettings, n: int | None = None) -> None:
        self.settings, self.n = settings, n
        wanted = set(settings.names)
        self.sketch = Sketch(settings.subsample, n, settings.seed) if wanted & _PAIRWISE else None
        self.sharpness = Sharpness() if "sharpness" in wanted else None
        self.moments: Moments | None = None
        self.predictions: Predictions | None = None
        self.labels = np.zeros(0, np.int64)

    def observe(self, seen: Observed) -> None:
        """Takes in one block; raises UserError for features that are no numbers."""
        wanted = set(self.settings.names)
        try:
            if self.sketch is not None:
                self.sketch.observe(seen)
            if "fid" in wanted and seen.features.shape[1] <= MAX_FEATURES:
                self.moments = self.moments or Moments(seen.features.shape[1])
                self.moments.update(seen.features)
            if self.sharpness is not None and is_image(seen.x.shape[1:]):
                self.sharpness.update(seen.x)
            if "classes" in wanted and seen.probabilities is not None:
                self.predictions = self.predictions or Predictions(seen.probabilities.shape[1])
                self.predictions.update(seen.probabilities, seen.ids)
            if "classes" in wanted and seen.labels is not None and seen.labels.min() >= 0:
                self.labels = _added(self.labels, np.bincount(seen.labels))
        except ValueError as error:
            raise UserError(str(error)) from error

    def merge(self, other: Self) -> None:
        for name in ("sketch", "sharpness", "moments", "predictions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                setattr(self, name, copy.deepcopy(theirs))
            elif theirs is not None:
                mine.merge(theirs)
        self.labels = _added(self.labels, other.labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """Its whole state, to be stored."""
        found = {"labels": self.labels}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                found |= {f"{name}.{key}": np.asarray(value) for key, value in part.arrays().items()}
        return found

    @classmethod
    def from_arrays(cls, settings: ScoreSettings, arrays: Mapping[str, np.ndarray]) -> Self:
        """The summary of that state."""
        found = cls(settings)
        for name, kind in _PARTS.items():
            own = {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
            setattr(found, name, kind.from_arrays(own) if own else None)
        found.labels = arrays["labels"]
        return found

    def identity(self) -> str:
        """What else it depends on."""
        return f"summary {self.settings} {self.n}"

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> Summary:
        """Of that state, of the partition that is number `number` now."""
        found = Summary.from_arrays(self.settings, arrays)
        if found.sketch is not None:
            found.sketch = found.sketch.restored(found.sketch.arrays(), number)
        return found

    def label_distribution(self) -> tuple[np.ndarray, str] | None:
        """p*(y) and where it comes from: the labels where there are any, else what the classifier says."""
        if self.labels.sum():
            return self.labels / self.labels.sum(), "labels"
        if self.predictions is not None:
            return self.predictions.label_distribution(), "the classifier's predictions"
        return None


_PARTS: dict[str, Any] = {"sketch": Sketch, "sharpness": Sharpness, "moments": Moments, "predictions": Predictions}


def scores_of(reference: Summary, samples: Summary, memorised: Memorisation | None = None) -> list[Score]:
    """Every score that the two summaries allow.

    Raises:
        UserError: too few samples for a score, or features that do not fit.
    """
    found: list[Score] = []
    for take in (_frechet, _kernel, _manifold, _transport, _sharpness, _classes):
        try:
            found += take(reference, samples)
        except ValueError as error:
            raise UserError(f"{take.__name__.strip('_')}: {error}") from error
    if memorised is not None:
        found += _memorised(memorised)
    return found


def _frechet(reference: Summary, samples: Summary) -> list[Score]:
    a, b = reference.moments, samples.moments
    if a is None or b is None:
        return []
    error = None
    if reference.sketch is not None and samples.sketch is not None:
        error = frechet_standard_error(a, b, reference.sketch.features(), samples.sketch.features())
    words = f"{a.n:,} and {b.n:,} samples, {len(a.mean)} features; finite samples raise it"
    return [Score("FID", frechet_distance(a, b), error, "lower", words)]


def _pair(reference: Summary, samples: Summary, least: int) -> tuple[np.ndarray, np.ndarray] | None:
    if reference.sketch is None or samples.sketch is None:
        return None
    a, b = reference.sketch.features(), samples.sketch.features()
    if min(len(a), len(b)) < least:
        return None
    return a, b


def _kernel(reference: Summary, samples: Summary) -> list[Score]:
    pair = _pair(reference, samples, 10)
    if pair is None or "kid" not in samples.settings.names:
        return []
    size = min(1000, len(pair[0]), len(pair[1]))
    subsets = 100 if size == 1000 else 20
    found = kernel_distance(*pair, subsets=subsets, subset_size=size, seed=samples.settings.seed)
    words = f"unbiased, {found.subsets} subsets of {found.subset_size}; ±: standard deviation over subsets"
    return [Score("KID", found.mean, found.standard_deviation, "lower", words)]


def _manifold(reference: Summary, samples: Summary) -> list[Score]:
    pair = _pair(reference, samples, 10)
    if pair is None or "manifold" not in samples.settings.names:
        return []
    found = manifold_scores(*pair)
    words = f"{found.n_reference:,} and {found.n_samples:,} samples, {found.neighbours} neighbours"
    return [
        Score(name, getattr(found, name), getattr(found, f"{name}_standard_error"), "higher", words)
        for name in ("precision", "recall", "density", "coverage")
    ]


def _transport(reference: Summary, samples: Summary) -> list[Score]:
    pair = _pair(reference, samples, 10)
    if pair is None or "transport" not in samples.settings.names:
        return []
    sliced = sliced_wasserstein(*pair, seed=samples.settings.seed)
    a, b = (part[:: -(-len(part) // _SINKHORN_SAMPLES)] for part in pair)
    sinkhorn = sinkhorn_divergence(a, b)
    reached = "" if sinkhorn.converged else "; not converged"
    return [
        Score(
            "sliced Wasserstein",
            sliced.value,
            sliced.standard_error,
            "lower",
            f"p = {sliced.p:g}, {sliced.projections} directions, {len(pair[0]):,} and {len(pair[1]):,} samples",
        ),
        Score(
            "Sinkhorn divergence",
            sinkhorn.value,
            None,
            "lower",
            f"squared distance, ε = {sinkhorn.regularisation:.3g}, {len(a):,} and {len(b):,} samples{reached}",
        ),
    ]


def _sharpness(reference: Summary, samples: Summary) -> list[Score]:
    if reference.sharpness is None or samples.sharpness is None or min(reference.sharpness.n, samples.sharpness.n) < 2:
        return []
    own, known = samples.sharpness.score(), reference.sharpness.score()
    words = f"reference {known.mean:.4g} ± {known.standard_error:.2g}, σ = {own.sigma:g} pixel, {own.n:,} images"
    return [Score("sharpness", own.mean, own.standard_error, "as the reference", words, {"reference": known.to_dict()})]


def _classes(reference: Summary, samples: Summary) -> list[Score]:
    predicted = samples.predictions
    if predicted is None or predicted.n < 2:
        return []
    inception = predicted.inception_score()
    words = f"{inception.splits} splits, {predicted.n:,} samples; ±: standard deviation over splits"
    found = [Score("Inception score", inception.mean, inception.standard_deviation, "higher", words)]
    known = reference.label_distribution()
    if known is not None and len(known[0]) <= len(predicted.label_distribution()):
        share = _added(known[0], np.zeros(len(predicted.label_distribution())))
        words = f"label distribution of the reference from {known[1]}, {predicted.n:,} samples"
        found.append(Score("MODE score", predicted.mode_score(share), None, "higher", words))
        reached = predicted.classes_reached()
        words = "classes that some sample is most likely of"
        found.append(Score("classes reached", float(reached), None, "higher", words))
    return found


def _memorised(found: Memorisation) -> list[Score]:
    share = found.quantiles[0]
    words = f"share of samples as near to the reference as the nearest {share:.0%} of held-out samples"
    error = found.shares_standard_errors[0]
    return [
        Score("memorised", found.shares[0], error, f"about {share:.0%}", words, found.to_dict()),
        Score("data-copying z", found.z, 1.0, "about 0; below: copies", "Mann-Whitney, against held-out samples"),
    ]


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two vectors, the shorter one filled up with zeros."""
    n = max(len(a), len(b))
    return np.pad(a, (0, n - len(a))) + np.pad(b, (0, n - len(b)))


def parse_scores(text: str) -> tuple[str, ...]:
    """`all`, `none`, or names with commas between.

    Raises:
        UserError: an unknown name.
    """
    if text in ("all", "none"):
        return SCORES if text == "all" else ()
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    return ScoreSettings(names).names

