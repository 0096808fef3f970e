"""Several models side by side under one protocol: held-out log-likelihood, NDB and JS by the same bins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data.partitions import Partitions
from data.pixels import scale
from eval import figures
from eval.bins import BinCounts, Bins, BinSettings, fit_bins
from eval.drawn import Density, DrawnPartitions
from eval.evaluate import Evaluation, Rule, evaluate_counts
from eval.gallery import bins_gallery
from eval.likelihood import LogLikelihood, summarise
from eval.measure import local_pass
from eval.observed import Extent
from eval.report import ReportFigure, ReportSection, ReportTable


@dataclass(frozen=True)
class JudgedData:
    """The data that models are judged by.

    `reference` and `held_out` are on the scale of the scores (pixels v / (levels - 1)); `held_out_name` is what tables
    call the latter. `density` are the held-out samples [n, *shape] in the models' own space (dequantised where
    `levels` is given), for log-likelihoods.
    """

    reference: Partitions
    held_out: Partitions
    held_out_name: str
    density: np.ndarray
    levels: int | None


@dataclass(frozen=True)
class Row:
    """One judged thing: a model, or the held-out data itself (which has no likelihood)."""

    name: str
    log_likelihood: LogLikelihood | None
    evaluation: Evaluation
    samples: Partitions


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
    rule: Rule,
    on_model: Callable[[int, str], None] = lambda done, name: None,
) -> Comparison:
    """Fits bins to the reference and judges the held-out data and every model by them.

    Args:
        data: reference and held-out samples.
        models: densities by the name they get in tables.
        settings: of the bins.
        n_samples: samples drawn from each model, with `seed`.
        rule: which bins are flagged.
        on_model: called with (models done, next name), for progress.

    Raises:
        UserError: see `fit_bins` and `evaluate_counts`.
    """
    reference = data.reference
    over = local_pass(reference)
    fitted = fit_bins(over, [settings], name=reference.name, fingerprint=reference.fingerprint, n=reference.n)
    bins = fitted.bins[0]
    flat = data.density.reshape(len(data.density), -1)

    def judge(name: str, samples: Partitions, scale: str, likelihood: LogLikelihood | None) -> Row:
        seen = local_pass(samples)({"extent": Extent(), "bins": BinCounts(bins)})
        evaluation = evaluate_counts(bins, seen["bins"], seen["extent"], name=name, scale=scale, rule=rule)
        return Row(name, likelihood, evaluation, samples)

    rows = [judge(data.held_out_name, data.held_out, reference.scale, None)]
    drawn = reference.scale if data.levels is None else f"{reference.scale}; samples put back on the pixels' grid"
    for done, (name, model) in enumerate(models.items()):
        on_model(done, name)
        dimensions = flat.shape[1] if data.levels else None
        likelihood = summarise(model.log_prob(flat), n_dimensions=dimensions, levels=data.levels or 256)
        samples = DrawnPartitions(
            partial(_itself, model), n_samples, seed, name=name, identity=name, shape=bins.shape, levels=data.levels
        )
        rows.append(judge(name, samples, drawn, likelihood))
    return Comparison(bins, data, rows)


def _itself(model: Density) -> Density:
    return model


def report_sections(
    bins: Bins, reference: Partitions, rows: Sequence[Row], row: Row, beside: tuple[str, Partitions]
) -> list[ReportSection]:
    """The report's pictures: proportions of all rows; the worst bins of one row; its samples beside real ones.

    Args:
        bins: what all rows were judged by.
        reference: the reference.
        rows: shown in the plot of proportions.
        row: whose worst bins and samples are shown.
        beside: name and samples of the real data that its samples are shown beside.
    """
    result = row.evaluation.result
    gallery = bins_gallery(
        bins,
        partial(bin_members, reference, bins.members),
        partial(bin_members, row.samples, row.evaluation.members),
        result,
        name=row.name,
    )
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
                ReportFigure(
                    title[:1].upper() + title[1:], figures.sample_grid(first(x, 64), 8, 8), "The first 64.", title
                )
                for title, x in (beside, (row.name, row.samples))
            ],
            beside=True,
        ),
    ]


def bin_members(samples: Partitions, members: np.ndarray | None, rows: np.ndarray) -> list[np.ndarray]:
    """Some samples [m, *shape] of each of the bins `rows`; none where a bin holds none."""
    if members is None:
        raise ValueError("these bins were counted without noting members")
    chosen = [members[k][members[k] >= 0] for k in rows]
    places = np.concatenate(chosen)
    found = samples.fetch(places) if len(places) else np.zeros((0, 1), np.float32)
    return np.split(found, np.cumsum([len(part) for part in chosen])[:-1])


def first(samples: Partitions, n: int) -> np.ndarray:
    """The first n samples [n, *shape] of a set, on the scale of the scores."""
    found: list[np.ndarray] = []
    for number in range(len(samples)):
        for piece in samples.pieces(number):
            found.append(scale(piece.x[:n], samples.levels))
            if sum(map(len, found)) >= n:
                return np.concatenate(found)[:n]
    return np.concatenate(found)
