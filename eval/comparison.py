"""Several models side by side under one protocol: held-out log-likelihood, NDB and JS by the same bins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.pixels import quantise
from eval import figures
from eval.bins import Bins, BinSettings, fit_bins
from eval.evaluate import Evaluation, evaluate_samples
from eval.gallery import bins_gallery
from eval.likelihood import LogLikelihood, summarise
from eval.report import ReportFigure, ReportSection, ReportTable


class Density(Protocol):
    """What is judged: log-densities in nats and samples, as NumPy arrays over flattened samples [n, d]."""

    def log_prob(self, x: np.ndarray) -> np.ndarray: ...

    def sample(self, n: int, seed: int) -> np.ndarray: ...


@dataclass(frozen=True)
class JudgedData:
    """The data that models are judged by; `x` arrays are [n, *shape] float32.

    `reference` and `held_out` are on the scale of the scores (pixels v / (levels - 1)); `held_out_density` are the
    held-out samples in the models' own space (dequantised where `levels` is given), for log-likelihoods.
    """

    reference: np.ndarray
    held_out: np.ndarray
    held_out_density: np.ndarray
    levels: int | None
    name: str
    fingerprint: str

    @property
    def scale(self) -> str:
        """The scale of the values that bins and samples are on, in words."""
        if self.levels is None:
            return "values as they are"
        return f"pixels v / {self.levels - 1} in [0, 1]; models' samples put back on the {self.levels} levels"


@dataclass(frozen=True)
class Row:
    """One judged thing: a model, or the held-out data itself (which has no likelihood)."""

    name: str
    log_likelihood: LogLikelihood | None
    evaluation: Evaluation
    samples: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """All rows, and the bins that they share."""

    bins: Bins
    data: JudgedData
    rows: Sequence[Row]

    def row(self, name: str) -> Row:
        """The row of one name."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> ReportTable:
        """The headline table."""
        bits = self.data.levels is not None
        columns = ["model", "test log-likelihood (nats)", "± s.e.", *(["bits/dim"] if bits else [])]
        rows = []
        for row in self.rows:
            ll, result = row.log_likelihood, row.evaluation.result
            cells: list[Any] = [row.name]
            cells += ["–", "–"] if ll is None else [f"{ll.mean:.2f}", f"{ll.standard_error:.2f}"]
            if bits:
                cells.append("–" if ll is None or ll.bits_per_dimension is None else f"{ll.bits_per_dimension:.3f}")
            rows.append([*cells, f"{result.ndb} of {result.bins}", f"{result.js:.4f}", f"{result.n_samples:,}"])
        result = self.rows[0].evaluation.result
        note = (
            f"NDB: bins that differ from the {result.n_reference:,} reference samples ({result.threshold}). "
            "JS in nats; with finite samples it is above zero for a perfect model too, more so the fewer there are."
        )
        if bits:
            note += f" Log-likelihoods are of pixels dequantised to [0, 1), x = (v + u) / {self.data.levels}."
        return ReportTable("Models side by side", [*columns, "NDB", "JS", "samples"], rows, note)


def compare(
    data: JudgedData,
    models: Mapping[str, Density],
    settings: BinSettings,
    *,
    n_samples: int,
    seed: int,
    z_threshold: float | None,
    significance: float | None,
    on_model: Callable[[int, str], None] = lambda done, name: None,
) -> Comparison:
    """Fits bins to the reference and judges the held-out data and every model by them.

    Args:
        data: reference and held-out samples.
        models: densities by the name they get in tables.
        settings: of the bins.
        n_samples: samples drawn from each model, with `seed`.
        z_threshold, significance: the rule that flags a bin (see `eval.ndb.score`).
        on_model: called with (models done, next name), for progress.

    Raises:
        UserError: see `fit_bins` and `evaluate_samples`.
    """
    bins = fit_bins(data.reference, settings, reference_name=data.name, reference_fingerprint=data.fingerprint)
    flat = data.held_out_density.reshape(len(data.held_out_density), -1)

    def judge(name: str, samples: np.ndarray, likelihood: LogLikelihood | None) -> Row:
        evaluation = evaluate_samples(
            bins, samples, name=name, scale=data.scale, z_threshold=z_threshold, significance=significance
        )
        return Row(name, likelihood, evaluation, samples)

    rows = [judge("held-out data", data.held_out, None)]
    for done, (name, model) in enumerate(models.items()):
        on_model(done, name)
        dimensions = flat.shape[1] if data.levels else None
        likelihood = summarise(model.log_prob(flat), n_dimensions=dimensions, levels=data.levels or 256)
        samples = quantise(model.sample(n_samples, seed), data.levels).reshape(n_samples, *data.reference.shape[1:])
        rows.append(judge(name, samples, likelihood))
    return Comparison(bins, data, rows)


def report_sections(comparison: Comparison, name: str) -> list[ReportSection]:
    """The report's pictures of one model of the comparison: proportions, worst bins, samples beside data."""
    data, row = comparison.data, comparison.row(name)
    result = row.evaluation.result
    labels = row.evaluation.labels
    if labels is None:
        raise ValueError("a report needs the bin of every sample")
    gallery = bins_gallery(
        comparison.bins, data.reference, comparison.bins.assign(data.reference), row.samples, labels, result, name=name
    )
    missing = sum(result.direction(int(k)) == "missing" for k in np.flatnonzero(result.flagged))
    found = f"{result.ndb} of {result.bins} bins differ from the data" if result.ndb else "no bin differs from the data"
    return [
        ReportSection(
            "How often each mode is hit",
            f"The reference was cut into {result.bins} bins by K-means. For {name}, {found}"
            + (f", {missing} of them missing." if result.ndb else "."),
            [
                ReportFigure(
                    "Binning proportions",
                    figures.binning_proportions([r.evaluation for r in comparison.rows]),
                    "Share of samples in each bin, for each model, against the reference with its band.",
                    "Share of samples per bin for each model",
                )
            ],
        ),
        ReportSection(
            "The bins that differ most",
            "Missing modes first: what the data has there, and what the model put there.",
            [ReportFigure("Bins", gallery, "Centre, reference members, and samples of the model.", "Gallery of bins")],
        ),
        ReportSection(
            "Samples beside data",
            "",
            [
                ReportFigure("Held-out data", figures.sample_grid(data.held_out, 8, 8), "Held-out data.", "Data"),
                ReportFigure(name, figures.sample_grid(row.samples, 8, 8), f"Samples of {name}.", "Samples"),
            ],
            beside=True,
        ),
    ]
