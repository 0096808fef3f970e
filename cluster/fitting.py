"""From a source to a trained model: pack, train, split. Work that died goes on with the same command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.hierarchy import component_folder, flatten, route_samples, save_trained, train_sub_mixtures
from cluster.job import Job, connect, exclusive
from cluster.models import settle_mixture
from cluster.progress import Stages, console, remote_progress
from cluster.recipe import Recipe
from cluster.session import probe
from data import augment, storage
from data.errors import UserError
from data.manifest import MANIFEST, Manifest, load_manifest, verify
from data.shards import pack
from data.sources import Source, open_source
from trainer import tracking
from trainer.checkpoint import load_model
from trainer.settings import TrainingSettings
from trainer.tracking import SubMixtureRuns


@dataclass
class Trained:
    """What training leaves: where it happened, the packed data, the model (and the root of a hierarchy).

    `root` are the closing metrics of the root, or of the model where there is no hierarchy.
    """

    folder: str
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
def trained_model(
    recipe: Recipe,
    out: str,
    ray_address: str | None,
    *,
    quiet: bool,
    began: float | None = None,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> Iterator[Trained]:
    """Packs and trains; yields inside of the Ray session and of the MLflow run.

    `check` sees the packed data before training begins: what would fail afterwards is better refused then.
    """
    folder = storage.check_url(out)
    uri = tracking.resolve_uri(recipe.tracking.uri)
    stages = Stages(quiet)
    if began is not None:
        stages.seconds["load libraries"] = time.perf_counter() - began
    with ExitStack() as stack:
        stack.enter_context(exclusive(folder))
        # What can be refused is refused before anything is written or started.
        if ray_address:
            probe(ray_address)
        tracking.probe(uri)
        with stages.stage("pack shards", unit="samples") as advance:
            manifest = _packed(recipe, folder, advance)
        settle_mixture(recipe, folder, uri)
        _can_be_trained(recipe, manifest)
        check(manifest)
        job = Job.find(folder, recipe)
        if job.run_id:
            console.print(f"going on with job {job.id}")
        with stages.stage("start Ray and MLflow"):
            run_id = connect(recipe, job, folder, uri, ray_address, stack)
            job.begin(folder)
            job.use_data(folder, manifest.fingerprint)
        tracking.log_dataset(uri, run_id, name=manifest.name, source=manifest.base, fingerprint=manifest.fingerprint)
        work = job.work(folder)
        place = storage.join(work, "root")
        name = f"train {recipe.model.noun}"
        root = _train_on_workers(name, recipe, manifest, recipe.training, place, job, uri, stages)
        root_model = storage.join(place, "model")
        final = _split(recipe, manifest, work, job, uri, stages) if recipe.hierarchy else root_model
        yield Trained(folder, job, uri, manifest, root, root_model, final, stages)


def train_job(recipe: Recipe, out: str, *, ray_address: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Packs and trains; the model is left in `out`/model. Returns its place, the MLflow run and seconds per stage.

    Raises:
        UserError: as `run_job`.
    """
    with trained_model(recipe, out, ray_address, quiet=quiet) as trained:
        publish_model(recipe, trained)
        trained.job.finished = True
        trained.job.save(trained.folder)
        return {
            "model": storage.join(trained.folder, "model"),
            "mlflow_tracking_uri": trained.uri,
            "mlflow_run_id": trained.run_id,
            "seconds": trained.stages.seconds,
        }


def publish_model(recipe: Recipe, trained: Trained, scores: Mapping[str, float] | None = None) -> None:
    """Leaves the final model in `out`/model, with what it reached on test data."""
    target = storage.join(trained.folder, "model")
    model, _ = load_model(trained.model)
    save_trained(target, model, recipe, trained.manifest, scores)


def _can_be_trained(recipe: Recipe, manifest: Manifest) -> None:
    """Refuses, before Ray starts, data that the workers would refuse."""
    augment.check(recipe.training.augment, tuple(manifest.shape))
    recipe.model.check(manifest, recipe.initialisation)


