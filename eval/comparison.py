"""Sets of samples side by side under one protocol: NDB and JS by the same bins, and every other score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from data.errors import UserError
from data.partitions import Partitions
from eval.bins import BinCounts, BinSettings
from eval.drawn import DrawnPartitions, Generator
from eval.evaluate import Evaluation, Rule, evaluate_counts
from eval.likelihood import LogLikelihood, summarise
from eval.measure import local_pass
from eval.metrics.manifold import Memorisation, compare_distances
from eval.observed import Digest, Extent, Nearest, Pass, Sketch
from eval.reference import Reference, fit_reference
from eval.scores import Score, ScoreSettings, Summary, scores_of

# Samples whose nearest reference sample is searched, and as many held-out ones.
_QUERIES = 1000


@dataclass(frozen=True)
class Copies:
    """The search for copies among some samples `[m]`.

    Positions of these and of the reference sample nearest to each, the distances between, and, where there is held-out
    data, the comparison with that.
    """

    samples: np.ndarray
    reference: np.ndarray
    distances: np.ndarray
    found: Memorisation | None = None


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


def judge_set(
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
    held_out: tuple[Partitions, Pass] | str | None = None,
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
        held_out: data that nobody trained on, to tell whether samples are nearer to the reference than chance; or why
            there is none.
        stored: the pass keeps what it found of each partition: subsets then may not depend on the set's size.

    Raises:
        UserError: samples that do not fit the reference, too few of them, or a score that was named explicitly and
            cannot be taken.
    """
    digest = {} if samples.fingerprint else {"digest": Digest()}
    counts = {f"bins {i}": BinCounts(bins) for i, bins in enumerate(reference.bins)}
    search = "memorisation" in scores.names and over_reference is not None
    n = None if stored else samples.n
    queries = {"queries": Sketch(_QUERIES, n, scores.seed)} if search else {}
    seen = over({"extent": Extent(), "summary": Summary(scores, n), **counts, **digest, **queries})
    fingerprint = samples.fingerprint or seen["digest"].hexdigest()
    words = scale or f"reference {reference.scale}; samples {samples.scale}"
    facts = {"samples_fingerprint": fingerprint, **(extras or {})}
    evaluations = [
        evaluate_counts(
            *(bins, seen[f"bins {i}"], seen["extent"]),
            name=name,
            scale=words,
            rule=rule,
            levels=samples.levels,
            extras={**facts, **({} if bins.labelled_by is None else {"labelled_by": asdict(bins.labelled_by)})},
        )
        for i, bins in enumerate(reference.bins)
    ]
    copies = None
    memorised: Memorisation | str | None = "the reference's samples are not at hand: give the set that it was fitted to"
    if search and over_reference is not None:
        why = held_out if isinstance(held_out, str) else None
        copies = _copies(seen["queries"], over_reference, None if isinstance(held_out, str) else held_out, scores.seed)
        memorised = copies.found or why
    try:
        found = scores_of(reference.summary, seen["summary"], memorised, reference.space.name)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return Row(name, samples, evaluations, found, log_likelihood, copies)


def _copies(queries: Sketch, over_reference: Pass, held_out: tuple[Partitions, Pass] | None, seed: int) -> Copies:
    own, positions = queries.least(_QUERIES)
    observers = {"own": Nearest(own)}
    if held_out is not None:
        others, over = held_out
        known = over({"queries": Sketch(_QUERIES, others.n, seed)})["queries"]
        observers["known"] = Nearest(known.least(_QUERIES)[0])
    seen = over_reference(observers)
    distances, nearest = np.sqrt(seen["own"].distances), seen["own"].positions
    found = compare_distances(distances, np.sqrt(seen["known"].distances), nearest) if held_out else None
    return Copies(positions, nearest, distances, found)


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
    models: Mapping[str, Generator],
    settings: BinSettings,
    *,
    n_samples: int,
    seed: int,
    rule: Rule,
    scores: ScoreSettings,
    on_model: Callable[[int, str], None] = lambda done, name: None,
) -> Comparison:
    """Fits bins to the reference and judges the held-out data and every model by them.

    Args:
        data: reference and held-out samples.
        models: by the name they get in tables.
        settings: of the bins.
        n_samples: samples drawn from each model, with `seed`.
        rule: which bins are flagged.
        scores: what else is measured.
        on_model: called with (models done, next name), for progress.

    Raises:
        UserError: see `fit_reference` and `judge_set`.
    """
    over = local_pass(data.reference)
    reference = fit_reference(data.reference, over, [settings], scores)
    shape, flat = reference.bins[0].shape, data.density.reshape(len(data.density), -1)
    held = (data.held_out, local_pass(data.held_out))
    scale = reference.scale
    rows = [judge_set(*held, reference, name=data.held_out_name, scale=scale, rule=rule, scores=scores)]
    drawn = scale if data.levels is None else f"{scale}; samples put back on the pixels' grid"
    for done, (name, model) in enumerate(models.items()):
        on_model(done, name)
        likelihood = None
        if model.is_density:
            dimensions = flat.shape[1] if data.levels else None
            likelihood = summarise(model.log_prob(flat), n_dimensions=dimensions, levels=data.levels or 256)
        samples = DrawnPartitions(
            partial(_itself, model), n_samples, seed, name=name, identity=name, shape=shape, levels=data.levels
        )
        rows.append(
            judge_set(
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


def _itself(model: Generator) -> Generator:
    return model
