"""Studies of W. Huang et al., GAN-based Gaussian Mixture Model Responsibility Learning, 2021, on MNIST."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cluster import gaussians
from cluster.reproductions import digits
from cluster.reproductions.study import Column, Member, Outcomes, Reproduction, Trained
from data import kmeans, storage
from data.stream import read_labels
from eval import density_figures
from eval.figures import sample_grid
from eval.metrics.clustering import agreement, contingency
from eval.report import ReportFigure
from trainer.models.latent_mixture import LatentMixture
from trainer.models.responsibility import ResponsibilityGAN
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:
    from data.manifest import Manifest

_PAPER = "W. Huang, R. Y. D. Xu, S. Jiang, X. Liang, I. Oppermann, GAN-based GMM Responsibility Learning, 2021"
_KMEANS, _KMEANS_SEEDS = "kmeans.json", 5
_OF_EACH = 200
# The imbalanced data: this digit whole, and so many images of the other nine together.
_WHOLE, _OTHERS = 0, 1000
_MNIST_TRAINING = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


class _OfDigits(Reproduction):
    """Samples judged by the classifier of digits and by bins."""

    source: ClassVar[str] = _PAPER
    prerequisites: ClassVar[tuple[Member, ...]] = (digits.CLASSIFIER,)
    seeds: ClassVar[int] = 3
    curve: ClassVar[str] = "discriminator_gaussians"

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:
        notice("fitting 100 bins to the training images")
        digits.prepare_bins(out, packs, 100)

    def measure(self, trained: Trained) -> dict[str, float]:
        return digits.judge_samples(trained)

    def follow(self, trained: Trained) -> dict[str, float]:
        return digits.follow_samples(trained)

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        x = trained.model.sample(100, torch.Generator().manual_seed(trained.seed)).numpy()
        return {"x": x.reshape(-1, *trained.manifest.shape)}

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        shown = digits.quality_figures(outcomes)
        for label, found in outcomes.items():
            if not found:
                continue
            of_all = dict(found[0].drawn)
            picture = sample_grid(of_all.pop("x"), 10, 10)
            shown.append(ReportFigure(f"{label}: samples", picture, "100 samples, first seed.", f"Samples of {label}"))
            for one in gaussians.pictures(of_all).values():
                title = f"{label}: {one.title[0].lower()}{one.title[1:]}"
                shown.append(ReportFigure(title, one.png, f"{one.caption} First seed.", title))
        return shown


class ResponsibilityMNIST(_OfDigits):
    """Clusters of C on the test images, and what each Gaussian draws."""

    name: ClassVar[str] = "responsibility-mnist"
    summary: ClassVar[str] = "clusters and samples of the responsibility GAN on MNIST, beside K-means and MFA"
    members: ClassVar[tuple[Member, ...]] = (
        Member("responsibility GAN", "mnist-responsibility"),
        Member("responsibility GAN, shared encoder", "mnist-responsibility", ("model.encoder.shared=true",)),
        Member(
            "responsibility GAN, C by invariance alone", "mnist-responsibility", ("model.classifier_consistency=0",)
        ),
        Member("responsibility GAN, to the letter", "mnist-responsibility-letter"),
        Member("DeLiGAN", "mnist-deligan"),
        Member("latent mixture", "mnist-latent-mixture"),
        Member("DCGAN", "mnist-gan"),
        Member("MFA, K=10", "mnist", ("hierarchy=null", "model.n_components=10")),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "clustering accuracy", 3),
        Column("information", "NMI", 3),
        Column("purity", "purity", 3),
        Column("used", "clusters in use", 1),
        Column("kmeans_accuracy", "K-means: accuracy", 3),
        Column("kmeans_information", "K-means: NMI", 3),
        Column("kmeans_purity", "K-means: purity", 3),
        Column("sample_purity", "purity of Gaussians' samples", 3),
        Column("least_sample_purity", "least of one Gaussian", 3),
        Column("drawn_digits", "digits that Gaussians draw", 1),
        Column("told", "samples that C gives to their Gaussian", 3),
        Column("frechet", "Fréchet distance", 2),
        Column("inception_score", "Inception score", 2),
        Column("ndb", "NDB of 100", 0),
    )
    note: ClassVar[str] = (
        "Clusters of all test images: accuracy by the best matching of clusters and digits (Hungarian), mutual "
        "information over the mean entropy, and purity; a cluster in use has a tenth of an equal share or more. "
        "K-means (K=10, pixels of 20,000 training images, three starts) is another fit for each seed. Purity of "
        "samples: 200 of each Gaussian, by this project's classifier of digits, whose features the Fréchet distance "
        "and whose predictions the Inception score are of (10,000 samples); digits that Gaussians draw: how many are "
        "the most frequent of one. NDB by p < 0.05 over 100 K-means bins. C of the first rows has also seen images "
        "turned, sheared and shifted, which K-means and MFA have not. Steps have 64 images; to the letter 24, with ten "
        "generated ones each. The responsibility GANs draw their Gaussians by the shares that C gave them, others "
        "all alike. Weights of the GANs' generators are running averages, but for the letter."
    )

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:
        super().prepare(out, packs, notice)
        place = storage.join(out, _KMEANS)
        if storage.exists(place):
            return
        notice("K-means")
        manifest = next(iter(packs.values()))
        train, test = (_flat(manifest, split) for split in (TRAIN_SPLIT, TEST_SPLIT))
        classes, found = read_labels(manifest, TEST_SPLIT), []
        for seed in range(_KMEANS_SEEDS):
            centres = kmeans.fit(train, digits.N_CLASSES, n_init=3, max_samples=20_000, seed=seed)
            clusters, _ = kmeans.assign(test, centres.centroids)
            found.append(_agreement(clusters, classes, digits.N_CLASSES))
        storage.write_text(place, json.dumps(found))

    def measure(self, trained: Trained) -> dict[str, float]:
        model, found = trained.model, super().measure(trained)
        if hasattr(model, "responsibilities"):
            clusters, classes = digits.responsible(model, trained.manifest)
            found |= _agreement(clusters, classes, model.n_components)
            known = json.loads(storage.read_bytes(storage.join(trained.out, _KMEANS)))
            of_kmeans = known[trained.seed % _KMEANS_SEEDS]
            found |= {f"kmeans_{key}": value for key, value in of_kmeans.items()}
        if isinstance(model, LatentMixture):
            classifier = digits.open_digit_classifier(trained.out)
            purities, told, most = [], [], set()
            for k in range(model.n_components):
                x = model.sample(_OF_EACH, torch.Generator().manual_seed(trained.seed), component=k)
                seen = digits.predicted_digits(classifier, x.numpy().reshape(-1, *trained.manifest.shape))
                purities.append(float(np.bincount(seen).max() / len(seen)))
                most.add(int(np.bincount(seen).argmax()))
                if isinstance(model, ResponsibilityGAN):
                    told.append(float((model.responsibilities(x).argmax(1) == k).float().mean()))
            found |= {"sample_purity": float(np.mean(purities)), "least_sample_purity": min(purities)}
            if told:
                found["told"] = float(np.mean(told))
            found["drawn_digits"] = float(len(most))
        return found

    @torch.no_grad()
    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        model, found = trained.model, super().draw(trained)
        if not isinstance(model, LatentMixture):
            return found
        return found | gaussians.drawn(model, tuple(trained.manifest.shape), trained.seed)

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        curves = {
            label: (found[0].steps, np.array([one.curve for one in found]))
            for label, found in outcomes.items()
            if found and len(found[0].curve) > 1
        }
        shown = super().figures(outcomes)
        if curves:
            picture = density_figures.training_curves(curves, label="Gaussians that C assigns the batch to")
            caption = "The exponential of the entropy of C's mean weights, which eq. 6 is weighted by."
            shown.append(ReportFigure("Gaussians in use", picture, caption, "Gaussians in use over steps"))
        return shown


def _ratios() -> str:
    share = _OTHERS / (sum(_MNIST_TRAINING) - _MNIST_TRAINING[_WHOLE])
    kept = {str(digit): round(share, 6) for digit in range(digits.N_CLASSES) if digit != _WHOLE}
    return f"data.options={json.dumps({'class_ratios': kept})}"


# A GAN as it was before R1 and averaged weights.
_BARE = ("model.adversarial.real_penalty=null", "training.optimiser.average=0")


class ResponsibilityImbalance(_OfDigits):
    """One digit whole, a thousand images of the others: which of them vanish."""

    name: ClassVar[str] = "responsibility-imbalance"
    summary: ClassVar[str] = f"digits that vanish where {_WHOLE} is whole and the others are {_OTHERS} images together"
    members: ClassVar[tuple[Member, ...]] = (
        Member("Gaussian (DCGAN)", "mnist-gan", (_ratios(),)),
        Member("Gaussian mixture, no C", "mnist-latent-mixture", (_ratios(),)),
        Member("DeLiGAN", "mnist-deligan", (_ratios(),)),
        Member("responsibility GAN", "mnist-responsibility", (_ratios(),)),
        Member("Gaussian (DCGAN), bare", "mnist-gan", (_ratios(), *_BARE)),
        Member("Gaussian mixture, no C, bare", "mnist-latent-mixture", (_ratios(), *_BARE)),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("missing_digits", "digits missing", 1),
        Column("ndb", "NDB of 100", 0),
        Column("js", "JS", 4),
        Column("mode_score", "MODE score", 2),
        *(Column(f"digit_{digit}", f"{digit}", 4) for digit in range(digits.N_CLASSES)),
    )
    note: ClassVar[str] = (
        "Bare: without R1 and averaged weights, which the others have. The responsibility GAN draws its Gaussians by "
        "the shares that C gave them, others all alike. Training images: all "
        f"{_MNIST_TRAINING[_WHOLE]:,} of digit {_WHOLE} and about {_OTHERS:,} of the other nine together, 1.6% of all "
        "for each. Shares of the digits among 10,000 samples, by this project's "
        "classifier, which learnt all of MNIST; a digit is missing below a fifth of its share in the training images. "
        "NDB by p < 0.05 over 100 K-means bins of the imbalanced training images."
    )

    def follow(self, trained: Trained) -> dict[str, float]:
        """Nothing: the distance that others follow is to the test images, where digits are balanced."""
        return {}


class ResponsibilityCompression(_OfDigits):
    """The score against the parameters: the paper says half of them give the same quality."""

    name: ClassVar[str] = "responsibility-compression"
    summary: ClassVar[str] = "scores against parameters, of the responsibility GAN and of DCGAN on MNIST"
    members: ClassVar[tuple[Member, ...]] = tuple(
        member
        for width in (4, 8, 16, 24)
        for member in (
            Member(f"DCGAN, width {width}", "mnist-gan", (f"model.width={width}",)),
            Member(f"responsibility GAN, width {width}", "mnist-responsibility", (f"model.width={width}",)),
        )
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("thousands", "thousand parameters that draw", 1),
        Column("frechet", "Fréchet distance", 2),
        Column("inception_score", "Inception score", 2),
        Column("mode_score", "MODE score", 2),
        Column("ndb", "NDB of 100", 0),
    )
    note: ClassVar[str] = (
        "Parameters of generator and prior, which is what draws; discriminators are of one size, and the "
        "responsibility GAN has a classifier beside. 10,000 samples; Fréchet distance of the features of "
        "this project's classifier of digits to those of the test images."
    )

    def measure(self, trained: Trained) -> dict[str, float]:
        parameters = float(_parameters(trained.model))
        return {**super().measure(trained), "parameters": parameters, "thousands": parameters / 1000}

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        points: dict[str, list[tuple[float, Sequence[float]]]] = {}
        for label, found in outcomes.items():
            if found:
                values = [one.metrics["frechet"] for one in found]
                points.setdefault(label.split(",")[0], []).append((found[0].metrics["parameters"], values))
        picture = density_figures.scores_by_size(points, label="Fréchet distance (lower is better)")
        caption = "Mean over the seeds, ± one standard deviation."
        title = "Fréchet distance by parameters"
        return [ReportFigure(title, picture, caption, title), *super().figures(outcomes)]


def _parameters(model: Any) -> int:
    """Those that a sample depends on."""
    parts = [model.generator, model.prior] if isinstance(model, LatentMixture) else [model]
    return sum(p.numel() for part in parts for p in part.parameters())


def _flat(manifest: Manifest, split: str) -> np.ndarray:
    return np.concatenate([x.reshape(len(x), -1) for x in digits.images_of(manifest, split)])


def _agreement(clusters: np.ndarray, classes: np.ndarray, n_clusters: int) -> dict[str, float]:
    found = agreement(contingency(clusters, classes, n_clusters, digits.N_CLASSES))
    used = float((found.sizes >= 0.1 * found.sizes.sum() / n_clusters).sum())
    scores = {"accuracy": found.accuracy, "information": found.information, "purity": found.purity}
    return {**scores, "used": used}
