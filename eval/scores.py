"""The scores beside NDB and JS: what one pass has to gather for them, and the table that comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from data.errors import UserError
from eval.canvas import is_image
from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import Memorisation, manifold_scores
from eval.metrics.moments import MAX_FEATURES, Moments, frechet_distance, frechet_standard_error
from eval.metrics.predictions import LEAST_IN_SPLIT, Predictions
from eval.metrics.sharpness import Sharpness
from eval.metrics.transport import sinkhorn_divergence, sliced_wasserstein
from eval.observed import MAX_CLASSES, PIXELS, Observed, Sketch

SCORES = ("fid", "kid", "manifold", "transport", "sharpness", "classes", "memorisation")
_PAIRWISE = ("kid", "manifold", "transport")
_LEAST_PAIRED = 10
# Between entropic transport plans every iteration costs n^2.
_SINKHORN_SAMPLES = 2000
# Of the mean squared distance within the reference.
_SINKHORN_REGULARISATION = 0.05
_MOST_IN_A_SUBSET = 1000


@dataclass(frozen=True)
class ScoreSettings:
    """Which scores are taken, and from how many samples those that compare pairs.

    Where they were named one by one, `explicit`, one that cannot be taken is an error, and else a line that says so.
    """

    names: tuple[str, ...] = SCORES
    subsample: int = 5000
    seed: int = 0
    explicit: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = set(self.names) - set(SCORES)
        if unknown:
            raise UserError(f"unknown scores {', '.join(sorted(unknown))}: choose from {', '.join(SCORES)}")
        if self.subsample < _LEAST_PAIRED:
            raise UserError(f"{self.subsample} samples are too few for scores of pairs: take at least {_LEAST_PAIRED}")

    def like(self, reference: ScoreSettings) -> ScoreSettings:
        """The same scores from subsets as the reference's: scores by one reference then compare."""
        return replace(self, subsample=reference.subsample, seed=reference.seed)

    def facts(self) -> dict[str, Any]:
        """For protocols."""
        if not self.names:
            return {"scores": "none"}
        return {"scores": ", ".join(self.names), "pairs_subsample": self.subsample, "scores_seed": self.seed}


@dataclass(frozen=True)
class Score:
    """One score: its value, its standard error or spread where it has one, and how it was taken, in words.

    A value of None was not taken, for the `reason`. `itself` is what the reference scores against itself: two random
    parts of it, of the sizes that `itself_protocol` tells.
    """

    name: str
    value: float | None
    error: float | None = None
    better: str = ""
    protocol: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    itself: float | None = None
    itself_protocol: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "not taken"
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")

    @property
    def words(self) -> str:
        """How it was taken, or why it was not."""
        return f"not taken: {self.reason}" if self.value is None else self.protocol


