"""Several models side by side under one protocol: held-out log-likelihood, NDB and JS by the same bins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.pixels import quantise
from data.samples import Samples
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
    """The data that models are judged by.

    `reference` and `held_out` [n, *shape] are on the scale of the scores (pixels v / (levels - 1)); `held_out_name`
    is what tables call the latter. `density` are the held-out samples in the models' own space (dequantised where
    `levels` is given), for log-likelihoods.
    """

    reference: Samples
    held_out: np.ndarray
    held_out_name: str
    density: np.ndarray
    levels: int | None


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
    reference = data.reference
    bins = fit_bins(
        reference.x, settings, reference_name=reference.name, reference_fingerprint=reference.fingerprint
    )
    flat = data.density.reshape(len(data.density), -1)

    def judge(name: str, samples: np.ndarray, scale: str, likelihood: LogLikelihood | None) -> Row:
        evaluation = evaluate_samples(
            bins, samples, name=name, scale=scale, z_threshold=z_threshold, significance=significance
        )
        return Row(name, likelihood, evaluation, samples)

    rows = [judge(data.held_out_name, data.held_out, reference.scale, None)]
    drawn = reference.scale if data.levels is None else f"{reference.scale}; samples put back on the pixels' grid"
    for done, (name, model) in enumerate(models.items()):
        on_model(done, name)
        dimensions = flat.shape[1] if data.levels else None
        likelihood = summarise(model.log_prob(flat), n_dimensions=dimensions, levels=data.levels or 256)
        samples = quantise(model.sample(n_samples, seed), data.levels).reshape(n_samples, *reference.x.shape[1:])
        rows.append(judge(name, samples, drawn, likelihood))
    return Comparison(bins, data, rows)


def report_sections(
    bins: Bins, reference: np.ndarray, rows: Sequence[Row], row: Row, beside: tuple[str, np.ndarray]
) -> list[ReportSection]:
    """The report's pictures: proportions of all rows; the worst bins of one row; its samples beside real ones.

    Args:
        bins: what all rows were judged by.
        reference: the reference's samples [n, *shape].
        rows: shown in the plot of proportions.
        row: whose worst bins and samples are shown.
        beside: name and samples of the real data that its samples are shown beside.
    """
    result, labels = row.evaluation.result, row.evaluation.labels
    if labels is None:
        raise ValueError("a report needs the bin of every sample")
    gallery = bins_gallery(bins, reference, bins.assign(reference), row.samples, labels, result, name=row.name)
    missing = sum(result.direction(int(k)) == "missing" for k in np.flatnonzero(result.flagged))
    found = f"{result.ndb} of {result.bins} bins differ from the reference, {missing} of them missing"
    none = f"no bin of {result.bins} differs from the reference"
    order = "Missing modes first: what the reference has there, and what the samples put there."
    return [
        ReportSection(
            "How often each mode is hit",
            f"The reference was cut into {result.bins} bins by K-means. {row.name}: {found if result.ndb else none}.",
            [
                ReportFigure(
                    "Binning proportions",
                    figures.binning_proportions([r.evaluation for r in rows]),
                    "Share of samples in each bin against the share of the reference, with its band.",
                    "Share of samples per bin",
                )
            ],
        ),
        ReportSection(
            "The bins that differ most",
            order if result.ndb else "No bin is flagged; these come closest, whether they hold fewer samples or more.",
            [ReportFigure("Bins", gallery, "Centre, members of the reference, samples.", "Gallery of bins")],
        ),
        ReportSection(
            "Samples beside data",
            "",
            [
                ReportFigure(name[:1].upper() + name[1:], figures.sample_grid(x, 8, 8), "The first 64.", name)
                for name, x in (beside, (row.name, row.samples))
            ],
            beside=True,
        ),
    ]
