"""The main job: pack, train, split, evaluate, register, report. Work that died goes on with the same command."""

from __future__ import annotations

import json
import platform
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.hierarchy import component_folder, flatten, route_samples, train_sub_mixtures
from cluster.models import LocalModel
from cluster.progress import Stages, console, remote_progress
from cluster.recipe import Recipe
from cluster.session import ray_session, require_resources
from data import storage
from data.errors import UserError
from data.manifest import Manifest, load_manifest, verify
from data.shards import pack
from data.sources import Source, open_source
from data.stream import read_blocks
from deploy.registry import Registered, register_model
from eval import figures
from eval.baselines import fit_gaussian_mixture
from eval.comparison import Comparison, Density, JudgedData, compare, report_sections
from eval.report import ReportFigure, ReportSection, ReportTable, render_report
from trainer import tracking
from trainer.checkpoint import load_model, save_model
from trainer.settings import TRAIN_SPLIT

TEST_SPLIT = "test"


@dataclass
class Job:
    """A job's memory of itself, `job.json` in the output folder: what makes a second call go on or start anew."""

    id: str
    recipe: str  # fingerprint
    run_id: str | None = None
    registered: dict[str, Any] | None = None
    finished: bool = False

    @classmethod
    def find(cls, out: Path, recipe: Recipe) -> Job:
        """The unfinished job of this recipe in `out`, or a new one; writes nothing."""
        path = out / "job.json"
        if path.exists():
            with suppress(ValueError, TypeError):
                last = cls(**json.loads(path.read_text()))
                if not last.finished and last.recipe == recipe.fingerprint():
                    return last
        return cls(time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6], recipe.fingerprint())

    def begin(self, out: Path) -> None:
        """Writes `job.json`, and removes the working files of earlier jobs."""
        self.save(out)
        if (out / "work").is_dir():
            for old in (out / "work").iterdir():
                if old.name != self.id:
                    storage.remove(str(old))

    def save(self, out: Path) -> None:
        """Writes `job.json`."""
        storage.write_text(str(out / "job.json"), json.dumps(asdict(self), indent=1))


@dataclass
class Trained:
    """What training leaves: where it happened, the packed data, and the root's closing metrics."""

    folder: Path
    job: Job
    uri: str
    manifest: Manifest
    root: dict[str, Any]
    root_model: str
    model: str
    stages: Stages

    @property
    def run_id(self) -> str:
        """The job's MLflow run."""
        return str(self.job.run_id)


@contextmanager
def _training(
    recipe: Recipe, out: str, ray_address: str | None, quiet: bool, began: float | None = None
) -> Iterator[Trained]:
    """Packs and trains; yields inside of the Ray session and of the MLflow run."""
    folder = storage.local_folder(out)
    uri = tracking.resolve_uri(recipe.tracking.uri)
    stages = Stages(quiet)
    if began is not None:
        stages.seconds["load libraries"] = time.perf_counter() - began
    with ExitStack() as stack:
        source = open_source(recipe.data.source, recipe.data.options)
        job = Job.find(folder, recipe)
        with stages.stage("start Ray and MLflow"):
            run_id = _connect(recipe, job, uri, ray_address, stack)
            job.begin(folder)
        with stages.stage("pack shards", unit="samples") as advance:
            manifest = _pack(recipe, source, folder, advance)
        tracking.log_dataset(uri, run_id, name=manifest.name, source=manifest.base, fingerprint=manifest.fingerprint)
        work = str(folder / "work" / job.id)
        root = _train_root(recipe, manifest, work, job, uri, stages)
        root_model = storage.join(work, "root", "model")
        final = _split(recipe, manifest, work, stages) if recipe.hierarchy else root_model
        yield Trained(folder, job, uri, manifest, root, root_model, final, stages)


