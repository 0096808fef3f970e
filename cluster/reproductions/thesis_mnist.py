"""MNIST of W. Gong, Wasserstein Generative Adversarial Network, MPhil thesis, Cambridge 2017, Tables 5.3 and 5.4."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cluster.reproductions.digits import CLASSIFIER, Drawing
from cluster.reproductions.study import Column, Member, Outcomes, Reproduction, Trained
from data import storage
from data.partitions import PackPartitions
from data.stream import read_blocks
from eval.bins import BinSettings
from eval.comparison import judge_set
from eval.density_figures import training_curves
from eval.drawn import DrawnPartitions
from eval.evaluate import Rule
from eval.figures import sample_grid
from eval.likelihood import summarise
from eval.measure import View, local_pass
from eval.reference import REFERENCE, Reference, fit_reference
from eval.report import ReportFigure
from eval.scores import ScoreSettings
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:
    from data.manifest import Manifest

_DRAWS, _SHOWN, _BATCH = 10_000, 64, 500
_SCORES = ScoreSettings(("classes", "sharpness"))


_SHORT = ("training.steps=1500", "model.pretrain_steps=600")


class ThesisMNIST(Reproduction):
    """Likelihood, coverage and sharpness of flows, their mixtures and MFA on dequantised digits."""

    name: ClassVar[str] = "thesis-mnist"
    summary: ClassVar[str] = "flows, mixtures of flows, GAN+ML and MFA on MNIST (Gong 2017, Tables 5.3 and 5.4)"
    source: ClassVar[str] = "W. Gong, MPhil thesis, Cambridge 2017, Tables 5.3 and 5.4, Figures 5.12 to 5.14"
    prerequisites: ClassVar[tuple[Member, ...]] = (CLASSIFIER,)
    members: ClassVar[tuple[Member, ...]] = (
        # Lengths of at most some 20 minutes of one core in float32; the recipes' own are longer.
        Member("single flow, ML", "mnist-flow", ("training.steps=4000",), printed={"log_likelihood": "1910.31"}),
        Member("single flow, GAN+ML", "mnist-flowgan", _SHORT, printed={"log_likelihood": "1650.53"}),
        Member("MixFlow, ML", "mnist-mixflow", ("training.steps=8000",), printed={"log_likelihood": "2984.03"}),
        Member("MixFlow, GAN+ML", "mnist-mixflow-gan", printed={"log_likelihood": "2728.74"}),
        Member("Real NVP, convolutions, ML", "mnist-realnvp", ("training.steps=800",)),
        Member("MFA, diagonal noise", "mnist", ("hierarchy=null", "model.n_components=100")),
        Member("single flow, GAN", "mnist-flowgan", (*_SHORT, "model.adversarial.likelihood_weight=0")),
        Member("DCGAN", "mnist-gan", ("training.optimiser.average=0",)),
        Member("WGAN-GP", "mnist-wgan-gp", ("training.steps=3000",)),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("log_likelihood", "test log-likelihood (nats)", 1),
        Column("bits", "bits/dim", 3),
        Column("train_log_likelihood", "training log-likelihood", 1),
        Column("ndb", "NDB of 100", 0),
        Column("js", "JS", 4),
        Column("mode_score", "MODE score", 2),
        Column("sharpness", "sharpness", 3),
        Column("components", "components in use", 0),
    )
    note: ClassVar[str] = (
        "Pixels dequantised to [0, 1), x = (v + u) / 256; log-likelihoods in nats per image on all 10,000 test images. "
        "NDB by p < 0.05 over 100 K-means bins of the training images; 10,000 samples of each model. MODE score by "
        "this project's classifier of digits. Printed log-likelihoods may not be of dequantised pixels."
    )
    seeds: ClassVar[int] = 1
    curve: ClassVar[str] = "log_likelihood"
    measures_start: ClassVar[bool] = False

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:
        place = storage.join(out, "reference")
        if storage.exists(storage.join(place, REFERENCE)):
            return
        notice("fitting 100 bins to the training images")
        train = PackPartitions(next(iter(packs.values())), TRAIN_SPLIT)
        view = _view(out)
        reference = fit_reference(
            *(train, local_pass(train, view), [BinSettings(n_bins=100, max_samples=20_000)], _SCORES), space=view.space
        )
        reference.save(place)

    def measure(self, trained: Trained) -> dict[str, float]:
        model, manifest = trained.model, trained.manifest
        levels = manifest.levels if trained.recipe.training.dequantises(manifest.levels) else None
        found: dict[str, float] = {}
        if hasattr(model, "log_prob"):
            dimensions = math.prod(manifest.shape) if levels else None
            test = summarise(_log_probs(model, manifest, TEST_SPLIT), n_dimensions=dimensions, levels=levels or 256)
            train = _log_probs(model, manifest, TRAIN_SPLIT, _DRAWS)
            found = {
                "log_likelihood": test.mean,
                "log_likelihood_se": test.standard_error,
                "bits": float(test.bits_per_dimension or math.nan),
                "train_log_likelihood": float(train.mean()),
            }
        samples = DrawnPartitions(
            *(partial(Drawing, model), _DRAWS, trained.seed),
            name="samples",
            identity="model",
            shape=tuple(manifest.shape),
            levels=levels,
        )
        reference = Reference.load(storage.join(trained.out, "reference"))
        over = local_pass(samples, _view(trained.out))
        row = judge_set(samples, over, reference, name="samples", rule=Rule(), scores=_SCORES)
        scores = {score.name.lower().partition(" (")[0]: score.value for score in row.scores}
        found |= {"ndb": float(row.evaluation.result.ndb), "js": float(row.evaluation.result.js)}
        for key, name in (("mode_score", "mode score"), ("sharpness", "sharpness")):
            value = scores.get(name)
            if value is not None:
                found[key] = float(value)
        if hasattr(model, "mixing_coefficients"):
            mixing = model.mixing_coefficients
            found["components"] = float((mixing >= 0.1 / len(mixing)).sum())
        return found

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        x = trained.model.sample(_SHOWN, torch.Generator().manual_seed(trained.seed)).numpy()
        return {"x": x.reshape(_SHOWN, *trained.manifest.shape)}

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        shown = [
            ReportFigure(label, sample_grid(found[0].drawn["x"], 4, 16), "The first 64 samples.", f"Samples of {label}")
            for label, found in outcomes.items()
            if found
        ]
        curves = {
            label: (found[0].steps, -np.array([one.curve for one in found]))
            for label, found in outcomes.items()
            if found and len(found[0].curve) > 1
        }
        if curves:
            picture = training_curves(curves, label="negative log-likelihood (nats per image)")
            shown.append(ReportFigure("Training curves", picture, "On the training batches.", "Loss over steps"))
        return shown


def _view(out: str) -> View:
    """Pixels for the bins; the classifier's predictions beside them."""
    from cluster.extractors import open_extractor
    from cluster.reproduce import member_folder

    return View(None, open_extractor(f"classifier:{member_folder(out, CLASSIFIER.label, 0)}"))


@torch.no_grad()
def _log_probs(model: Any, manifest: Manifest, split: str, most: int | None = None) -> np.ndarray:
    """log p(x) in nats of a split's dequantised images (the first `most`), [n] float64."""
    found, done = [], 0
    for block in read_blocks(manifest, split, dequantise_seed=0):
        for x in torch.from_numpy(np.ascontiguousarray(block["x"])).flatten(1).split(_BATCH):
            found.append(model.log_prob(x).double().numpy())
        done += len(block["x"])
        if most is not None and done >= most:
            break
    return np.concatenate(found)[:most]
