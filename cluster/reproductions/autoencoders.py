"""Autoencoders of S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018, and their relatives, on MNIST."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cluster import codes
from cluster.reproductions import digits
from cluster.reproductions.study import Column, Member, Outcomes, Reproduction, Trained, courses
from eval import code_figures, density_figures
from eval.codes import plane_grid, prior_distance
from eval.figures import sample_grid
from eval.metrics.sharpness import Sharpness
from eval.report import ReportFigure
from trainer.checkpoint import save_model

if TYPE_CHECKING:
    from cluster.models import LocalAutoencoder
    from data.manifest import Manifest

_SHOWN, _SIDE, _COURSE_PAIRS = 64, 25, 1  # the floor is measured once, at the end
# All decode 200 images in a step; SWAE's batch holds more for its distance of codes alone.
_SWAE = ("training.steps=240", "training.checkpoint_every=60")
_OTHERS = (*_SWAE, "training.batch_size=200")
_FEATURES = "model.reconstruction.features"


class SWAEMNIST(Reproduction):
    """How near codes come to each prior, and what autoencoders make of draws of it."""

    name: ClassVar[str] = "swae-mnist"
    summary: ClassVar[str] = "SWAE with four priors, VAE, WAE-MMD, WAE-GAN and VAE-DFC on MNIST (Kolouri et al. 2018)"
    source: ClassVar[str] = "S. Kolouri et al., Sliced-Wasserstein Autoencoder, 2018, section 5.1"
    prerequisites: ClassVar[tuple[Member, ...]] = (digits.CLASSIFIER,)
    members: ClassVar[tuple[Member, ...]] = (
        *(
            Member(f"SWAE, {prior}", "mnist-swae-long", (*_SWAE, f"model.prior={prior}"))
            for prior in ("ring", "disc", "square", "bowl")
        ),
        Member("VAE", "mnist-vae", _OTHERS),
        Member("WAE-MMD", "mnist-wae-mmd", _OTHERS),
        Member("WAE-GAN", "mnist-wae-gan", _OTHERS),
        Member(
            "VAE-DFC",
            "mnist-vae-dfc",
            (*_OTHERS, f"{_FEATURES}.model={{out}}/classifier/seed-0", f"{_FEATURES}.sha256={{sha256 classifier}}"),
        ),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("prior_distance_ratio", "codes to prior / floor", 2, largest=True),
        Column("reconstruction_mse", "reconstruction (mean square)", 4),
        Column("ndb", "NDB of 100", 0),
        Column("js", "JS", 4),
        Column("frechet", "Fréchet distance", 2),
        Column("mode_score", "MODE score", 2),
        Column("sharpness", "sharpness", 3),
        Column("missing_digits", "missing digits", 0),
    )
    note: ClassVar[str] = (
        "Codes to prior: squared sliced Wasserstein distance of the 10,000 test codes to as many draws of the prior "
        "(500 directions, mean of 5 draws), over the mean of 30 pairs of draws of the prior. Reconstruction: per pixel "
        "in [0, 1], of test images. The others are of 10,000 decoded draws of the prior: NDB by p < 0.05 over 100 "
        "K-means bins of the training images; Fréchet distance (to the test images) and MODE score by this project's "
        "classifier of digits; sharpness is the mean log share of the high frequencies."
    )
    seeds: ClassVar[int] = 1
    measures_start: ClassVar[bool] = False

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:
        notice("fitting 100 bins to the training images")
        digits.prepare_bins(out, packs, 100)

    def follow(self, trained: Trained) -> dict[str, float]:
        with _opened(trained) as model:
            distance = prior_distance(_encoded(trained, model)[0], model.prior_sample, pairs=_COURSE_PAIRS)
        return {"prior_distance": distance.squared}

    def measure(self, trained: Trained) -> dict[str, float]:
        with _opened(trained) as model:
            found = codes.measure(model, codes.held_out(trained.manifest)).metrics
            drawn = Sharpness()
            drawn.update(model.sample(digits.DRAWS, trained.seed))
        return {**found, "sharpness": drawn.score().mean, **digits.judge_samples(trained)}

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        with _opened(trained) as model:
            encoded, labels = _encoded(trained, model)
            prior = model.prior_sample(len(encoded), 0)
            found = {"x": model.sample(_SHOWN, trained.seed), "codes": encoded, "labels": labels, "prior": prior}
            if prior.shape[1] == 2:
                grid = model.decode(plane_grid(prior, _SIDE))
                found["grid"] = grid.reshape(_SIDE, _SIDE, *grid.shape[1:])
        return found

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        shown = []
        floors = {label: found[0].metrics["prior_distance_floor"] for label, found in outcomes.items() if found}
        ratios = {
            label: (steps, values / floors[label])
            for label, (steps, values) in courses(outcomes, "prior_distance").items()
        }
        if ratios:
            picture = density_figures.training_curves(ratios, label="distance / floor", truth=1, logarithmic=True)
            caption = "Squared sliced Wasserstein distance of the test codes to the prior, over that of its own draws."
            shown.append(ReportFigure("Codes to prior over training", picture, caption, "Distance ratio over steps"))
        for label, each in outcomes.items():
            if not each:
                continue
            drawn = each[0].drawn
            scatter = code_figures.code_scatter(drawn["codes"], drawn["labels"], drawn["prior"])
            caption = "Draws of the prior (left and grey), and codes of test images, coloured by their labels."
            shown.append(ReportFigure(f"{label}: codes", scatter, caption, f"Codes of {label}"))
            if "grid" in drawn:
                sheet = code_figures.image_sheet(drawn["grid"], f"{label}: a decoded grid of {_SIDE} x {_SIDE} codes")
                caption = "z₁ left to right, z₂ bottom to top."
                shown.append(ReportFigure(f"{label}: grid", sheet, caption, f"Decoded grid of {label}"))
            samples = sample_grid(drawn["x"], 4, _SHOWN // 4)
            caption = f"The first {_SHOWN} decoded draws of the prior."
            shown.append(ReportFigure(f"{label}: samples", samples, caption, f"Samples of {label}"))
        return shown


def _encoded(trained: Trained, model: LocalAutoencoder) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the test images, without noise, and their labels."""
    blocks = [
        (model.encode(block["x"].astype(np.float32)), block["label"]) for block in codes.held_out(trained.manifest)
    ]
    encoded, labels = (np.concatenate(part)[: codes.MOST] for part in zip(*blocks))
    return encoded, labels


@contextmanager
def _opened(trained: Trained) -> Iterator[LocalAutoencoder]:
    """The model as the commands open it."""
    from cluster.models import open_autoencoder

    model: Any = trained.model
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save_model(folder, model, trained.recipe.model.family, trained.manifest, dequantised=False)
        yield open_autoencoder(folder)