def train_job(recipe: Recipe, out: str, *, ray_address: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Packs and trains; the model is left in `out`/model. Returns its place, the MLflow run and seconds per stage.

    Raises:
        UserError: as `run_job`.
    """
    with _training(recipe, out, ray_address, quiet) as trained:
        _publish_model(recipe, trained)
        trained.job.finished = True
        trained.job.save(trained.folder)
        return {
            "model": str(trained.folder / "model"),
            "mlflow_tracking_uri": trained.uri,
            "mlflow_run_id": trained.run_id,
            "seconds": trained.stages.seconds,
        }


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
    with _training(recipe, out, ray_address, quiet, began) as trained:
        stages = trained.stages
        with stages.stage("evaluate", unit="models") as advance:
            comparison, name = _evaluate(recipe, trained, advance)
        _publish_model(recipe, trained)
        comparison.bins.save(str(trained.folder / "bins"))
        metrics = _metrics(comparison, name)
        with stages.stage("register"):
            registered = _register(recipe, trained, metrics)
        with stages.stage("report"):
            _write_report(recipe, trained, comparison, name, registered)
        return _summarise(recipe, trained, registered, metrics, comparison)


def _publish_model(recipe: Recipe, trained: Trained) -> None:
    target = str(trained.folder / "model")
    save_model(target, load_model(trained.model)[0], recipe.model.family, trained.manifest)


def _connect(recipe: Recipe, job: Job, uri: str, ray_address: str | None, stack: ExitStack) -> str:
    """Starts Ray and the MLflow run at once; returns the run's id. Both are closed with the stack."""
    scaling = recipe.scaling
    with ThreadPoolExecutor(1) as side:
        # MLflow first: a run that Ray then refuses is marked as failed, a Ray session that MLflow refuses just ends.
        starting = side.submit(_tracked_run, job, recipe, uri)
        session = ExitStack()
        try:
            session.enter_context(ray_session(ray_address, scaling.workers * scaling.cpus_per_worker))
        except BaseException:
            with suppress(UserError):
                tracking.finish_run(uri, starting.result(), failed=True)
            raise
        stack.push(session)
        job.run_id = starting.result()
    stack.enter_context(_closing_run(uri, job.run_id))
    require_resources(scaling.workers * scaling.cpus_per_worker, scaling.workers * scaling.gpus_per_worker)
    return job.run_id


def _tracked_run(job: Job, recipe: Recipe, uri: str) -> str:
    """The MLflow run of this job: the one that it began, if the server still has it, else a new one."""
    if job.run_id and tracking.resume_run(uri, job.run_id):
        return job.run_id
    tags = {**tracking.versions(), "job": job.id, "recipe": recipe.name, "host.python": platform.python_version()}
    commit = _commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    params = _flat(recipe.model_dump(mode="json"))
    return tracking.start_run(uri, recipe.tracking.experiment, f"{recipe.name}-{job.id}", params=params, tags=tags)


def _commit() -> str | None:
    """The commit of the code, where it runs from a git checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in document.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


@contextmanager
def _closing_run(uri: str, run_id: str) -> Iterator[None]:
    """Marks the MLflow run as finished or failed, whatever happens."""
    try:
        yield
    except BaseException:
        with suppress(UserError):
            tracking.finish_run(uri, run_id, failed=True)
        raise
    tracking.finish_run(uri, run_id)


def _pack(recipe: Recipe, source: Source, folder: Path, advance: Any) -> Manifest:
    """The packed shards: those that are there, if they are of this source and whole, else new ones."""
    place = recipe.data.shards or str(folder / "shards")
    if storage.exists(storage.join(storage.check_url(place), "manifest.json")):
        manifest = load_manifest(place)
        same = (manifest.source.spec, manifest.source.options) == (source.spec, source.options)
        if same and {name: record.samples for name, record in manifest.splits.items()} == source.splits:
            try:
                verify(manifest)
                return manifest
            except UserError as error:
                if recipe.data.shards:
                    raise
                console.print(f"{error}: doing so")  # our own shards: made again from their source
        elif recipe.data.shards:
            raise UserError(
                f"{place} holds a pack of {manifest.source.spec} with other options: remove it, or set data.shards to "
                "another folder"
            )
    return pack(
        source,
        place,
        rows_per_block=recipe.data.rows_per_block,
        progress=lambda done, total: advance(done, total=total),
    )


def _train_root(
    recipe: Recipe, manifest: Manifest, work: str, job: Job, uri: str, stages: Stages
) -> dict[str, Any]:
    from cluster.training import run_training

    result_url = storage.join(work, "root", "result.json")
    if storage.exists(result_url):
        return dict(json.loads(storage.read_bytes(result_url)))
    with (
        stages.stage("train root mixture", total=recipe.training.steps, unit="steps") as advance,
        remote_progress(advance) as board,
    ):
        result = run_training(
            recipe,
            manifest,
            folder=storage.join(work, "root"),
            job=job.id,
            tracking_uri=uri,
            run_id=job.run_id,
            board=board,
        )
    # Told apart, so that nobody takes the start of worker processes for training.
    name, ray_seconds = "train root mixture", result.pop("ray_seconds")
    stages.seconds["start and stop workers"] = ray_seconds
    stages.seconds[name] = stages.seconds.pop(name) - ray_seconds
    storage.write_text(result_url, json.dumps(result))
    return result


def _split(recipe: Recipe, manifest: Manifest, work: str, stages: Stages) -> str:
    """Routes, trains the sub-mixtures, and returns the folder of the flat model."""
    root, target, place = storage.join(work, "root", "model"), storage.join(work, "flat"), storage.join(work, "split")
    if storage.exists(storage.join(target, "model.json")):
        return target
    routing = storage.join(place, "routing.json")
    if storage.exists(routing):
        folders = {k: component_folder(place, k) for k in json.loads(storage.read_bytes(routing))}
    else:
        with stages.stage("route samples", unit="tasks") as advance:
            folders = route_samples(recipe, manifest, root, place, advance)
        storage.write_text(routing, json.dumps(sorted(folders)))
    with stages.stage("train sub-mixtures", unit="samples") as advance:
        train_sub_mixtures(recipe, folders, root, advance)
    save_model(target, flatten(root, folders), recipe.model.family, manifest)
    return target


def _evaluate(recipe: Recipe, trained: Trained, advance: Any) -> tuple[Comparison, str]:
    """Judges baselines, root and final model; returns the comparison and the final model's name in it."""
    settings, manifest = recipe.evaluation, trained.manifest
    noise = settings.seed if recipe.training.dequantises(manifest.levels) else None
    data = JudgedData(
        _rows(manifest, TRAIN_SPLIT, None),
        _rows(manifest, TEST_SPLIT, None),
        _rows(manifest, TEST_SPLIT, noise),
        manifest.levels if noise is not None else None,
        f"{manifest.name} ({TRAIN_SPLIT} split)",
        manifest.fingerprint,
    )
    models: dict[str, Density] = {}
    components = recipe.model.n_components
    if settings.baselines:
        train = _rows(manifest, TRAIN_SPLIT, noise).reshape(manifest.n_samples(TRAIN_SPLIT), -1)
        for kind in settings.baselines:
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
        z_threshold=settings.z_threshold,
        significance=settings.significance,
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


def _model_sections(trained: Trained) -> list[ReportSection]:
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
        curve = figures.training_curve(list(steps), list(losses), title="Root mixture", label="loss (nats per sample)")
        sections.append(
            ReportSection("Training", "", [ReportFigure("Loss", curve, "Negative log-posterior per sample.", "Loss")])
        )
    return sections


def _write_report(
    recipe: Recipe, trained: Trained, comparison: Comparison, name: str, registered: Registered
) -> None:
    row = comparison.row(name)
    sections = [*report_sections(comparison, name), *_model_sections(trained)]
    protocol = {
        **row.evaluation.protocol,
        "model": registered.uri,
        "model_version": registered.version,
        "mlflow_run": trained.run_id,
    }
    seconds = [[stage, f"{value:.1f}"] for stage, value in trained.stages.seconds.items()]
    timing = ReportTable("Stages", ["stage", "seconds"], seconds)
    result = row.evaluation.result
    lead = f"{name}, trained on {comparison.data.name}: {result.ndb} of {result.bins} bins differ from the data."
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
            {
                **row.evaluation.to_dict(),
                "log_likelihood": None if row.log_likelihood is None else row.log_likelihood.to_dict(),
            }
            for row in comparison.rows
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
