"""The `evaluate` command: any samples against any reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from cluster.models import open_model
from cluster.progress import Stages
from data import storage
from data.errors import UserError
from data.pixels import quantise
from data.samples import load_samples
from eval import figures
from eval.bins import Bins, BinSettings, fit_bins
from eval.evaluate import Evaluation, evaluate_samples
from eval.gallery import bins_gallery
from eval.report import ReportFigure, ReportSection, ReportTable, render_report


def judge_samples(
    samples: str,
    reference: str,
    settings: BinSettings,
    *,
    split: str,
    reference_split: str,
    n: int,
    z_threshold: float | None,
    significance: float | None,
    tracking_uri: str | None,
    report: str | None,
    quiet: bool,
) -> Evaluation:
    """Scores samples (a place, or a registered model from which `n` are drawn) by bins fitted to a reference.

    Raises:
        UserError: unusable places, samples that do not fit the reference, fewer samples than bins.
    """
    if z_threshold is not None and significance is not None:
        raise UserError("give --z-threshold or --significance, not both")
    stages = Stages(quiet)
    with stages.stage("load reference"):
        data = load_samples(reference, split=reference_split)
    with stages.stage("load samples"):
        x, extras = _samples(samples, split, n, settings.seed, tracking_uri)
    if x.shape[1:] != data.x.shape[1:]:
        raise UserError(
            f"{samples} holds samples of shape {x.shape[1:]}, {reference} of {data.x.shape[1:]}: "
            "bring them to one shape"
        )
    if len(x) < settings.n_bins:
        raise UserError(f"{samples} holds {len(x)} samples for {settings.n_bins} bins: use more samples, or --bins")
    with stages.stage("fit bins"):
        bins = fit_bins(data.x, settings, reference_name=data.name, reference_fingerprint=data.fingerprint)
    with stages.stage("assign samples"):
        evaluation = evaluate_samples(
            bins,
            x,
            name=samples,
            scale=f"reference {data.scale}, samples {extras.pop('scale')}",
            z_threshold=z_threshold,
            significance=significance,
            extras=extras,
        )
    if report:
        with stages.stage("report") if not quiet else nullcontext():
            storage.write_text(report, _report(bins, data.x, x, evaluation))
    return evaluation


def _samples(place: str, split: str, n: int, seed: int, tracking_uri: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The samples [n, *shape] on the scale of the scores, and what the protocol says of them."""
    if not place.startswith("models:"):
        loaded = load_samples(place, split=split)
        return loaded.x, {"samples_fingerprint": loaded.fingerprint, "scale": loaded.scale}
    model = open_model(place, tracking_uri)
    levels = model.data.get("levels")
    scale = "as drawn" if levels is None else f"put back on the {levels} levels, / {levels - 1}"
    return quantise(model.sample(n, seed), levels), {"samples_seed": seed, "scale": scale}


def _report(bins: Bins, reference: np.ndarray, x: np.ndarray, evaluation: Evaluation) -> str:
    result = evaluation.result
    if evaluation.labels is None:
        raise ValueError("a report needs the bin of every sample")
    gallery = bins_gallery(bins, reference, bins.assign(reference), x, evaluation.labels, result, name="samples")
    table = ReportTable(
        "Scores",
        ["samples", "NDB", "NDB/K", "JS (nats)", "n"],
        [[evaluation.name, f"{result.ndb} of {result.bins}", result.ndb_over_k, result.js, result.n_samples]],
    )
    sections = [
        ReportSection(
            "How often each mode is hit",
            "",
            [
                ReportFigure("Proportions", figures.binning_proportions([evaluation]), "Share of samples per bin.", "")
            ],
        ),
        ReportSection(
            "The bins that differ most",
            "Missing modes first.",
            [ReportFigure("Bins", gallery, "Centre, reference members, samples.", "Gallery of bins")],
        ),
        ReportSection(
            "Samples beside the reference",
            "",
            [
                ReportFigure("Reference", figures.sample_grid(reference, 8, 8), "Reference.", "Reference"),
                ReportFigure("Samples", figures.sample_grid(x, 8, 8), "Samples.", "Samples"),
            ],
            beside=True,
        ),
    ]
    return render_report(f"manymodes: {evaluation.name}", table, sections, evaluation.protocol)
