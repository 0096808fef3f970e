"""Scores of any samples against any reference: where the sets come from, and who passes over them."""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.densities import DensityOption, likelihood_scores, log_likelihood
from cluster.extractors import open_extractor
from cluster.models import model_folder, open_model
from cluster.progress import Stages
from cluster.terminal import PLACES
from data import storage
from data.errors import UserError
from data.partitions import Partitions, open_partitions
from data.sources import is_spec
from eval.bins import BinSettings
from eval.comparison import Comparison, judge_set
from eval.comparison_report import bins_table, report_sections, row_sections, scores_table, unequal_sizes
from eval.drawn import DrawnPartitions
from eval.evaluate import Rule
from eval.measure import View, local_pass
from eval.observed import Pass
from eval.reference import REFERENCE, Reference, fit_reference
from eval.report import ReportSection, ReportTable, render_report
from eval.scores import ScoreSettings
from eval.stored import observe_stored

_TRAIN, _TEST = "train", "test"


@dataclass(frozen=True)
class Looking:
    """How samples are looked at, and by whom: specs of extractors, and Ray's workers (None: this process)."""

    features: str | None = None
    classifier: str | None = None
    tracking_uri: str | None = None
    workers: int | None = None
    ray_address: str | None = None
    cpus_per_task: float = 1
    gpus_per_task: float = 0


@dataclass(frozen=True)
class Taking:
    """How a place is read: split, samples drawn from a model, shape of images."""

    split: str = _TEST
    n: int = 10_000
    seed: int = 0
    size: int | None = None
    grey: bool | None = None
    tracking_uri: str | None = None

    def require(self, place: str, shape: tuple[int, ...]) -> None:
        """Raises UserError where samples are not as asked for: only folders of images and tars are reshaped."""
        image = len(shape) in (2, 3)
        channels = None if self.grey is None else 1 if self.grey else 3
        if self.size is not None and not (image and shape[:2] == (self.size, self.size)):
            asked = f"--size {self.size}"
        elif channels is not None and not (image and (*shape, 1)[2] == channels):
            asked = "--grey" if self.grey else "--rgb"
        else:
            return
        raise UserError(
            f"{place}: samples of shape {list(shape)} are taken as they are, {asked} shapes images in folders and tars "
            "alone: name the folder of the images, or pack it with --set size=... and --set grey=..."
        )


def open_set(place: str, taking: Taking) -> Partitions:
    """The samples at a place (see `open_partitions`), or drawn from a model: models:/NAME@ALIAS or a run's folder.

    Raises:
        UserError: nothing usable there, or samples that are not of the asked size and colours and cannot be made so.
    """
    if not place.startswith("models:") and model_folder(place) is None:
        # Shards may have braces in their names, and are looked for where they are opened.
        if not (is_spec(place) or place.endswith(".tar") or storage.exists(storage.check_url(place))):
            raise UserError(f"{place}: nothing is there: check the path, or give {PLACES}")
        found = open_partitions(place, split=taking.split, size=taking.size, grey=taking.grey)
        taking.require(place, found.shape)
        return found
    return open_drawn(place, taking)


def open_drawn(place: str, taking: Taking) -> DrawnPartitions:
    """Samples drawn from a model: models:/NAME@ALIAS, or a run's folder.

    Raises:
        UserError: no model there, one that draws no samples, or none of the asked size and colours.
    """
    uri = taking.tracking_uri
    model = open_model(place, uri)
    model.require("sample")
    taking.require(place, tuple(model.data["shape"]))
    return DrawnPartitions(
        functools.partial(_opened, place, uri),
        *(taking.n, taking.seed),
        name=place,
        identity=model.fingerprint,
        shape=tuple(model.data["shape"]),
        levels=model.data.get("levels"),
    )


@functools.lru_cache(maxsize=2)
def _opened(place: str, uri: str | None) -> Any:
    return open_model(place, uri)


@functools.lru_cache(maxsize=4)
def open_view(features: str | None, classifier: str | None, tracking_uri: str | None) -> View:
    """The view that these specs stand for, opened once in a process."""
    specs = (features, classifier)
    return View(*(open_extractor(spec, tracking_uri) if spec and spec != "pixels" else None for spec in specs))


