"""The main job: a trained model, its scores beside baselines, the registered version, the report and the summary."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from types import ModuleType
from typing import Any

from cluster import classification, coverage
from cluster.fitting import Trained, publish_model, trained_model
from cluster.recipe import Recipe
from cluster.verdict import Verdict
from data import storage
from deploy.registry import REFERENCE_ARTIFACT, Registered, register_model
from eval import figures
from eval.report import ReportFigure, ReportSection, ReportTable, render_report
from trainer import tracking
from trainer.checkpoint import model_class


def run_job(
    recipe: Recipe, out: str, *, ray_address: str | None = None, quiet: bool = False, began: float | None = None
) -> dict[str, Any]:
    """Runs the whole job and returns what it also writes to `out`/summary.json (and the headline table).

    Args:
        recipe: what to do.
        out: path or URL of a folder that all nodes reach: shards, working files, model, reference, report, summary.
        ray_address: an existing cluster; None starts one here.
        quiet: no progress bars.
        began: when the process began, by `time.perf_counter`, so that loading libraries is accounted for.

    Raises:
        UserError: anything that the user can mend; the run is then marked as failed in MLflow.
    """
    judging = _judging(recipe)
    with trained_model(
        recipe,
        out,
        ray_address,
        quiet=quiet,
        began=began,
        check=lambda manifest: judging.can_be_judged(recipe, manifest),
    ) as trained:
        stages = trained.stages
        with stages.stage("evaluate", unit=judging.UNIT) as advance:
            verdict: Verdict = judging.judge(recipe, trained, advance)
        publish_model(recipe, trained, verdict.metrics)
        verdict.save(trained.folder)
        with stages.stage("register"):
            registered = _register(recipe, trained, verdict)
        with stages.stage("report"):
            _write_report(recipe, trained, verdict, registered)
        return _summarise(recipe, trained, registered, verdict)


def _judging(recipe: Recipe) -> ModuleType:
    """How this recipe's model is judged: by what it can do."""
    return coverage if hasattr(model_class(recipe.model.family), "sample") else classification


def _register(recipe: Recipe, trained: Trained, verdict: Verdict) -> Registered:
    """Registers the model once per job, however often the job is taken up again."""
    job = trained.job
    if job.registered:
        return Registered(**job.registered)
    logger = tracking.RunLogger(trained.uri, trained.run_id)
    logger.metrics({f"eval/{name}": value for name, value in verdict.metrics.items()})
    logger.flush()
    if "bins_fingerprint" in verdict.protocol:  # what later models of this name are judged by
        with storage.local_copy(storage.join(trained.folder, "reference")) as reference:
            tracking.log_folder(trained.uri, trained.run_id, str(reference), REFERENCE_ARTIFACT)
    with storage.local_copy(storage.join(trained.folder, "model")) as model:
        registered = register_model(
            str(model),
            name=recipe.model_name,
            alias=recipe.registry.alias,
            tracking_uri=trained.uri,
            run_id=trained.run_id,
            scores=verdict.metrics,
            lineage={"recipe": recipe.name, "recipe.fingerprint": recipe.fingerprint(), "data": trained.manifest.name},
        )
    job.registered = asdict(registered)
    job.save(trained.folder)
    return registered


def _write_report(recipe: Recipe, trained: Trained, verdict: Verdict, registered: Registered) -> None:
    protocol = {
        **verdict.protocol,
        "model": registered.uri,
        "model_version": registered.version,
        "mlflow_run": trained.run_id,
    }
    seconds = [[stage, f"{value:.1f}"] for stage, value in trained.stages.seconds.items()]
    note = "On the terminal the bar of a training counts the start and stop of its workers, which is told apart here."
    timing = ReportTable("Stages", ["stage", "seconds"], seconds, note)
    sections = verdict.sections() + _training_sections(recipe, trained)
    html = render_report(f"manymodes: {recipe.name}", verdict.table, sections, protocol, timing, verdict.lead)
    storage.write_text(storage.join(trained.folder, "report.html"), html)
    pictures = {
        f"{number:02d}-{re.sub('[^a-z0-9]+', '-', figure.title.lower()).strip('-')}.png": figure.png
        for number, figure in enumerate((figure for section in sections for figure in section.figures), 1)
    }
    tracking.log_files(trained.uri, trained.run_id, pictures, "pictures")


def _training_sections(recipe: Recipe, trained: Trained) -> list[ReportSection]:
    history = trained.root["history"]
    if len(history) < 2:
        return []
    steps, losses = zip(*history)
    unit = "step" if recipe.training.method == "sgd" else "pass over the data"
    noun, loss = recipe.model.noun.capitalize(), recipe.model.loss.capitalize()
    label = f"loss ({recipe.model.loss_unit})" if recipe.model.loss_unit else "loss"
    curve = figures.training_curve(list(steps), list(losses), title=noun, label=label, unit=unit)
    caption = f"{loss} per sample." if recipe.model.loss_unit else f"{loss}."
    return [ReportSection("Training", "", [ReportFigure("Loss", curve, caption, "Loss")])]


def _summarise(recipe: Recipe, trained: Trained, registered: Registered, verdict: Verdict) -> dict[str, Any]:
    """Writes summary.json and records it with the report; the job is finished then."""
    folder, job, uri = trained.folder, trained.job, trained.uri
    summary = {
        "recipe": recipe.name,
        "job": job.id,
        "model_uri": registered.uri,
        "model_version": registered.version,
        "mlflow_tracking_uri": uri,
        "mlflow_run_id": job.run_id,
        "metrics": verdict.metrics,
        "models": verdict.models,
        "seconds": {name: round(value, 2) for name, value in trained.stages.seconds.items()},
        "report": storage.join(folder, "report.html"),
    }
    text = json.dumps(summary, indent=1)
    html = storage.read_bytes(storage.join(folder, "report.html")).decode()
    tracking.log_artifact_text(uri, str(job.run_id), html, "report.html")
    tracking.log_artifact_text(uri, str(job.run_id), text, "summary.json")
    storage.write_text(storage.join(folder, "summary.json"), text)
    job.finished = True
    job.save(folder)
    return {**summary, "table": verdict.table}
