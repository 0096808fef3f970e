"""Runs a reproduction: every recipe with every seed as a Ray task, resumed where it stopped; its table and figures."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cluster.counting import result_of
from cluster.job import exclusive
from cluster.placement import require_resources
from cluster.progress import Stages, remote_progress
from cluster.recipe import Recipe, load_recipe
from cluster.reproductions.study import Column, Member, Outcome, Outcomes, Reproduction, Trained
from cluster.session import probe, ray_session
from data import storage
from data.errors import StorageError, UserError
from data.manifest import MANIFEST, Manifest, load_manifest
from data.shards import pack
from data.sources import open_source
from eval.report import ReportFigure, ReportSection, ReportTable, render_report
from trainer import tracking
from trainer.checkpoint import load_checkpoint, save_checkpoint, save_model
from trainer.engines import State
from trainer.fit import Fit, trained_tensors
from trainer.loop import Callbacks, LogEntry

MAX_RETRIES = 3
_BEFORE, _RESULT, _DRAWN = "start/", "result.json", "drawn.npz"


def reproduce(
    study: Reproduction,
    out: str,
    *,
    seeds: int | None = None,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    ray_address: str | None = None,
    workers: int | None = None,
    cpus_per_task: float = 1,
    gpus_per_task: float = 0,
    tracking_uri: str | None = None,
    quiet: bool = False,
) -> ReportTable:
    """Trains and measures what is not there yet, and writes table.csv, table.md, report.html and the figures to `out`.

    Every training leaves its result in `out`/MEMBER/seed-N and is not repeated while its recipe stays the same; one
    that was stopped goes on from its last checkpoint.

    Args:
        study: see `cluster.reproductions`.
        out: path or URL of a folder that all nodes reach. The table and figures there are of all members that are
            finished, also by earlier calls with the same overrides.
        seeds: 0 to seeds - 1 are trained; the study's own number if None.
        only: labels of members; all if empty.
        overrides: of all recipes; those of `model` of the members' alone.
        ray_address, workers, cpus_per_task, gpus_per_task: where the tasks run, and what each reserves.
        tracking_uri: MLflow's; a run of the study, with a child for every training.
        quiet: no progress bars.

    Raises:
        UserError: an unknown member, or what `load_recipe`, packing and training refuse.
    """
    out, uri, stages = storage.check_url(out), tracking.resolve_uri(tracking_uri), Stages(quiet)
    members = _chosen(study, only)
    # What is set of the members' models is not for what judges them.
    of_all = [text for text in overrides if not text.startswith("model.")]
    recipes = {each.label: _recipe(each, of_all, out) for each in study.prerequisites}
    recipes |= {each.label: _recipe(each, overrides, out) for each in members}
    numbers = range(study.seeds if seeds is None else seeds)
    with ExitStack() as stack:
        stack.enter_context(exclusive(out))
        if ray_address:
            probe(ray_address)
        tracking.probe(uri)
        packs = _packed(recipes, out, stages)
        built_on = [each for each in members if any("{out}" in text for text in each.overrides)]
        for each in (*study.prerequisites, *(each for each in members if each not in built_on)):
            recipes[each.label].model.check(packs[each.label], recipes[each.label].initialisation)
        with stages.stage("start Ray"):
            stack.enter_context(ray_session(ray_address, cpus_per_task * (workers or 1)))
        require_resources("the trainings", {"CPU": cpus_per_task, "GPU": gpus_per_task})
        params = {"members": ", ".join(recipes), "seeds": len(numbers), "overrides": " ".join(overrides)}
        run_id = tracking.start_run(uri, "manymodes", study.name, params=params, tags=tracking.versions())
        try:
            record = tracking.ChildRuns(uri, run_id)
            place = {"cpus": cpus_per_task, "gpus": gpus_per_task}
            jobs = [(each, recipes[each.label], packs[each.label], 0) for each in study.prerequisites]
            if jobs:
                _train(study, jobs, out, record, stages, "train what judges", **place)
            for each in built_on:
                recipes[each.label] = _recipe(each, overrides, out)  # anew: what it is built on is there now
                recipes[each.label].model.check(packs[each.label], recipes[each.label].initialisation)
            with stages.stage("prepare") as advance:
                study.prepare(out, {each.label: packs[each.label] for each in members}, lambda t: advance(0, text=t))
            jobs = [(each, recipes[each.label], packs[each.label], seed) for seed in numbers for each in members]
            outcomes = _train(study, jobs, out, record, stages, "train and measure", **place)
            with stages.stage("figures"):
                outcomes |= _finished_before(study, members, recipes, packs, overrides, out, numbers)
                shown = [member for member in study.members if outcomes.get(member.label)]
                table = _write(study, shown, outcomes, out, stages)
            tracking.log_files(uri, run_id, _files(out), "study")
        except BaseException:
            tracking.finish_run(uri, run_id, failed=True)
            raise
        tracking.finish_run(uri, run_id)
    return table


def member_folder(out: str, label: str, seed: int) -> str:
    """Where a training leaves its model and results."""
    return storage.join(out, re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-"), f"seed-{seed}")


def _chosen(study: Reproduction, only: Sequence[str]) -> list[Member]:
    known = {member.label: member for member in study.members}
    for label in only:
        if label not in known:
            raise UserError(f"{study.name} has no member {label!r}: choose among {'; '.join(known)}")
    return [known[label] for label in dict.fromkeys(only)] or list(study.members)


def _recipe(member: Member, overrides: Sequence[str], out: str = ".") -> Recipe:
    own = load_recipe(member.recipe, ["scaling.workers=1", *(_filled(text, out) for text in member.overrides)])
    try:
        for text in overrides:
            node: Any = own.model_dump(mode="json")
            *sections, _ = text.partition("=")[0].split(".")
            for number, name in enumerate(sections, 1):
                node = node.get(name, {}) if isinstance(node, dict) else {}
                if node is None:  # what it lacks would make another model of it
                    raise UserError(f"--set {text}: its recipe has no {'.'.join(sections[:number])}")
        return load_recipe(
            member.recipe, ["scaling.workers=1", *(_filled(text, out) for text in member.overrides), *overrides]
        )
    except UserError as error:
        raise UserError(f"member {member.label!r}: {error}; --only MEMBER chooses others") from error


def _filled(override: str, out: str) -> str:
    """An override with what {out} and {sha256 LABEL} stand for; a checksum is empty until its model is trained."""

    def checksum(found: re.Match[str]) -> str:
        weights = storage.join(member_folder(out, found[1], 0), "model", "weights.safetensors")
        return storage.sha256(weights) if storage.exists(weights) else ""

    return re.sub(r"\{sha256 ([^}]+)\}", checksum, override.replace("{out}", out))


def _packed(recipes: dict[str, Recipe], out: str, stages: Stages) -> dict[str, Manifest]:
    """Packs each source once."""
    packs: dict[str, Manifest] = {}
    places: dict[str, Manifest] = {}
    for label, recipe in recipes.items():
        data = recipe.data
        key = _data_key(recipe)
        if key not in places:
            if data.source is None:
                places[key] = load_manifest(storage.check_url(str(data.shards)))
            else:
                source = open_source(data.source, data.options)
                place = storage.join(out, "shards", f"{len(places)}-{re.sub(r'[^a-z0-9]+', '-', data.source.lower())}")
                places[key] = _reused(place, source) or _pack(source, place, data.rows_per_block, stages)
        packs[label] = places[key]
    return packs


def _data_key(recipe: Recipe) -> str:
    return json.dumps(recipe.data.model_dump(mode="json"), sort_keys=True)


def _reused(place: str, source: Any) -> Manifest | None:
    if not storage.exists(storage.join(place, MANIFEST)):
        return None
    found = load_manifest(place)
    origin = found.source
    same = (origin.spec, origin.options, origin.stamp) == (source.spec, source.options, source.stamp)
    return found if same else None


def _pack(source: Any, place: str, rows_per_block: int | None, stages: Stages) -> Manifest:
    with stages.stage("pack shards", unit="samples") as advance:
        return pack(
            source, place, rows_per_block=rows_per_block, progress=lambda done, total: advance(done, total=total)
        )


def _train(
    study: Reproduction,
    jobs: Sequence[tuple[Member, Recipe, Manifest, int]],
    out: str,
    record: tracking.ChildRuns,
    stages: Stages,
    stage: str,
    cpus: float,
    gpus: float,
) -> dict[str, list[Outcome]]:
    """The outcome of every job, by labels; jobs that were done before are read."""
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_RETRIES, retry_exceptions=[StorageError])(_run_one)
    steps = sum(recipe.training.length for _, recipe, _, _ in jobs)
    outcomes: dict[str, list[Outcome]] = {member.label: [] for member, _, _, _ in jobs}
    with stages.stage(stage, total=steps, unit="steps") as advance, remote_progress(advance) as board:
        waiting = {
            task.remote(study, member, recipe.model_dump(mode="json"), manifest.base, seed, out, board, gpus > 0): (
                member,
                seed,
            )
            for member, recipe, manifest, seed in jobs
        }
        try:
            while waiting:
                (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
                member, seed = waiting.pop(ready)
                result_of(ready)
                found = _outcome(member_folder(out, member.label, seed), seed)
                outcomes[member.label].append(found)
                record.add(f"{member.label}, seed {seed}", {k: v for k, v in found.metrics.items() if math.isfinite(v)})
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
    return {label: sorted(found, key=lambda one: one.seed) for label, found in outcomes.items()}


def _run_one(
    study: Reproduction,
    member: Member,
    document: dict[str, Any],
    shards: str,
    seed: int,
    out: str,
    board: Any,
    on_gpu: bool,
) -> None:
    """Trains one member with one seed, unless that was done, and measures it."""
    recipe = Recipe.model_validate(document)
    recipe.training.seed = seed
    manifest, folder = load_manifest(shards), member_folder(out, member.label, seed)
    name, identity = f"{member.label}, seed {seed}", _identity(recipe, manifest)
    if _done(folder, seed, identity):
        board.count.remote(name, recipe.training.length, name)
        return
    storage.remove(storage.join(folder, _RESULT))  # of another recipe, or damaged: not beside drawings of this one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = recipe.model.build(manifest)
    recipe.model.initialise(model, manifest, recipe.training, recipe.initialisation)
    made: list[Any] = []

    def objective(*arguments: Any) -> Any:
        made.append(study.objective(recipe)(*arguments))
        return made[-1]

    judged = member in study.members
    untrained = Trained(model.eval(), None, recipe, manifest, seed, out)
    before = study.measure(untrained) if judged and study.measures_start else {}
    history: list[LogEntry] = []
    followed: dict[str, dict[str, float]] = {}  # by steps, as JSON has them
    device = torch.device("cuda") if on_gpu else None
    fit = Fit(model.train(), manifest, recipe.training, device=device, objective=objective)
    details = {"stream": fit.order(), "identity": identity}

    def on_log(entry: LogEntry) -> None:
        history.append(entry)
        board.count.remote(name, entry.step, f"{name}: {entry.metrics['samples_per_second']:,.0f} samples/s")

    def on_checkpoint(step: int, state: State) -> None:
        if judged:
            found = study.follow(Trained(_as_trained(model, state), None, recipe, manifest, seed, out))
            followed.update({str(step): found} if found else {})
        plain = [{"step": entry.step, "metrics": entry.metrics} for entry in history]
        place = storage.join(folder, "checkpoints")
        seconds = resumed_seconds + time.perf_counter() - began
        save_checkpoint(
            storage.join(place, f"{step:08d}"),
            step,
            state,
            {**details, "history": plain, "followed": followed, "seconds": seconds},
        )
        for old in storage.names(place):
            if old != f"{step:08d}":
                storage.remove(storage.join(place, old))

    resumed_seconds, resume = 0.0, None
    found = _checkpoint(storage.join(folder, "checkpoints"), details)
    if found is not None:
        history += [LogEntry(entry["step"], entry["metrics"]) for entry in found.details["history"]]
        followed.update(found.details["followed"])
        resumed_seconds, resume = float(found.details["seconds"]), (found.step, found.state)
    began = time.perf_counter()
    state = fit.run(Callbacks(on_log, on_checkpoint), resume)
    seconds = resumed_seconds + time.perf_counter() - began
    final = _as_trained(model, state)
    critic = None
    if made and "critic" in made[0].players:
        critic, tensors = made[0].players["critic"].module.cpu().eval(), trained_tensors(state)
        critic.load_state_dict({name: tensors[f"critic.{name}"] for name in critic.state_dict()})
    trained = Trained(final, critic, recipe, manifest, seed, out)
    dequantised = recipe.training.dequantises(manifest.levels)
    save_model(storage.join(folder, "model"), final, recipe.model.family, manifest, dequantised=dequantised)
    metrics = {**{_BEFORE + key: value for key, value in before.items()}, **(study.measure(trained) if judged else {})}
    with storage.publish(storage.join(folder, _DRAWN)) as handle:
        np.savez(handle, allow_pickle=False, **(study.draw(trained) if judged else {}))
    logged = [entry for entry in history if study.curve in entry.metrics]
    result = {
        "identity": identity,
        "metrics": metrics,
        "steps": [entry.step for entry in logged],
        "curve": [entry.metrics[study.curve] for entry in logged],
        "followed": followed,
        "seconds": round(seconds, 2),
    }
    storage.write_text(storage.join(folder, _RESULT), json.dumps(result))
    storage.remove(storage.join(folder, "checkpoints"))
    board.count.remote(name, recipe.training.length, name)


def _identity(recipe: Recipe, manifest: Manifest) -> str:
    """Of a training, with its seed in the recipe."""
    return f"{recipe.fingerprint()} {manifest.fingerprint}"


def _done(folder: str, seed: int, identity: str) -> Outcome | None:
    """What a training left, where it is finished, of that identity and undamaged: else it is to be done again."""
    if not all(storage.exists(storage.join(folder, name)) for name in (_RESULT, _DRAWN)):
        return None
    try:
        result = json.loads(storage.read_bytes(storage.join(folder, _RESULT)))
        return _outcome(folder, seed) if result["identity"] == identity else None
    except (ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile):  # damaged
        return None


def _finished_before(
    study: Reproduction,
    members: Sequence[Member],
    recipes: dict[str, Recipe],
    packs: dict[str, Manifest],
    overrides: Sequence[str],
    out: str,
    seeds: Sequence[int],
) -> dict[str, list[Outcome]]:
    """Outcomes of the members that were not asked for, where they are there and of today's recipe and data."""
    by_data = {_data_key(recipes[label]): manifest for label, manifest in packs.items()}
    found: dict[str, list[Outcome]] = {}
    for member in study.members:
        if member in members:
            continue
        with suppress(UserError):  # what is set for some members need not fit the others
            recipe = _recipe(member, overrides, out)
            manifest = by_data.get(_data_key(recipe))
            for seed in seeds if manifest else ():
                recipe.training.seed, folder = seed, member_folder(out, member.label, seed)
                outcome = _done(folder, seed, _identity(recipe, manifest)) if manifest else None
                if outcome:
                    found.setdefault(member.label, []).append(outcome)
    return found