class Summary:
    """What the scores need to know of a set: moments, a random subset, class predictions, labels, sharpness.

    Args:
        settings: which scores, and the size of the subset.
        n: of the whole set, where it is known.
        parts: subsets of that size; a reference keeps two, to be scored against itself.
    """

    def __init__(self, settings: ScoreSettings, n: int | None = None, parts: int = 1) -> None:
        self.settings, self.n, self.parts = settings, n, parts
        wanted = set(settings.names)
        # FID needs the subset for its standard error.
        paired = wanted & {"fid", *_PAIRWISE}
        self.sketch = Sketch(parts * settings.subsample, n, settings.seed) if paired else None
        self.sharpness = Sharpness() if "sharpness" in wanted else None
        self.moments: Moments | None = None
        self.predictions: Predictions | None = None
        self.labels = np.zeros(0, np.int64)
        self.unlabelled = 0
        self._itself: dict[tuple[str, int], dict[str, Score]] = {}

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
                if seen.of_labels:
                    self._count(np.full(len(seen.x), -1) if seen.labels is None else seen.labels)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _count(self, labels: np.ndarray) -> None:
        if labels.max() >= MAX_CLASSES:
            raise UserError(f"label {labels.max()}: classes are numbered from 0, below {MAX_CLASSES:,}")
        self.unlabelled += int(np.count_nonzero(labels < 0))
        self.labels = _added(self.labels, np.bincount(labels[labels >= 0]))

    def merge(self, other: Self) -> None:
        for name in ("sketch", "sharpness", "moments", "predictions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                setattr(self, name, copy.deepcopy(theirs))
            elif theirs is not None:
                mine.merge(theirs)
        self.labels, self.unlabelled = _added(self.labels, other.labels), self.unlabelled + other.unlabelled

    def arrays(self) -> dict[str, np.ndarray]:
        """Its whole state, to be stored."""
        found = {"labels": self.labels, "unlabelled": np.array(self.unlabelled)}
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
        found.labels, found.unlabelled = arrays["labels"], int(arrays["unlabelled"])
        return found

    def identity(self) -> str:
        """What else it depends on."""
        return f"summary of {self.parts} {self.settings} {self.n}"

    def restored(self, arrays: Mapping[str, np.ndarray], number: int) -> Summary:
        """Of that state, of the partition that is number `number` now."""
        found = Summary.from_arrays(self.settings, arrays)
        if found.sketch is not None:
            found.sketch = found.sketch.restored(found.sketch.arrays(), number)
        return found

    def label_distribution(self) -> tuple[np.ndarray, str]:
        """p*(y) and where it comes from: labels, where they are the classifier's classes, else its predictions.

        Raises:
            ValueError: neither is there, labels are missing in part, a class is absent, or labels are no classes.
        """
        if self.predictions is None:
            raise ValueError("the reference was fitted without this classifier: fit it again with --classifier")
        predicted, n = self.predictions.label_distribution(), int(self.labels.sum())
        if not n:
            return predicted, "the classifier's predictions"
        if self.unlabelled:
            raise ValueError(f"{self.unlabelled:,} of {n + self.unlabelled:,} reference samples have no label")
        if len(self.labels) > len(predicted):
            raise ValueError(f"labels reach {len(self.labels) - 1}, the classifier knows {len(predicted)} classes")
        counts = _added(self.labels, np.zeros(len(predicted), np.int64))
        if not counts.all():
            raise ValueError(f"{np.count_nonzero(counts == 0)} of {len(counts)} classes are absent from the reference")
        return counts / n, "labels"

    def paired(self) -> np.ndarray:
        """Features `[m, d]` of the subset that scores of pairs take.

        Raises:
            ValueError: none was kept.
        """
        if self.sketch is None:
            raise ValueError("no samples were kept for it")
        return self.sketch.least(self.settings.subsample)[0]

    def itself(self, name: str, n_samples: int) -> dict[str, Score]:
        """What one random part of a reference scores against another, by the scores' names; found once for a size.

        Parts are as large as `n_samples` and the subset of the reference, where its samples are enough for both.
        """
        if self.sketch is None:
            return {}
        features = self.sketch.features()
        size = min(n_samples, self.settings.subsample, len(features) // 2)
        if size < _LEAST_PAIRED:
            return {}
        if (name, size) not in self._itself:
            order = np.random.default_rng([self.settings.seed, 1]).permutation(len(features))
            own, rest = np.sort(order[:size]), np.sort(order[size : size + self.settings.subsample])
            found = _PAIRS[name](features[rest], features[own], self.settings.seed, _scale_of(self.paired()))
            sizes = (_sizes(score.name, len(rest), len(own)) for score in found)
            self._itself[name, size] = {each.name: replace(each, protocol=words) for each, words in zip(found, sizes)}
        return self._itself[name, size]


_PARTS: dict[str, Any] = {"sketch": Sketch, "sharpness": Sharpness, "moments": Moments, "predictions": Predictions}


def scores_of(
    reference: Summary, samples: Summary, memorised: Memorisation | str | None = None, space: str = PIXELS
) -> list[Score]:
    """Every score that is wanted of the samples; what cannot be taken says why.

    Args:
        reference, samples: what a pass over each has gathered.
        memorised: the search for copies, or why there is none.
        space: name of the features.

    Raises:
        UserError: a score that was named explicitly cannot be taken.
    """
    settings, found = samples.settings, []
    for name in (name for name in SCORES if name in settings.names):
        scores = _taken(name, reference, samples, memorised, space)
        if settings.explicit and not any(score.value is not None for score in scores):
            raise UserError(f"{name}: {scores[0].reason}")
        found += scores
    return found


def _taken(
    name: str, reference: Summary, samples: Summary, memorised: Memorisation | str | None, space: str
) -> list[Score]:
    """The scores of one name; the reason for each of them where they cannot be taken."""
    try:
        if name in _PAIRWISE:
            return _paired(name, reference, samples)
        if name == "fid":
            return [_frechet(reference, samples, space)]
        if name == "sharpness":
            return [_sharpness(reference, samples)]
        if name == "classes":
            return _classes(reference, samples)
        return _memorised(memorised)
    except ValueError as error:
        called = (_frechet_name(space),) if name == "fid" else _CALLED[name]
        return [Score(each, None, reason=str(error)) for each in called]


def _frechet_name(space: str) -> str:
    return "FID" if space.startswith("inception:") else f"Fréchet distance ({space})"


def _fitted(part: Any, name: str, reference: Summary) -> None:
    if part is None and name not in reference.settings.names:
        raise ValueError(f"the reference was fitted without it: fit it again with {name} among --scores")


def _frechet(reference: Summary, samples: Summary, space: str) -> Score:
    a, b = reference.moments, samples.moments
    _fitted(a, "fid", reference)
    if a is None or b is None:
        raise ValueError(f"a covariance takes up to {MAX_FEATURES} features: take --features of fewer")
    error = None
    if reference.sketch is not None and samples.sketch is not None:
        error = frechet_standard_error(a, b, reference.sketch.features(), samples.sketch.features())
    words = f"{a.n:,} and {b.n:,} samples, {len(a.mean)} features; finite samples raise it"
    return Score(_frechet_name(space), frechet_distance(a, b), error, "lower", words)


def _paired(name: str, reference: Summary, samples: Summary) -> list[Score]:
    _fitted(reference.sketch, name, reference)
    a, b = reference.paired(), samples.paired()
    if min(len(a), len(b)) < _LEAST_PAIRED:
        raise ValueError(f"at least {_LEAST_PAIRED} samples of each are needed, got {len(a)} and {len(b)}")
    itself = reference.itself(name, len(b))
    found = _PAIRS[name](a, b, samples.settings.seed, _scale_of(a))
    return [
        replace(score, itself=own.value, itself_protocol=own.protocol) if (own := itself.get(score.name)) else score
        for score in found
    ]


def _sizes(name: str, n_reference: int, n_samples: int) -> str:
    most = _SINKHORN_SAMPLES if name == "Sinkhorn divergence" else n_reference + n_samples
    return f"{min(n_reference, most):,} and {min(n_samples, most):,} samples"


def _scale_of(features: np.ndarray) -> float:
    """The mean squared distance between two samples."""
    return 2 * float(features.var(axis=0, dtype=np.float64).sum())


def _kernel(a: np.ndarray, b: np.ndarray, seed: int, scale: float) -> list[Score]:
    # At most half of the samples: subsets that are all of them would have no spread.
    size = min(_MOST_IN_A_SUBSET, len(a) // 2, len(b) // 2)
    subsets = 100 if size == _MOST_IN_A_SUBSET else 20
    found = kernel_distance(a, b, subsets=subsets, subset_size=size, seed=seed)
    words = f"unbiased, {found.subsets} subsets of {found.subset_size}; ±: standard deviation over subsets"
    return [Score("KID", found.mean, found.standard_deviation, "lower", words)]


def _manifold(a: np.ndarray, b: np.ndarray, seed: int, scale: float) -> list[Score]:
    found = manifold_scores(a, b)
    sizes = f"{found.n_reference:,} and {found.n_samples:,} samples"
    neighbours = {"precision": found.neighbours, "recall": found.neighbours}
    return [
        Score(
            name,
            getattr(found, name),
            getattr(found, f"{name}_standard_error"),
            "higher",
            f"{sizes}, {neighbours.get(name, found.density_neighbours)} neighbours",
        )
        for name in _CALLED["manifold"]
    ]


def _transport(a: np.ndarray, b: np.ndarray, seed: int, scale: float) -> list[Score]:
    sliced = sliced_wasserstein(a, b, seed=seed)
    words = f"p = {sliced.p:g}, {sliced.projections} directions, {len(a):,} and {len(b):,} samples"
    found = [Score("sliced Wasserstein", sliced.value, sliced.standard_error, "lower", words)]
    if scale <= 0:
        return [*found, Score("Sinkhorn divergence", None, reason="all reference samples are the same: ε would be 0")]
    few, own = (x[np.linspace(0, len(x) - 1, min(len(x), _SINKHORN_SAMPLES)).astype(int)] for x in (a, b))
    sinkhorn = sinkhorn_divergence(few, own, epsilon=_SINKHORN_REGULARISATION * scale)
    words = (
        f"squared distance, ε = {sinkhorn.regularisation:.3g} ({_SINKHORN_REGULARISATION:g} of the mean within the "
        f"reference), {len(few):,} and {len(own):,} samples; finite samples raise it"
        f"{'' if sinkhorn.converged else '; not converged'}"
    )
    return [*found, Score("Sinkhorn divergence", sinkhorn.value, None, "lower", words)]


_PAIRS: Mapping[str, Callable[[np.ndarray, np.ndarray, int, float], list[Score]]] = {
    "kid": _kernel, "manifold": _manifold, "transport": _transport
}  # fmt: skip
_CALLED = {
    "kid": ("KID",),
    "manifold": ("precision", "recall", "density", "coverage"),
    "transport": ("sliced Wasserstein", "Sinkhorn divergence"),
    "sharpness": ("sharpness",),
    "classes": ("Inception score", "MODE score", "classes reached"),
    "memorisation": ("memorised", "data-copying z"),
}


def _sharpness(reference: Summary, samples: Summary) -> Score:
    _fitted(reference.sharpness, "sharpness", reference)
    if reference.sharpness is None or samples.sharpness is None or not samples.sharpness.n:
        raise ValueError("the samples are no images")
    if min(reference.sharpness.n, samples.sharpness.n) < 2:
        raise ValueError("at least 2 images are needed")
    own, known = samples.sharpness.score(), reference.sharpness.score()
    words = f"reference {known.mean:.4g} ± {known.standard_error:.2g}, σ = {own.sigma:g} pixel, {own.n:,} images"
    return Score("sharpness", own.mean, own.standard_error, "as the reference", words, {"reference": known.to_dict()})


def _classes(reference: Summary, samples: Summary) -> list[Score]:
    predicted = samples.predictions
    if predicted is None:
        raise ValueError("no class probabilities: name a --classifier")
    inception = predicted.inception_score()
    error = inception.standard_deviation if inception.splits > 1 else None
    splits = f"{inception.splits} splits of {LEAST_IN_SPLIT} samples or more; ±: over splits"
    words = f"{predicted.n:,} samples, {'no splits' if error is None else splits}"
    found = [Score("Inception score", inception.mean, error, "higher", words)]
    try:
        share, source = reference.label_distribution()
        words = f"label distribution of the reference from {source}, {predicted.n:,} samples"
        found.append(Score("MODE score", predicted.mode_score(share), None, "higher", words))
    except ValueError as error_of_mode:
        found.append(Score("MODE score", None, reason=str(error_of_mode)))
    words = f"of {len(predicted.predicted)}: classes that some sample is most likely of"
    return [*found, Score("classes reached", float(predicted.classes_reached()), None, "higher", words)]


def _memorised(found: Memorisation | str | None) -> list[Score]:
    if not isinstance(found, Memorisation):
        raise ValueError(found or "no held-out data: name it by --held-out")
    share = found.quantiles[0]
    words = f"share of samples as near to the reference as the nearest {share:.0%} of held-out samples"
    error = found.shares_standard_errors[0]
    memorised = Score("memorised", found.shares[0], error, f"about {share:.0%}", words, found.to_dict())
    words = (
        "Mann-Whitney statistic of the distances to the reference, in standard deviations: below -2 the samples lie "
        "nearer to it than held-out samples do, as copies would; above 2 farther, as samples of another distribution do"
    )
    return [
        memorised,
        Score("data-copying z", found.z, 1.0, "about 0; below: copies", words),
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