def _packed(recipe: Recipe, folder: str, advance: Any) -> Manifest:
    """The packed shards: a pack that is given, one that was made before from the same source, or a new one."""
    place = storage.check_url(recipe.data.shards or storage.join(folder, "shards"))
    if recipe.data.source is None:
        return load_manifest(place)
    source = open_source(recipe.data.source, recipe.data.options)
    if storage.exists(storage.join(place, MANIFEST)):
        manifest = load_manifest(place)
        if _is_of(manifest, source):
            try:
                verify(manifest)
                return manifest
            except UserError as error:
                if recipe.data.shards:
                    raise
                console.print(f"{error}: doing so")  # our own shards: made again from their source
        elif recipe.data.shards:
            raise UserError(
                f"{place} holds a pack of {manifest.source.spec} that was made with other options or from other files: "
                "remove it, set data.shards to another folder, or set data.source=null to use it as it is"
            )
    return pack(
        source,
        place,
        rows_per_block=recipe.data.rows_per_block,
        progress=lambda done, total: advance(done, total=total),
    )


def _is_of(manifest: Manifest, source: Source) -> bool:
    """Whether a pack was made of this source as it is now."""
    packed = {name: record.samples for name, record in manifest.splits.items()}
    origin = manifest.source
    return (origin.spec, origin.options, origin.stamp, manifest.shape, manifest.dtype, manifest.levels, packed) == (
        *(source.spec, source.options, source.stamp, source.shape, source.dtype, source.levels, source.splits),
    )


def _train_on_workers(
    name: str,
    recipe: Recipe,
    manifest: Manifest,
    training: TrainingSettings,
    folder: str,
    job: Job,
    uri: str,
    stages: Stages,
    **options: Any,
) -> dict[str, Any]:
    """`run_training` as a stage of the job; what it found is kept in `folder`, and not done twice."""
    from cluster.training import run_training

    result_url = storage.join(folder, "result.json")
    if storage.exists(result_url):
        return dict(json.loads(storage.read_bytes(result_url)))
    unit = "steps" if training.method == "sgd" else "passes"
    with (
        stages.stage(name, total=training.length, unit=unit) as advance,
        remote_progress(advance) as board,
    ):
        result = run_training(
            recipe,
            manifest,
            training,
            folder=folder,
            job=job.id,
            tracking_uri=uri,
            run_id=job.run_id,
            board=board,
            **options,
        )
    # Told apart, so that nobody takes the start of worker processes for training.
    ray_seconds = result.pop("ray_seconds")
    workers = "start and stop workers"
    stages.seconds[workers] = stages.seconds.get(workers, 0.0) + ray_seconds
    stages.seconds[name] = stages.seconds.pop(name) - ray_seconds
    storage.write_text(result_url, json.dumps(result))
    return result


def _split(recipe: Recipe, manifest: Manifest, work: str, job: Job, uri: str, stages: Stages) -> str:
    """Routes, trains the sub-mixtures, polishes, and returns the folder of the flat model."""
    root, target, place = storage.join(work, "root", "model"), storage.join(work, "flat"), storage.join(work, "split")
    if not storage.exists(storage.join(target, "model.json")):
        routing = storage.join(place, "routing.json")
        if storage.exists(routing):
            folders = {k: component_folder(place, k) for k in json.loads(storage.read_bytes(routing))}
        else:
            with stages.stage("route samples", unit="tasks") as advance:
                folders = route_samples(recipe, manifest, root, place, advance)
            storage.write_text(routing, json.dumps(sorted(folders)))
        record = SubMixtureRuns(uri, str(job.run_id))
        with stages.stage("train sub-mixtures", unit="samples") as advance:
            train_sub_mixtures(recipe, folders, root, advance, record.add_component)
        record.close()
        save_trained(target, flatten(root, folders, recipe.splitting.noise_prior_count), recipe, manifest)
    polish = recipe.splitting.polish
    if polish is None or not polish.length:
        return target
    same = {name: getattr(recipe.training, name) for name in ("seed", "dequantise", "augment")}
    polish = polish.model_copy(update=same)
    place, name = storage.join(work, "polish"), "polish flat mixture"
    _train_on_workers(name, recipe, manifest, polish, place, job, uri, stages, start=target, prefix="polish")
    return storage.join(place, "model")
