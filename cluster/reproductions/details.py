"""MFA + pix2pix of E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018 (supplement §2.3), on MNIST."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cluster.reproductions import digits
from cluster.reproductions.study import Column, Member, Outcomes, Reproduction, Trained
from eval.metrics.sharpness import Sharpness
from eval.mixture_figures import rows_of_images
from eval.report import ReportFigure
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:
    from data.manifest import Manifest

_SHOWN = 12
_REACH = 2.0  # of the walk, in standard deviations of a factor


class Details(Reproduction):
    """Whether details make a mixture's samples as sharp as real images, and cost no coverage."""

    name: ClassVar[str] = "mfa-pix2pix"
    summary: ClassVar[str] = "details for a mixture's samples on MNIST: sharpness and coverage with and without"
    source: ClassVar[str] = "E. Richardson, Y. Weiss, On GANs and GMMs, NeurIPS 2018, supplement §2.3, Figures 17 to 19"
    prerequisites: ClassVar[tuple[Member, ...]] = (
        digits.CLASSIFIER,
        Member("mfa", "mnist", ("hierarchy=null", "model.n_components=100")),
    )
    members: ClassVar[tuple[Member, ...]] = (
        Member("MFA + pix2pix", "mfa-pix2pix-mnist", ("model.mixture={out}/mfa/seed-0/model",)),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("plain_sharpness", "sharpness: MFA", 3),
        Column("sharpness", "+ pix2pix", 3),
        Column("real_sharpness", "real images", 3),
        Column("gap_closed", "share of the gap closed", 3),
        Column("plain_ndb", "NDB of 100: MFA", 0),
        Column("ndb", "+ pix2pix", 0),
        Column("plain_frechet", "Fréchet distance: MFA", 2),
        Column("frechet", "+ pix2pix", 2),
    )
    note: ClassVar[str] = (
        "10,000 samples of one MFA (K=100) without its noise, μ + A z, and the same with details; sharpness is the "
        "mean log share of the high frequencies. NDB by p < 0.05 over 100 K-means bins of the training images; Fréchet "
        "distance of the features of this project's classifier of digits to those of the test images."
    )
    seeds: ClassVar[int] = 3
    curve: ClassVar[str] = "l1"

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:
        notice("fitting 100 bins to the training images")
        digits.prepare_bins(out, packs, 100)

    def measure(self, trained: Trained) -> dict[str, float]:
        model, shape = trained.model, tuple(trained.manifest.shape)
        found = digits.judge_samples(trained)
        plain = digits.judge_samples(replace(trained, model=_Plain(model)))
        found |= {f"plain_{key}": value for key, value in plain.items()}
        real = Sharpness()
        for images in digits.images_of(trained.manifest, TEST_SPLIT):
            real.update(images)
        found["real_sharpness"] = real.score().mean
        for key, draw in (("sharpness", model.sample), ("plain_sharpness", model.plain)):
            drawn = Sharpness()
            drawn.update(draw(digits.DRAWS, torch.Generator().manual_seed(trained.seed)).numpy().reshape(-1, *shape))
            found[key] = drawn.score().mean
        gap = found["real_sharpness"] - found["plain_sharpness"]
        found["gap_closed"] = 1 - abs(found["real_sharpness"] - found["sharpness"]) / abs(gap)
        return found

    @torch.no_grad()
    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        model, shape = trained.model, tuple(trained.manifest.shape)
        components, _ = digits.responsible(model, trained.manifest, TRAIN_SPLIT)
        k = int(np.bincount(components).argmax())
        chosen = torch.full((_SHOWN,), k)
        z = torch.randn(_SHOWN, model.mixture.n_factors, generator=torch.Generator().manual_seed(trained.seed))
        walk = torch.zeros(_SHOWN, model.mixture.n_factors)
        walk[:, 0] = torch.linspace(-_REACH, _REACH, _SHOWN)
        found: dict[str, Tensor] = {}
        for name, factors in (("samples", z), ("walk", walk)):
            found[name] = model.mixture.decode(factors, chosen)
            found[f"{name} with details"] = model(found[name])
        pictures = {name: x.reshape(-1, *shape).numpy() for name, x in found.items()}
        images = np.concatenate(list(digits.images_of(trained.manifest, TRAIN_SPLIT)))
        return {**pictures, "real": images[np.flatnonzero(components == k)[:_SHOWN]]}

    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        shown = []
        for label, found in outcomes.items():
            if not found:
                continue
            drawn = found[0].drawn
            for title, names in (
                ("One component", ("samples", "samples with details", "real")),
                ("A walk along a factor", ("walk", "walk with details")),
            ):
                picture = rows_of_images([(name, drawn[name]) for name in names if len(drawn[name])], title)
                caption = "The component that is responsible for most training images, some of which are below."
                shown.append(ReportFigure(f"{label}: {title.lower()}", picture, caption, title))
        return shown


class _Plain:
    """The mixture's samples without details."""

    def __init__(self, model: Any) -> None:
        self.sample = model.plain
