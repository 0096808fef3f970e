"""What studies of MNIST share: a classifier that tells digits, bins of the training images, and samples judged by both.

Of samples of a model: NDB and JS by the bins in pixels, and by the classifier the Inception score, the MODE score, the
Fréchet distance of its features to the test images', and how many samples show each digit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.reproductions.study import Member, Outcomes, Trained, courses
from data import storage
from data.manifest import load_manifest
from data.partitions import PackPartitions
from data.stream import read_blocks, read_labels
from eval.bins import BinSettings
from eval.comparison import judge_set
from eval.density_figures import training_curves
from eval.drawn import DrawnPartitions
from eval.evaluate import Rule
from eval.measure import View, local_pass
from eval.metrics.moments import Moments, frechet_distance
from eval.metrics.predictions import Predictions
from eval.reference import REFERENCE, Reference, fit_reference
from eval.report import ReportFigure
from eval.scores import ScoreSettings
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:
    from data.manifest import Manifest

CLASSIFIER = Member("classifier", "mnist-classifier")
N_CLASSES, DRAWS = 10, 10_000
_BATCH = 500


class Drawing:
    """A model in memory, as `DrawnPartitions` asks it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def sample(self, n: int, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(self.model.sample(n, generator).numpy())


def open_digit_classifier(out: str) -> Any:
    """The study's classifier, a `cluster.models.LocalClassifier`."""
    from cluster.models import open_classifier
    from cluster.reproduce import member_folder

    return open_classifier(member_folder(out, CLASSIFIER.label, 0))


def prepare_bins(out: str, packs: Mapping[str, Manifest], n_bins: int) -> None:
    """Fits bins to the training images of the first member's pack, once."""
    place = storage.join(out, "bins")
    if storage.exists(storage.join(place, REFERENCE)):
        return
    train = PackPartitions(next(iter(packs.values())), TRAIN_SPLIT)
    settings = [BinSettings(n_bins=n_bins, max_samples=20_000)]
    fit_reference(train, local_pass(train), settings, ScoreSettings(()), space=View().space).save(place)


def judge_samples(trained: Trained, draws: int = DRAWS) -> dict[str, float]:
    """All scores of the model's samples (see above); `digit_0` to `digit_9` are shares of them."""
    shape = tuple(trained.manifest.shape)
    opened = functools.partial(Drawing, trained.model)
    levels = trained.manifest.levels if trained.recipe.training.dequantises(trained.manifest.levels) else None
    samples = DrawnPartitions(opened, draws, trained.seed, name="samples", identity="model", shape=shape, levels=levels)
    reference = Reference.load(storage.join(trained.out, "bins"))
    row = judge_set(samples, local_pass(samples), reference, name="samples", rule=Rule(), scores=ScoreSettings(()))
    result = row.evaluation.result
    seen, distance = _seen(trained, draws)
    due = np.bincount(read_labels(trained.manifest, TRAIN_SPLIT), minlength=N_CLASSES)
    return {
        "ndb": float(result.ndb),
        "js": float(result.js),
        "inception_score": seen.inception_score().mean,
        "mode_score": seen.mode_score(due),
        "frechet": distance,
        "missing_digits": float(missing_digits(seen.predicted, due)),
        **{f"digit_{digit}": count / draws for digit, count in enumerate(seen.predicted.tolist())},
    }


def follow_samples(trained: Trained, draws: int = 2000) -> dict[str, float]:
    """What of `judge_samples` is followed over a training, of fewer samples: with these the distance is larger."""
    seen, distance = _seen(trained, draws)
    return {"inception_score": seen.inception_score().mean, "frechet": distance}


def quality_figures(outcomes: Outcomes) -> list[ReportFigure]:
    """The courses of what `follow_samples` gave."""
    shown = []
    for key, what in (("frechet", "Fréchet distance"), ("inception_score", "Inception score")):
        curves = courses(outcomes, key)
        if curves:
            picture = training_curves(curves, label=what, logarithmic=key == "frechet")
            caption = "Of 2,000 samples at each checkpoint; mean over the seeds, ± one standard deviation."
            shown.append(ReportFigure(f"{what} over training", picture, caption, f"{what} over steps"))
    return shown


def missing_digits(counts: np.ndarray, due: np.ndarray, share: float = 0.2) -> int:
    """Digits of which there are fewer than `share` of their due: of counts and of the data's, both [10]."""
    return int(np.count_nonzero(counts / counts.sum() < share * due / due.sum()))


def predicted_digits(classifier: Any, x: np.ndarray) -> np.ndarray:
    """The likeliest digit of each image, [n]."""
    return np.asarray(classifier.probabilities(x).argmax(1))


def images_of(manifest: Manifest, split: str) -> Iterator[np.ndarray]:
    """A split's images in [0, 1], [n, *shape] by blocks."""
    for block in read_blocks(manifest, split):
        yield np.ascontiguousarray(block["x"], np.float32)


@torch.no_grad()
def responsible(model: Any, manifest: Manifest, split: str = TEST_SPLIT) -> tuple[np.ndarray, np.ndarray]:
    """The most responsible component of each image of a split, and its label, both [n]."""
    found = [
        model.responsibilities(part).argmax(1)
        for images in images_of(manifest, split)
        for part in torch.from_numpy(images).flatten(1).split(_BATCH)
    ]
    return torch.cat(found).numpy(), np.asarray(read_labels(manifest, split))


def _seen(trained: Trained, draws: int) -> tuple[Predictions, float]:
    """What the classifier sees in samples, and the Fréchet distance of its features to the test images'."""
    classifier = open_digit_classifier(trained.out)
    x = Drawing(trained.model).sample(draws, trained.seed).reshape(draws, *trained.manifest.shape)
    predictions, moments = Predictions(N_CLASSES), Moments(classifier.model.n_hidden)
    predictions.update(classifier.probabilities(x), np.arange(len(x)))
    moments.update(classifier.features(x))
    return predictions, frechet_distance(moments, _test_moments(trained.out, trained.manifest.base))


@functools.lru_cache(maxsize=2)
def _test_moments(out: str, shards: str) -> Moments:
    classifier = open_digit_classifier(out)
    moments = Moments(classifier.model.n_hidden)
    for images in images_of(load_manifest(shards), TEST_SPLIT):
        moments.update(classifier.features(images))
    return moments
