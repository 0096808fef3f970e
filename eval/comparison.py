"""Sets of samples side by side under one protocol: NDB and JS by the same bins, and every other score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from data.errors import UserError
from data.partitions import Partitions
from eval import figures
from eval.bins import BinCounts, Bins, BinSettings
from eval.canvas import is_image
from eval.drawn import Density, DrawnPartitions
from eval.evaluate import Evaluation, Rule, evaluate_counts
from eval.gallery import bins_gallery
from eval.likelihood import LogLikelihood, summarise
from eval.measure import local_pass
from eval.metrics.manifold import Memorisation, compare_distances
from eval.observed import Digest, Extent, Nearest, Pass, Sketch
from eval.reference import Reference, bin_members, fit_reference
from eval.report import ReportFigure, ReportSection, ReportTable
from eval.scores import Score, ScoreSettings, Summary, scores_of

# Samples whose nearest reference sample is searched, and as many held-out ones.
_QUERIES = 1000
# Pairs of a sample and its nearest reference sample in the picture.
_SHOWN_PAIRS = 12


@dataclass(frozen=True)
class Copies:
    """The search for copies: the comparison, and the positions of each query and of its nearest reference sample."""

    found: Memorisation
    samples: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Row:
    """One judged set: a model's samples, or held-out data (which has no likelihood)."""

    name: str
    samples: Partitions
    evaluations: list[Evaluation]
    scores: list[Score] = field(default_factory=list)
    log_likelihood: LogLikelihood | None = None
    copies: Copies | None = None

    @property
    def evaluation(self) -> Evaluation:
        """By the first set of bins."""
        return self.evaluations[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: the first evaluation, the other sets of bins, scores, log-likelihood."""
        return {
            **self.evaluation.to_dict(),
            "other_bins": [evaluation.to_dict() for evaluation in self.evaluations[1:]],
            "scores": [score.to_dict() for score in self.scores],
            "log_likelihood": None if self.log_likelihood is None else self.log_likelihood.to_dict(),
        }


def judge(
    samples: Partitions,
    over: Pass,
    reference: Reference,
    *,
    name: str,
    rule: Rule,
    scores: ScoreSettings,
    scale: str | None = None,
    log_likelihood: LogLikelihood | None = None,
    extras: Mapping[str, Any] | None = None,
    over_reference: Pass | None = None,
    held_out: tuple[Partitions, Pass] | None = None,
    stored: bool = False,
) -> Row:
    """Every score of one set of samples, in one pass over it.

    Args:
        samples: the set; `over` passes over it.
        reference: the yardstick.
        name: the heading in tables and figures.
        rule: which bins are flagged.
        scores: what else is measured; they need a reference that was fitted for them.
        scale: of the values, in words; made of the two sets' own if None.
        log_likelihood: for the table, where the model is a density.
        extras: further facts for the protocol.
        over_reference: passes over the reference, for the search for copies.
        held_out: data that nobody trained on, for the same search.
        stored: the pass keeps what it found of each partition: subsets then may not depend on the set's size.

    Raises:
        UserError: samples that do not fit the reference, or too few of them.
    """
    digest = {} if samples.fingerprint else {"digest": Digest()}
    counts = {f"bins {i}": BinCounts(bins) for i, bins in enumerate(reference.bins)}
    search = "memorisation" in scores.names and over_reference is not None and held_out is not None
    n = None if stored else samples.n
    queries = {"queries": Sketch(_QUERIES, n, scores.seed)} if search else {}
    seen = over({"extent": Extent(), "summary": Summary(scores, n), **counts, **digest, **queries})
    fingerprint = samples.fingerprint or seen["digest"].hexdigest()
    words = scale or f"reference {reference.scale}; samples {samples.scale}"
    facts = {"samples_fingerprint": fingerprint, **(extras or {})}
    evaluations = [
        evaluate_counts(
            bins, seen[f"bins {i}"], seen["extent"], name=name, scale=words, rule=rule, extras=facts
        )
        for i, bins in enumerate(reference.bins)
    ]
    copies = None
    if search and over_reference is not None and held_out is not None:
        copies = _copies(seen["queries"], over_reference, held_out, scores.seed)
    found = scores_of(reference.summary, seen["summary"], copies.found if copies else None)
    return Row(name, samples, evaluations, found, log_likelihood, copies)


def _copies(queries: Sketch, over_reference: Pass, held_out: tuple[Partitions, Pass], seed: int) -> Copies:
    others, over = held_out
    known = over({"queries": Sketch(_QUERIES, others.n, seed)})["queries"]
    own, positions = queries.least(_QUERIES)
    seen = over_reference({"own": Nearest(own), "known": Nearest(known.least(_QUERIES)[0])})
    own_distances, known_distances = (np.sqrt(seen[name].distances) for name in ("own", "known"))
    nearest = seen["own"].positions
    return Copies(compare_distances(own_distances, known_distances, nearest), positions, nearest)


@dataclass(frozen=True)
class Comparison:
    """All rows, and the reference that they share.

    Raises:
        UserError: a row was judged by other bins: its scores do not compare.
    """

    reference: Reference
    rows: Sequence[Row]
    levels: int | None = None

    def __post_init__(self) -> None:
        known = [bins.fingerprint for bins in self.reference.bins]
        for row in self.rows:
            used = [evaluation.protocol["bins_fingerprint"] for evaluation in row.evaluations]
            if used != known:
                raise UserError(f"{row.name} was judged by other bins: judge all sets by one reference")

    def row(self, name: str) -> Row:
        """The row of one name."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> ReportTable:
        """The headline table: likelihood where there is one, NDB and JS."""
        likelihoods = any(row.log_likelihood for row in self.rows)
        bits = likelihoods and self.levels is not None
        columns = ["model" if likelihoods else "samples"]
        columns += ["test log-likelihood (nats)", "± s.e."] if likelihoods else []
        columns += ["bits/dim"] if bits else []
        rows = []
        for row in self.rows:
            ll, result = row.log_likelihood, row.evaluation.result
            cells: list[Any] = [row.name]
            if likelihoods:
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
            note += f" Log-likelihoods are of pixels dequantised to [0, 1), x = (v + u) / {self.levels}."
        return ReportTable("Models side by side", [*columns, "NDB", "JS", "samples"], rows, note)


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


def compare(
    data: JudgedData,
    models: Mapping[str, Density],
    settings: BinSettings,
    *,
    n_samples: int,
    seed: int,
    rule: Rule,
    scores: ScoreSettings,
    on_model: Callable[[int, str], None] = lambda done, name: None,
) -> Comparison:
    """Fits bins to the reference and judges the held-out data and every density by them.

    Args:
        data: reference and held-out samples.
        models: densities by the name they get in tables.
        settings: of the bins.
        n_samples: samples drawn from each model, with `seed`.
        rule: which bins are flagged.
        scores: what else is measured.
        on_model: called with (models done, next name), for progress.

    Raises:
        UserError: see `fit_reference` and `judge`.
    """
    over = local_pass(data.reference)
    reference = fit_reference(data.reference, over, [settings], scores)
    shape, flat = reference.bins[0].shape, data.density.reshape(len(data.density), -1)
    held = (data.held_out, local_pass(data.held_out))
    scale = reference.scale
    rows = [judge(*held, reference, name=data.held_out_name, scale=scale, rule=rule, scores=scores)]
    drawn = scale if data.levels is None else f"{scale}; samples put back on the pixels' grid"
    for done, (name, model) in enumerate(models.items()):
        on_model(done, name)
        dimensions = flat.shape[1] if data.levels else None
        likelihood = summarise(model.log_prob(flat), n_dimensions=dimensions, levels=data.levels or 256)
        samples = DrawnPartitions(
            partial(_itself, model), n_samples, seed, name=name, identity=name, shape=shape, levels=data.levels
        )
        rows.append(
            judge(
                *(samples, local_pass(samples), reference),
                name=name,
                rule=rule,
                scores=scores,
                scale=drawn,
                log_likelihood=likelihood,
                over_reference=over,
                held_out=held,
            )
        )
    return Comparison(reference, rows, data.levels)


def _itself(model: Density) -> Density:
    return model


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
    missing = sum(result.direction(int(k)) == "missing" for k in np.flatnonzero(result.flagged))
    found = f"{result.ndb} of {result.bins} bins differ from the reference, {missing} of them missing"
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


def row_sections(
    comparison: Comparison, row: Row, beside: tuple[str, Partitions] | None = None
) -> list[ReportSection]:
    """The pictures of one row: its worst bins, its samples (beside others), and those nearest to the reference."""
    shown = [*([beside] if beside else []), (row.name, row.samples)]
    pictures = [
        ReportFigure(
            name[:1].upper() + name[1:], figures.sample_grid(samples.first(64), 8, 8), "The first 64.", name
        )
        for name, samples in shown
    ]
    return [
        worst_bins(comparison.reference, comparison.reference.bins[0], row),
        ReportSection("Samples beside data" if beside else "Samples", "", pictures, beside=True),
        *_nearest(comparison.reference, row),
    ]


def _nearest(reference: Reference, row: Row) -> list[ReportSection]:
    """The samples that lie nearest to the reference, each beside its neighbour."""
    if row.copies is None or reference.partitions is None or not is_image(reference.bins[0].shape):
        return []
    generated, known = row.copies.found.closest(_SHOWN_PAIRS)[:, 0], row.copies.reference
    pairs = [
        row.samples.fetch(row.copies.samples[generated]),
        reference.partitions.fetch(known[generated]),
    ]
    picture = figures.sample_grid(np.concatenate(pairs), 2, len(generated))
    share = row.copies.found.shares[0]
    text = (
        f"Of {len(known):,} samples, {share:.1%} are as near to a reference sample as the nearest "
        f"{row.copies.found.quantiles[0]:.0%} of held-out samples are."
    )
    caption = "Above: the samples nearest to the reference. Below: the reference sample nearest to each."
    figure = ReportFigure("Nearest pairs", picture, caption, "Nearest pairs")
    return [ReportSection(f"Copies? {row.name}", text, [figure])]


def scores_table(comparison: Comparison) -> ReportTable | None:
    """Every other score, one row each; None where none was taken."""
    known: dict[str, Score] = {score.name: score for row in comparison.rows for score in row.scores}
    if not known:
        return None
    columns = ["score", "better", *(row.name for row in comparison.rows), "protocol"]
    cells = []
    for name, score in known.items():
        values = [next((str(each) for each in row.scores if each.name == name), "–") for row in comparison.rows]
        cells.append([name, score.better, *values, score.protocol])
    note = f"Features: {comparison.reference.space.name}. ±: one standard error, where nothing else is said."
    classifier = comparison.rows[0].evaluation.protocol.get("classifier")
    if classifier:
        note += f" Classes: {classifier}."
    return ReportTable("Other scores", columns, cells, note)


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
    rule = comparison.rows[0].evaluation.result.threshold
    note = (
        f"A bin differs where {rule}. Holm: no false alarm at all, BH: few among those flagged, at the same level. "
        "95 %: if both sets were drawn again. Floor: the mean JS of two such sets of one distribution; p: the share of "
        "them with more."
    )
    return ReportTable("NDB and JS", columns, cells, note)


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
    order = "Missing modes first: what the reference has there, and what the samples put there."
    close = "No bin is flagged; these come closest, whether they hold fewer samples or more."
    caption = "Centre, members of the reference, samples."
    return ReportSection(
        f"The bins that differ most: {row.name}",
        order if result.ndb else close,
        [ReportFigure("Bins", gallery, caption, "Gallery of bins")],
    )

