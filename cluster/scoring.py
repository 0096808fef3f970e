"""The `evaluate` command: scores any samples against any reference."""

from __future__ import annotations

import hashlib

from cluster.models import model_folder, open_model
from cluster.progress import Stages
from data import storage
from data.errors import UserError
from data.pixels import quantise
from data.samples import Samples, load_samples
from eval.bins import BinSettings, fit_bins
from eval.comparison import Row, report_sections
from eval.evaluate import Evaluation, evaluate_samples
from eval.report import ReportTable, render_report


def load_or_draw(
    place: str, *, split: str, n: int, seed: int, size: int | None, grey: bool | None, tracking_uri: str | None
) -> Samples:
    """The samples at a place (see `load_samples`), or `n` drawn from a model: models:/NAME@ALIAS or a run's folder.

    Raises:
        UserError: nothing usable there.
    """
    if not place.startswith("models:") and model_folder(place) is None:
        return load_samples(place, split=split, size=size, grey=grey)
    model = open_model(place, tracking_uri)
    levels = model.data.get("levels")
    x = quantise(model.sample(n, seed), levels)
    scale = "as drawn" if levels is None else f"drawn, put back on {levels} levels / {levels - 1}"
    return Samples(x, None, place, hashlib.sha256(x.tobytes()).hexdigest(), scale, levels)


def score_samples(
    samples: Samples,
    reference: Samples,
    settings: BinSettings,
    *,
    z_threshold: float | None,
    significance: float | None,
    report: str | None,
    stages: Stages,
) -> Evaluation:
    """NDB and JS of samples by bins fitted to a reference; writes an HTML report where one is asked for.

    Raises:
        UserError: samples that do not fit the reference, or fewer samples than bins.
    """
    shape, expected = samples.x.shape[1:], reference.x.shape[1:]
    if shape != expected:
        raise UserError(
            f"{samples.name} holds samples of shape {shape}, {reference.name} of {expected}: bring them to one shape"
        )
    if len(samples.x) < settings.n_bins:
        raise UserError(
            f"{samples.name} holds {len(samples.x)} samples for {settings.n_bins} bins: use more, or lower --bins"
        )
    with stages.stage("fit bins"):
        bins = fit_bins(
            reference.x, settings, reference_name=reference.name, reference_fingerprint=reference.fingerprint
        )
    with stages.stage("assign samples"):
        evaluation = evaluate_samples(
            bins,
            samples.x,
            name=samples.name,
            scale=f"reference {reference.scale}; samples {samples.scale}",
            z_threshold=z_threshold,
            significance=significance,
            extras={"samples_fingerprint": samples.fingerprint},
        )
    if report:
        with stages.stage("report"):
            row = Row(samples.name, None, evaluation, samples.x)
            result = evaluation.result
            table = ReportTable(
                "Scores",
                ["samples", "NDB", "expected by chance", "JS (nats)", "n"],
                [
                    [
                        *(samples.name, f"{result.ndb} of {result.bins}", f"{result.expected_by_chance:.1f}"),
                        *(f"{result.js:.4f}", result.n_samples),
                    ]
                ],
                f"NDB: bins that differ from the {result.n_reference:,} reference samples ({result.threshold}).",
            )
            sections = report_sections(bins, reference.x, [row], row, ("reference", reference.x))
            html = render_report(f"manymodes: {samples.name}", table, sections, evaluation.protocol)
            storage.write_text(report, html)
    return evaluation
