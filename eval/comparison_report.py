"""The tables and pictures of a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from data.partitions import Partitions
from eval import figures
from eval.bins import Bins
from eval.canvas import is_image
from eval.comparison import Comparison, Row
from eval.gallery import bins_gallery
from eval.metrics.ndb import MISSING_SHARE
from eval.reference import Reference, bin_members
from eval.report import ReportFigure, ReportSection, ReportTable
from eval.scores import Score

# Pairs of a sample and its nearest reference sample in the picture.
_SHOWN_PAIRS = 12


def headline_table(comparison: Comparison) -> ReportTable:
    """The headline table: likelihood where there is one, NDB and JS."""
    likelihoods = any(row.log_likelihood for row in comparison.rows)
    bits = likelihoods and comparison.levels is not None
    columns = ["model" if likelihoods else "samples"]
    columns += ["test log-likelihood (nats)", "± s.e."] if likelihoods else []
    columns += ["bits/dim"] if bits else []
    rows = []
    for row in comparison.rows:
        ll, result = row.log_likelihood, row.evaluation.result
        cells: list[Any] = [row.name]
        if likelihoods:
            cells += ["–", "–"] if ll is None else [f"{ll.mean:.2f}", f"{ll.standard_error:.2f}"]
        if bits:
            cells.append("–" if ll is None or ll.bits_per_dimension is None else f"{ll.bits_per_dimension:.3f}")
        rows.append([*cells, f"{result.ndb} of {result.bins}", f"{result.js:.4f}", f"{result.n_samples:,}"])
    result = comparison.rows[0].evaluation.result
    note = (
        f"NDB: bins that differ from the {result.n_reference:,} reference samples ({result.threshold}). "
        "JS in nats; with finite samples it is above zero for a perfect model too, more so the fewer there are."
    )
    note += _unequal(comparison)
    if bits:
        note += f" Log-likelihoods are of pixels dequantised to [0, 1), x = (v + u) / {comparison.levels}."
    return ReportTable("Models side by side", [*columns, "NDB", "JS", "samples"], rows, note)


def report_sections(
    comparison: Comparison, row: Row, beside: tuple[str, Partitions] | None = None
) -> list[ReportSection]:
    """The report's pictures: proportions of all rows; the worst bins of one row; its samples beside real ones.

    Args:
        comparison: what the report is about; all its rows are in the plot of proportions.
        row: whose worst bins and samples are shown.
        beside: name and samples of the real data that its samples are shown beside.
    """
    reference, result = comparison.reference, row.evaluation.result
    bins = reference.bins[0]
    found = f"{result.ndb} of {result.bins} bins differ from the reference, {result.told()}"
    none = f"no bin of {result.bins} differs from the reference"
    cut = "by K-means" if bins.centres is not None else "by class"
    proportions = figures.binning_proportions([each.evaluation for each in comparison.rows])
    sections = [
        ReportSection(
            "How often each mode is hit",
            f"The reference was cut into {result.bins} bins {cut}. {row.name}: {found if result.ndb else none}.",
            [
                ReportFigure(
                    "Binning proportions",
                    proportions,
                    "Share of samples in each bin against the share of the reference, with its band.",
                    "Share of samples per bin",
                )
            ],
        )
    ]
    return [*sections, *row_sections(comparison, row, beside)]


def row_sections(comparison: Comparison, row: Row, beside: tuple[str, Partitions] | None = None) -> list[ReportSection]:
    """The pictures of one row: its worst bins, its samples (beside others), and those nearest to the reference."""
    shown = [*([beside] if beside else []), (row.name, row.samples)]
    pictures = [
        ReportFigure(name, figures.sample_grid(samples.first(64), 8, 8), "The first 64.", name)
        for name, samples in shown
    ]
    return [
        worst_bins(comparison.reference, comparison.reference.bins[0], row),
        ReportSection("Samples beside data" if beside else "Samples", "", pictures, beside=True),
        *_nearest(comparison.reference, row),
    ]


def _nearest(reference: Reference, row: Row) -> list[ReportSection]:
    """The samples that lie nearest to the reference, each beside its neighbour."""
    copies = row.copies
    if copies is None or reference.partitions is None or not is_image(reference.bins[0].shape):
        return []
    nearest = np.argsort(copies.distances, kind="stable")[:_SHOWN_PAIRS]
    pairs = [row.samples.fetch(copies.samples[nearest]), reference.partitions.fetch(copies.reference[nearest])]
    picture = figures.sample_grid(np.concatenate(pairs), 2, len(nearest))
    if copies.found is None:
        text = "Without held-out data nothing tells whether these are nearer to the reference than chance."
    else:
        text = (
            f"Of {len(copies.samples):,} samples, {copies.found.shares[0]:.1%} are as near to a reference sample as "
            f"the nearest {copies.found.quantiles[0]:.0%} of held-out samples are."
        )
    caption = "Above: the samples nearest to the reference. Below: the reference sample nearest to each."
    figure = ReportFigure("Nearest pairs", picture, caption, "Nearest pairs")
    return [ReportSection(f"Copies? {row.name}", text, [figure])]


def scores_table(comparison: Comparison) -> ReportTable | None:
    """Every other score, one row each; None where none was wanted."""
    names = list(dict.fromkeys(score.name for row in comparison.rows for score in row.scores))
    if not names:
        return None
    scores = [{score.name: score for score in row.scores} for row in comparison.rows]
    cells, details = [], []
    for name in names:
        found = [each.get(name) for each in scores]
        details.append(_taken(comparison, found))
        better = next((score.better for score in found if score and score.better), "")
        values = ["–" if score is None else str(score) for score in found]
        cells.append([name, better, *values, _itself(found)])
    note = (
        f"Features: {comparison.reference.space.name}. ±: one standard error, where nothing else is said. Two parts of "
        "the reference: what one random part of it scores against another, as a perfect model would; of the same sizes "
        "where no others are named."
    )
    classifier = comparison.rows[0].evaluation.protocol.get("classifier")
    if classifier:
        note += f" Classes: {classifier}."
    columns = ["score", "better", *(row.name for row in comparison.rows), "two parts of the reference"]
    return ReportTable("Other scores", columns, cells, note, details)


def _itself(found: list[Score | None]) -> str:
    """What the reference scores against itself: once where all rows have the same."""
    told = [f"{score.itself:.4g}" for score in found if score and score.itself is not None]
    return " / ".join(told if len(set(told)) > 1 else told[:1]) or "–"


def _taken(comparison: Comparison, found: list[Score | None]) -> str:
    """How a score was taken: first what holds for all rows, then row by row what differs."""
    words = {}
    for row, score in zip(comparison.rows, found):
        if score is not None:
            other = score.itself_protocol is not None and score.itself_protocol not in score.protocol
            told = score.words + (f"; two parts: {score.itself_protocol}" if other else "")
            words[row.name] = told
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    split = {name: re.split("[;,] ", told) for name, told in words.items()}
    shared = [part for part in next(iter(split.values())) if all(part in parts for parts in split.values())]
    own: dict[str, list[str]] = {}
    for name, parts in split.items():
        if rest := ", ".join(part for part in parts if part not in shared):
            own.setdefault(rest, []).append(name)
    return "; ".join([", ".join(shared)] * bool(shared) + [f"{', '.join(rows)}: {rest}" for rest, rows in own.items()])


def bins_table(comparison: Comparison) -> ReportTable:
    """NDB and JS by every set of bins: as they are, corrected, with intervals, and what chance alone would give."""
    columns = ["samples", "bins", "NDB", "by chance", "Holm", "BH", "NDB/K", "95 %"]
    columns += ["JS (nats)", "95 %", "floor", "p", "n"]
    cells = []
    for row in comparison.rows:
        for evaluation in row.evaluations:
            r = evaluation.result
            cells.append([
                *(row.name, f"{r.bins}", f"{r.ndb}", f"{r.expected_by_chance:.1f}", f"{r.ndb_holm}", f"{r.ndb_bh}"),
                *(f"{r.ndb_over_k:.3f}", _range(r.intervals.ndb_over_k, 3), f"{r.js:.4f}", _range(r.intervals.js, 4)),
                *(f"{r.js_floor.mean:.4f}", f"{r.js_floor.p_value:.3f}", f"{r.n_samples:,}"),
            ])  # fmt: skip
    result = comparison.rows[0].evaluation.result
    level = f"{100 * result.level:.2g} %"
    note = (
        f"A bin differs where {result.threshold}. By chance: so many bins differ on average where both sets come from "
        "one distribution. Holm: the bins that still differ when the probability of even one false alarm among all "
        f"bins is kept to {level}; BH (Benjamini-Hochberg): when on average at most {level} of the bins that differ "
        "are false alarms. 95 %: the interval for the score beside it, found by drawing sets of these sizes again and "
        "again. Floor: the mean JS of two such sets of one distribution; p: the share of them with a larger JS."
    )
    return ReportTable("NDB and JS", columns, cells, note + _unequal(comparison))


def _unequal(comparison: Comparison) -> str:
    return unequal_sizes([row.evaluation.result.n_samples for row in comparison.rows])


def unequal_sizes(sizes: Sequence[int]) -> str:
    """A warning where NDB and JS of sets of several sizes stand side by side; "" where they are of one size."""
    if len(set(sizes)) < 2:
        return ""
    return (
        f" The sets differ in size ({min(sizes):,} to {max(sizes):,} samples): from more samples NDB finds more bins "
        "that differ, and JS is larger where there are fewer; compare sets of one size."
    )


def _range(interval: tuple[float, float], digits: int) -> str:
    return f"{interval[0]:.{digits}f}–{interval[1]:.{digits}f}"


def worst_bins(reference: Reference, bins: Bins, row: Row) -> ReportSection:
    """The gallery of the bins that differ most."""
    result = row.evaluation.result
    gallery = bins_gallery(
        bins,
        partial(reference.members, bins),
        partial(bin_members, row.samples, row.evaluation.members),
        result,
        name=row.name,
    )
    order = (
        "Bins with fewer samples first: what the reference has there, and what the samples put there. A bin is called "
        f"missing where the samples' share is at most {MISSING_SHARE:.0%} of the reference's."
    )
    close = "No bin is flagged; these come closest, whether they hold fewer samples or more."
    caption = "Centre, members of the reference, samples."
    return ReportSection(
        f"The bins that differ most: {row.name}",
        order if result.ndb else close,
        [ReportFigure("Bins", gallery, caption, "Gallery of bins")],
    )