@dataclass
class Runner:
    """Passes over sets, in this process or by Ray."""

    looking: Looking
    stages: Stages
    by_ray: bool = False
    view: Callable[[], View] = field(init=False)

    def __post_init__(self) -> None:
        look = self.looking
        self.view = functools.partial(open_view, look.features, look.classifier, look.tracking_uri)

    def over(self, partitions: Partitions, advance: Callable[..., Any], store: str | None = None) -> Pass:
        """A pass over a set, by all workers; `store` keeps what was found of each partition."""
        if not self.by_ray:
            return local_pass(partitions, self.view(), advance, functools.partial(observe_stored, store=store))
        from cluster.counting import ray_pass

        look = self.looking
        return ray_pass(partitions, self.view, advance, store, look.cpus_per_task, look.gpus_per_task)

    def map(self, function: Callable[..., Any], partitions: Partitions, *arguments: Any) -> Iterator[Any]:
        """function(partitions, number, view, *arguments) of every partition, by all workers, in the set's order."""
        if not self.by_ray:
            view = self.view()
            yield from (function(partitions, number, view, *arguments) for number in range(len(partitions)))
            return
        from cluster.counting import ray_map

        look = self.looking
        yield from ray_map(
            *(function, partitions, self.view, *arguments),
            cpus_per_task=look.cpus_per_task,
            gpus_per_task=look.gpus_per_task,
        )


@contextmanager
def running(looking: Looking, stages: Stages) -> Iterator[Runner]:
    """A runner; Ray is started (or joined) where workers or an address are named.

    Raises:
        UserError: Ray does not answer, or an extractor cannot be opened.
    """
    runner = Runner(looking, stages)
    runner.view()  # what cannot be opened is refused before anything starts
    if looking.workers is None and not looking.ray_address:
        yield runner
        return
    from cluster.placement import require_resources
    from cluster.session import ray_session

    with ExitStack() as stack:
        with stages.stage("start Ray"):
            cpus = (looking.workers or 1) * looking.cpus_per_task
            stack.enter_context(ray_session(looking.ray_address, cpus))
        require_resources("the passes", {"CPU": looking.cpus_per_task, "GPU": looking.gpus_per_task})
        runner.by_ray = True
        yield runner


@dataclass(frozen=True)
class ReferenceOptions:
    """How a reference becomes a yardstick."""

    settings: Sequence[BinSettings]
    scores: ScoreSettings
    labels: bool = False


def reference_of(
    runner: Runner,
    place: str,
    taking: Taking,
    options: ReferenceOptions,
    check: Callable[[tuple[int, ...]], None] = lambda shape: None,
) -> tuple[Reference, Partitions | None]:
    """A fitted reference that is loaded, or one that is fitted now; and its samples, where they are at hand.

    `check` is called with the shape of its samples before it is fitted, and may refuse it.

    Raises:
        UserError: nothing usable there, or a reference in another space of features than the one asked for.
    """
    space = runner.view().space
    if is_reference(place):
        with runner.stages.stage("load reference"):
            reference = Reference.load(storage.check_url(place))
        check(reference.bins[0].shape)
        measured = reference.bins[0].centres is not None or reference.summary.settings.names
        if measured and reference.space != space:
            raise UserError(
                f"{place}: fitted to {reference.space.name} ({reference.space.fingerprint[:12]}), the samples are seen "
                f"by {space.name} ({space.fingerprint[:12]}): give the same --features"
            )
        return reference, None
    partitions = open_set(place, taking)
    check(partitions.shape)
    with runner.stages.stage("fit reference", unit="samples") as advance:
        reference = fit_reference(
            *(partitions, runner.over(partitions, advance), options.settings, options.scores),
            space=space,
            labels=options.labels,
        )
    seen = _of("reference", runner.view().facts())
    return replace(reference, facts={**reference.facts, **seen}), partitions


def is_reference(place: str) -> bool:
    """Whether a fitted reference lies there."""
    if is_spec(place) or place.startswith("models:"):
        return False
    return storage.exists(storage.join(storage.check_url(place), REFERENCE))


def held_out_of(place: str, taking: Taking, whole: Partitions) -> Partitions | None:
    """The test split of a reference (`whole`) that is a training split; None where it has none."""
    if taking.split != _TRAIN or isinstance(whole, DrawnPartitions):
        return None
    try:
        found = open_partitions(place, split=_TEST, size=taking.size, grey=taking.grey)
    except UserError:
        return None
    # What has no splits gives the same samples under any name.
    return None if _shared(found, whole) else found


def _shared(a: Partitions, b: Partitions) -> bool:
    return not set(a.keys).isdisjoint(b.keys)


def _no_search(
    scores: ScoreSettings, samples: Partitions, known: Partitions | None, held_out: Partitions | None
) -> str | None:
    """Why no copies are searched for; None where they are."""
    if "memorisation" not in scores.names:
        return "not asked for"
    if known is None:
        return "the reference's samples are not at hand: give the set that it was fitted to"
    if held_out is None:
        return "no held-out data: name it by --held-out"
    return "the samples are the held-out data" if _shared(samples, held_out) else None


