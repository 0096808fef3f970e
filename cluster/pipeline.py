"""The main job: a trained model, its scores beside baselines, the registered version, the report and the summary."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.fitting import Trained, publish_model, trained_model
from cluster.models import LocalModel
from cluster.progress import console
from cluster.recipe import Recipe
from data import storage
from data.errors import UserError
from data.manifest import Manifest
from data.partitions import PackPartitions
from data.stream import read_blocks
from deploy.registry import Registered, register_model
from eval import figures
from eval.baselines import fit_gaussian_mixture
from eval.comparison import Comparison, JudgedData, compare, report_sections
from eval.drawn import Density
from eval.evaluate import Rule
from eval.report import ReportFigure, ReportSection, ReportTable, render_report
from eval.scores import ScoreSettings
from trainer import tracking
from trainer.checkpoint import load_model
from trainer.settings import TRAIN_SPLIT

TEST_SPLIT = "test"


def run_job(
    recipe: Recipe, out: str, *, ray_address: str | None = None, quiet: bool = False, began: float | None = None
) -> dict[str, Any]:
    """Runs the whole job and returns what it also writes to `out`/summary.json (and the headline table).

    Args:
        recipe: what to do.
        out: local folder for shards, working files, model, bins, report and summary.
        ray_address: an existing cluster; None starts one here.
        quiet: no progress bars.
        began: when the process began, by `time.perf_counter`, so that loading libraries is accounted for.

    Raises:
        UserError: anything that the user can mend; the run is then marked as failed in MLflow.
    """
    with trained_model(
        recipe, out, ray_address, quiet=quiet, began=began, check=lambda manifest: _can_be_judged(recipe, manifest)
    ) as trained:
        stages = trained.stages
        with stages.stage("evaluate", unit="models") as advance:
            comparison, name = _evaluate(recipe, trained, advance)
        publish_model(recipe, trained)
        comparison.reference.save(str(trained.folder / "reference"))
        metrics = _metrics(comparison, name)
        with stages.stage("register"):
            registered = _register(recipe, trained, metrics)
        with stages.stage("report"):
            _write_report(recipe, trained, comparison, name, registered)
        return _summarise(recipe, trained, registered, metrics, comparison)


def _can_be_judged(recipe: Recipe, manifest: Manifest) -> None:
    """Refuses, before training, data that the evaluation would refuse after it."""
    for split in (TRAIN_SPLIT, TEST_SPLIT):
        n, bins = manifest.n_samples(split), recipe.evaluation.bins
        if min(n, bins.max_samples or n) < bins.n_bins:
            raise UserError(
                f"{manifest.name}: the {split} split has {n} samples for {bins.n_bins} bins: use more data, or lower "
                "evaluation.bins.n_bins"
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
    models: dict[str, Density] = {}
    components = recipe.model.n_components
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
    models[f"root MFA, K={components}"] = LocalModel(trained.root_model)
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


def _register(recipe: Recipe, trained: Trained, metrics: dict[str, float]) -> Registered:
    """Registers the model once per job, however often the job is taken up again."""
    job = trained.job
    if job.registered:
        return Registered(**job.registered)
    logger = tracking.RunLogger(trained.uri, trained.run_id)
    logger.metrics({f"eval/{name}": value for name, value in metrics.items()})
    logger.flush()
    registered = register_model(
        str(trained.folder / "model"),
        name=recipe.model_name,
        alias=recipe.registry.alias,
        tracking_uri=trained.uri,
        run_id=trained.run_id,
        scores=metrics,
    )
    job.registered = asdict(registered)
    job.save(trained.folder)
    return registered


def _model_sections(trained: Trained, recipe: Recipe) -> list[ReportSection]:
    model, _ = load_model(trained.model)
    shape, root = trained.manifest.shape, trained.root
    loadings = model.factor_loadings.detach().numpy()
    picture = figures.components(
        model.means.detach().numpy().reshape(-1, *shape),
        model.noise_variance.detach().sqrt().numpy().reshape(-1, *shape),
        loadings.reshape(len(loadings), *shape, -1),
        model.mixing_coefficients.detach().numpy(),
    )
    sections = [
        ReportSection(
            "Components",
            "The components with the largest mixing coefficients: mean, noise, and the directions of the factors.",
            [ReportFigure("Components", picture, "Mean μ, noise, and μ ± A for each factor.", "Component pictures")],
        )
    ]
    if len(root["history"]) > 1:
        steps, losses = zip(*root["history"])
        unit = "step" if recipe.training.method == "sgd" else "pass over the data"
        curve = figures.training_curve(
            list(steps), list(losses), title="Root mixture", label="loss (nats per sample)", unit=unit
        )
        sections.append(
            ReportSection("Training", "", [ReportFigure("Loss", curve, "Negative log-posterior per sample.", "Loss")])
        )
    return sections


def _write_report(
    recipe: Recipe, trained: Trained, comparison: Comparison, name: str, registered: Registered
) -> None:
    row = comparison.row(name)
    held_out = comparison.rows[0]
    sections = report_sections(comparison, row, (held_out.name, held_out.samples))
    sections += _model_sections(trained, recipe)
    protocol = {
        **row.evaluation.protocol,
        "model": registered.uri,
        "model_version": registered.version,
        "mlflow_run": trained.run_id,
    }
    seconds = [[stage, f"{value:.1f}"] for stage, value in trained.stages.seconds.items()]
    timing = ReportTable("Stages", ["stage", "seconds"], seconds)
    result = row.evaluation.result
    lead = f"{name}, trained on {comparison.reference.name}: {result.ndb} of {result.bins} bins differ from the data."
    html = render_report(f"manymodes: {recipe.name}", comparison.table(), sections, protocol, timing, lead)
    storage.write_text(str(trained.folder / "report.html"), html)


def _summarise(
    recipe: Recipe, trained: Trained, registered: Registered, metrics: dict[str, float], comparison: Comparison
) -> dict[str, Any]:
    """Writes summary.json and records it with the report; the job is finished then."""
    folder, job, uri = trained.folder, trained.job, trained.uri
    summary = {
        "recipe": recipe.name,
        "job": job.id,
        "model_uri": registered.uri,
        "model_version": registered.version,
        "mlflow_tracking_uri": uri,
        "mlflow_run_id": job.run_id,
        "metrics": metrics,
        "models": [
            row.to_dict() for row in comparison.rows
        ],
        "seconds": {name: round(value, 2) for name, value in trained.stages.seconds.items()},
        "report": str(folder / "report.html"),
    }
    text = json.dumps(summary, indent=1)
    tracking.log_artifact_text(uri, str(job.run_id), (folder / "report.html").read_text(), "report.html")
    tracking.log_artifact_text(uri, str(job.run_id), text, "summary.json")
    storage.write_text(str(folder / "summary.json"), text)
    job.finished = True
    job.save(folder)
    return {**summary, "table": comparison.table()}
