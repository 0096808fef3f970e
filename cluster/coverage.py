"""Judges what draws samples: bins of the data and NDB, likelihoods and baselines, under one protocol."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster import codes, gaussians
from cluster.fitting import Trained
from cluster.models import LocalAutoencoder, LocalModel, open_model
from cluster.progress import console
from cluster.recipe import Recipe
from cluster.verdict import Verdict
from data import storage
from data.errors import UserError
from data.manifest import Manifest
from data.partitions import PackPartitions
from data.stream import read_blocks
from eval import mixture_figures
from eval.baselines import fit_gaussian_mixture
from eval.comparison import Comparison, JudgedData, compare
from eval.comparison_report import headline_table, report_sections
from eval.density_figures import Panel, density_panels, in_the_plane
from eval.drawn import Generator
from eval.evaluate import Rule
from eval.report import ReportFigure, ReportSection
from eval.scores import ScoreSettings
from trainer.checkpoint import load_model
from trainer.models.latent_mixture import LatentMixture
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

UNIT = "models"  # of progress


def can_be_judged(recipe: Recipe, manifest: Manifest) -> None:
    """Refuses, before training, data that the evaluation would refuse after it."""
    for split in (TRAIN_SPLIT, TEST_SPLIT):
        n, bins = manifest.n_samples(split), recipe.evaluation.bins
        if min(n, bins.max_samples or n) < bins.n_bins:
            raise UserError(
                f"{manifest.name}: the {split} split has {n} samples for {bins.n_bins} bins: use more data, or lower "
                "evaluation.bins.n_bins"
            )


def judge(recipe: Recipe, trained: Trained, advance: Any) -> Verdict:
    """Judges baselines, root and final model by bins of the training data."""
    comparison, name = _evaluate(recipe, trained, advance)
    row, held_out = comparison.row(name), comparison.rows[0]
    result, reference = row.evaluation.result, comparison.reference
    coder, found = open_model(trained.model), None
    if isinstance(coder, LocalAutoencoder):
        advance(1, text="codes")
        found = codes.measure(coder, codes.held_out(trained.manifest), seed=recipe.evaluation.seed)

    def sections() -> list[ReportSection]:
        of_codes: list[ReportSection] = []
        if found is not None and isinstance(coder, LocalAutoencoder):
            of_codes = codes.sections(coder, found, trained.manifest.class_names)
        of_samples = report_sections(comparison, row, (held_out.name, held_out.samples))
        return of_samples + of_codes + _model_sections(trained)

    return Verdict(
        metrics={**_metrics(comparison, name), **(found.metrics if found else {})},
        table=headline_table(comparison),
        models=[one.to_dict() for one in comparison.rows],
        protocol=row.evaluation.protocol,
        lead=f"{name}, trained on {reference.name}: {result.ndb} of {result.bins} bins differ from the data.",
        sections=sections,
        save=lambda folder: reference.save(storage.join(folder, "reference")),
    )


def _evaluate(recipe: Recipe, trained: Trained, advance: Any) -> tuple[Comparison, str]:
    """Judges baselines, root and final model; returns the comparison and the final model's name in it."""
    settings, manifest = recipe.evaluation, trained.manifest
    noise = settings.seed if recipe.training.dequantises(manifest.levels) else None
    data = JudgedData(
        PackPartitions(manifest, TRAIN_SPLIT),
        PackPartitions(manifest, TEST_SPLIT),
        "held-out data",
        _rows(manifest, TEST_SPLIT, noise),
        manifest.levels if noise is not None else None,
    )
    models: dict[str, Generator] = {}
    components = getattr(recipe.model, "n_components", 1)  # a family without components is one
    if settings.baselines:
        train = _rows(manifest, TRAIN_SPLIT, noise).reshape(manifest.n_samples(TRAIN_SPLIT), -1)
        if len(train) <= train.shape[1]:
            console.print(
                f"no full-covariance baselines: {len(train)} samples cannot determine a covariance of {train.shape[1]} "
                "features"
            )
        for kind in settings.baselines if len(train) > train.shape[1] else ():
            k = 1 if kind == "gaussian" else components
            label = "single Gaussian, full covariance" if k == 1 else f"Gaussian mixture, full covariance, K={k}"
            advance(0, text=f"fitting {label}")
            models[label] = fit_gaussian_mixture(train, k, settings.seed)
    models[recipe.model.label] = LocalModel(trained.root_model)
    name = next(reversed(models))
    if recipe.hierarchy:
        flat = LocalModel(trained.model)
        name = f"hierarchical MFA, K={flat.model.n_components}"
        models[name] = flat
    comparison = compare(
        data,
        models,
        settings.bins,
        n_samples=settings.n_samples,
        seed=settings.seed,
        rule=Rule(settings.z_threshold, settings.significance),
        scores=ScoreSettings(()),
        on_model=lambda done, label: advance(done, total=len(models), text=label),
    )
    return comparison, name


def _rows(manifest: Manifest, split: str, dequantise_seed: int | None) -> np.ndarray:
    return np.concatenate([b["x"] for b in read_blocks(manifest, split, dequantise_seed=dequantise_seed)])


def _metrics(comparison: Comparison, name: str) -> dict[str, float]:
    row = comparison.row(name)
    result, likelihood = row.evaluation.result, row.log_likelihood
    metrics = {"ndb": float(result.ndb), "ndb_over_k": float(result.ndb_over_k), "js": float(result.js)}
    if likelihood is not None:
        metrics["test_log_likelihood"] = likelihood.mean
        metrics["test_log_likelihood_se"] = likelihood.standard_error
        if likelihood.bits_per_dimension is not None:
            metrics["bits_per_dimension"] = likelihood.bits_per_dimension
    return metrics


def _model_sections(trained: Trained) -> list[ReportSection]:
    """Pictures of the model itself: its components or Gaussians, or, in the plane, its density."""
    model, _ = load_model(trained.model)
    shape = tuple(trained.manifest.shape)
    if shape == (2,):
        truth = PackPartitions(trained.manifest, TEST_SPLIT).first(2000)
        picture = density_panels([Panel(trained.manifest.name, in_the_plane(model, truth))])
        caption = "2,000 samples (by component) over the contours of the log-density and held-out data (grey)."
        return [ReportSection("In the plane", "", [ReportFigure("Samples", picture, caption, "Samples in the plane")])]
    if isinstance(model, LatentMixture):
        return [gaussians.section(model, shape)]
    components = mixture_figures.components_of(model, shape)
    if components is None:
        return []
    return [
        ReportSection(
            "Components",
            "The components with the largest mixing coefficients: mean, noise, and the directions of the factors.",
            [ReportFigure("Components", components, "Mean μ, noise, and μ ± A for each factor.", "Component pictures")],
        )
    ]