def score_sets(
    runner: Runner,
    sets: dict[str, Partitions],
    reference: Reference,
    partitions: Partitions | None,
    *,
    rule: Rule,
    scores: ScoreSettings,
    held_out: Partitions | None = None,
    store: str | None = None,
    density: DensityOption | None = None,
) -> Comparison:
    """Judges sets by a reference, each in one pass (and one more over the reference, where copies are searched).

    With `density` one more pass over each set takes the log-likelihood of its samples.

    Raises:
        UserError: samples that do not fit the reference, fewer samples than bins, or held-out data that is the
            reference itself.
    """
    if partitions is not None and held_out is not None and _shared(partitions, held_out):
        raise UserError(f"{held_out.name}: held-out data that is in the reference: name data that nobody trained on")
    shared = {**reference.facts, **scores.facts(), **runner.view().facts()}
    shared |= {} if density is None else density.facts()
    rows = []
    for name, samples in sets.items():
        reason = _no_search(scores, samples, partitions, held_out)
        facts = {**shared, **_of("samples", samples.facts), "memorisation": reason}
        if reason is None and held_out is not None:
            facts |= {"memorisation": "against held-out data", "held_out": held_out.name}
            facts |= _of("held_out", {"fingerprint": held_out.fingerprint, **held_out.facts})
        with runner.stages.stage(f"score {posixpath.basename(name.rstrip('/')) or name}", unit="samples") as advance:
            likelihood = None if density is None else log_likelihood(runner, samples, density, advance)
            row = judge_set(
                *(samples, runner.over(samples, advance, store), reference),
                name=name,
                rule=rule,
                scores=scores,
                log_likelihood=likelihood,
                over_reference=None if partitions is None else runner.over(partitions, advance),
                held_out=reason if reason or held_out is None else (held_out, runner.over(held_out, advance)),
                stored=store is not None,
                extras=facts,
            )
        if likelihood is not None and density is not None:
            row = replace(row, scores=[*row.scores, *likelihood_scores(likelihood, density)])
        rows.append(row)
    return Comparison(reference, rows)


def _of(whose: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{whose}_{name}": value for name, value in facts.items()}


def comparison_report(comparison: Comparison, seconds: dict[str, float]) -> str:
    """The report of a comparison as one HTML file: tables, proportions, worst bins, samples, nearest pairs."""
    rows, reference = comparison.rows, comparison.reference
    beside = None if reference.partitions is None else ("reference", reference.partitions)
    sections: list[ReportSection] = []
    other = scores_table(comparison)
    if other is not None:
        sections.append(ReportSection("Other scores", table=other))
    sections += report_sections(comparison, rows[0], beside)
    for row in rows[1:]:
        sections += row_sections(comparison, row)
    result = rows[0].evaluation.result
    names = ", ".join(row.name for row in rows)
    lead = f"{names} against {result.n_reference:,} samples of {reference.name}."
    timing = ReportTable("Stages", ["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()])
    protocols = [row.evaluation.protocol for row in rows]
    # What is said of one set's samples alone would mislead.
    protocol = {key: value for key, value in protocols[0].items() if all(p.get(key) == value for p in protocols)}
    return render_report(f"manymodes: {names}", bins_table(comparison), sections, protocol, timing, lead)


def saved_table(files: Sequence[str]) -> ReportTable:
    """NDB and JS of results that `evaluate` or `compare` printed by --json, side by side: every set of every file.

    Raises:
        UserError: no such results, or scores by different bins or rules.
    """
    cells: list[list[Any]] = []
    bins, rules = {}, {}
    for file in files:
        try:
            found = json.loads(storage.read_bytes(file))
            for row in found if isinstance(found, list) else [found]:
                called = f"{file}: {row['name']}"
                bins[called], rules[called] = str(row["protocol"]["bins_fingerprint"])[:12], str(row["threshold"])
                (low, high), js = row["intervals"]["ndb_over_k"], row["intervals"]["js"]
                cells.append([
                    *(row["name"], f"{row['ndb']} of {row['bins']}", str(row["ndb_holm"]), f"{low:.3f}–{high:.3f}"),
                    *(f"{row['js']:.4f}", f"{js[0]:.4f}–{js[1]:.4f}", int(row["n_samples"])),
                ])  # fmt: skip
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file}: no result of `evaluate --json` or `compare --json`: print it again") from error
    for used, what, remedy in ((bins, "bins", "--reference"), (rules, "rules", "--significance or --z-threshold")):
        if len(set(used.values())) > 1:
            told = ", ".join(f"{called}: {value}" for called, value in used.items())
            raise UserError(f"these scores are by different {what} and do not compare ({told}): use one {remedy}")
    if not cells:
        raise UserError(f"{', '.join(files)}: no results in there: print them again by `evaluate --json`")
    columns = ["samples", "NDB", "Holm", "NDB/K, 95 %", "JS (nats)", "95 %", "n"]
    note = f"Bins {next(iter(bins.values()))}; a bin differs where {next(iter(rules.values()))}."
    note += unequal_sizes([row[-1] for row in cells])
    return ReportTable("Saved results", columns, cells, note)