def _as_trained(model: Any, state: State) -> Any:
    """A model of its own with the state's tensors, in evaluation mode, on the CPU."""
    tensors = trained_tensors(state)
    final: Any = type(model)(**model.config)
    final.load_state_dict({key: tensors.get(key, value.cpu()) for key, value in model.state_dict().items()})
    return final.eval()


def _checkpoint(place: str, details: dict[str, Any]) -> Any:
    """The last whole checkpoint of the same training."""
    for name in sorted(storage.names(place), reverse=True):
        folder = storage.join(place, name)
        if storage.exists(storage.join(folder, "checkpoint.json")):
            found = load_checkpoint(folder, details["stream"])
            return found if found.details.get("identity") == details["identity"] else None
    return None


def _outcome(folder: str, seed: int) -> Outcome:
    result = json.loads(storage.read_bytes(storage.join(folder, _RESULT)))
    with np.load(io.BytesIO(storage.read_bytes(storage.join(folder, _DRAWN))), allow_pickle=False) as arrays:
        drawn = {name: arrays[name] for name in arrays.files}
    followed = {int(step): found for step, found in result.get("followed", {}).items()}  # earlier versions had none
    return Outcome(seed, result["metrics"], result["steps"], result["curve"], result["seconds"], drawn, followed)


def _write(study: Reproduction, members: Sequence[Member], outcomes: Outcomes, out: str, stages: Stages) -> ReportTable:
    table = study_table(study, members, outcomes)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    keys = sorted({key for found in outcomes.values() for one in found for key in one.metrics})
    writer.writerow(["member", "seed", "seconds", *keys])
    for label, found in outcomes.items():
        writer.writerows([label, one.seed, one.seconds, *(one.metrics.get(key, "") for key in keys)] for one in found)
    storage.write_text(storage.join(out, "table.csv"), lines.getvalue())
    storage.write_text(storage.join(out, "table.md"), _markdown(table))
    shown = study.figures(outcomes)
    for figure in shown:
        with storage.publish(storage.join(out, f"{_slug(figure)}.png")) as handle:
            handle.write(figure.png)
    sections = [ReportSection(figure.title, figures=[figure]) for figure in shown]
    timing = ReportTable("Stages", ["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in stages.seconds.items()])
    protocol = {"study": study.name, "source": study.source, **tracking.versions()}
    html = render_report(f"manymodes: {study.name}", table, sections, protocol, timing, study.summary)
    storage.write_text(storage.join(out, "report.html"), html)
    return table


def study_table(study: Reproduction, members: Sequence[Member], outcomes: Outcomes) -> ReportTable:
    """One row a member: mean ± standard deviation over the seeds, and the largest where the column says so."""
    shown = [column for column in study.columns if any(column.key in o.metrics for f in outcomes.values() for o in f)]
    printed = any(member.printed for member in members)
    rows = []
    for member in members:
        found = outcomes.get(member.label, [])
        cells = [_cell([one.metrics[c.key] for one in found if c.key in one.metrics], c) for c in shown]
        told = ", ".join(member.printed.values())
        seconds = f"{statistics.mean(one.seconds for one in found):.0f}" if found else "–"
        rows.append([member.label, *cells, *([told or "–"] if printed else []), str(len(found)), seconds])
    columns = ["model", *(column.heading for column in shown), *(["printed"] if printed else []), "seeds", "seconds"]
    return ReportTable(study.source, columns, rows, study.note)


def _cell(values: Sequence[float], column: Column) -> str:
    finite = [value for value in values if math.isfinite(value)]
    lost = "" if len(finite) == len(values) else f" ({len(values) - len(finite)} of {len(values)} not finite)"
    if not finite:
        return f"–{lost}"
    mean = statistics.mean(finite)
    if abs(mean) >= 1e5:
        return f"{mean:.3g}{lost}"
    text = f"{mean:.{column.decimals}f}"
    if len(finite) > 1 and min(finite) != max(finite):
        text += f" ± {statistics.stdev(finite):.{column.decimals}f}"
        if column.largest:
            text += f" (largest {max(finite):.{column.decimals}f})"
    return text + lost


def _markdown(table: ReportTable) -> str:
    lines = [f"# {table.title}", "", "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table.cells()]
    return "\n".join([*lines, "", table.note, ""])


def _slug(figure: ReportFigure) -> str:
    return re.sub("[^a-z0-9]+", "-", figure.title.lower()).strip("-")


def _files(out: str) -> dict[str, bytes]:
    """The study's own files, for MLflow."""
    names = (name for name in storage.names(out) if Path(name).suffix in (".csv", ".md", ".html", ".png"))
    return {name: storage.read_bytes(storage.join(out, name)) for name in names}
