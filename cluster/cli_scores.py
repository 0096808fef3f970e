"""The commands that judge samples, evaluate, compare, reference, watch; and the one that judges scores, study."""

from __future__ import annotations

import functools
import inspect
import json
import posixpath
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from cluster.terminal import PLACES, RAY, TRACKING, out_console, print_fields, print_table
from data.errors import UserError
from data.limits import MAX_DRAWN, MAX_SEED, MAX_SIDE

if TYPE_CHECKING:
    from cluster.densities import DensityOption
    from cluster.scoring import Runner
    from eval.comparison import Comparison
    from eval.evaluate import Rule

EXTRACTORS = "pixels, inception:FILE, torchscript:FILE, onnx:FILE, module:FILE.py:NAME or classifier:MODEL"
# Options that several commands share, by the name of their parameter; `_shared` gives them to a command.
_OPTIONS: dict[str, tuple[type, Any]] = {
    "bins": (str, typer.Option("100", "--bins", help="K-means bins, as 100 or 100,200,300; or `labels`: the classes")),
    "z_threshold": (float, typer.Option(None, "--z-threshold", help="a bin differs where |z| exceeds this")),
    "significance": (float, typer.Option(None, "--significance", help="... or where p is below this (default 0.05)")),
    "scores": (
        str,
        typer.Option(
            "all",
            "--scores",
            help="all, none, or some with commas between: fid, kid, manifold, transport, sharpness, classes, "
            "memorisation",
        ),
    ),
    "features": (
        str,
        typer.Option(
            "pixels",
            "--features",
            help=EXTRACTORS,
        ),
    ),
    "classifier": (
        str,
        typer.Option(None, "--classifier", help="an extractor that classifies, for Inception and MODE score"),
    ),
    "held_out": (
        str,
        typer.Option(
            None, "--held-out", help="data nobody trained on, for the search for copies (default: REF's test split)"
        ),
    ),
    "density": (str, typer.Option(None, "--density", help="a model (as above): how likely are SAMPLES under it?")),
    "seed": (
        int,
        typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the bins, subsets, and the samples of a model"),
    ),
    "n": (int, typer.Option(10_000, "-n", min=1, max=MAX_DRAWN, help="samples drawn from a model")),
    "split": (str, typer.Option("test", "--split", help="split of SAMPLES, where it is a pack")),
    "reference_split": (str, typer.Option("train", "--reference-split", help="split of REF, where it is a pack")),
    "size": (int, typer.Option(None, "--size", min=1, max=MAX_SIDE, help="crop and resize images to so many pixels")),
    "grey": (bool, typer.Option(None, "--grey/--rgb", help="turn images grey, or to RGB (default: as they are)")),
    "max_samples": (int, typer.Option(None, "--max-samples", min=2, help="random subset that K-means is fitted to")),
    "max_dimensions": (int, typer.Option(None, "--max-dimensions", min=1, help="random subset of the features")),
    "n_init": (int, typer.Option(10, "--n-init", min=1, help="K-means initialisations")),
    "whiten": (bool, typer.Option(False, "--whiten", help="divide by the reference's standard deviation")),
    "subsample": (
        int,
        typer.Option(
            None, "--subsample", min=10, help="random samples for scores of pairs (default: 5000, or as REF was fitted)"
        ),
    ),
    "workers": (int, typer.Option(None, "--workers", min=1, help="share the passes among so many Ray workers")),
    "ray_address": (str, RAY),
    "gpus_per_task": (float, typer.Option(0.0, "--gpus-per-task", min=0, help="GPUs that a Ray task reserves")),
    "store": (
        str,
        typer.Option(None, "--store", help="folder that keeps statistics: only new data is read next time"),
    ),
    "as_json": (bool, typer.Option(False, "--json", help="print one JSON object and nothing else")),
    "report": (
        str,
        typer.Option(None, "--report", help="write an HTML report to this file, and a JSON file beside it"),
    ),
    "tracking_uri": (str, TRACKING),
}
_RUN = ("workers", "ray_address", "gpus_per_task", "tracking_uri")
_READ = ("seed", "n", "size", "grey")
_FIT = (
    *("bins", "scores", "features", "classifier", "reference_split"),
    *("max_samples", "max_dimensions", "n_init", "whiten", "subsample"),
)
_JUDGE = (
    *("z_threshold", "significance", "split", "held_out", "density", "store", "as_json", "report"),
    *_FIT,
    *_READ,
    *_RUN,
)


def _shared(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command some of `_OPTIONS` beside its own; it gets the values of all of them as `given`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        more = [
            inspect.Parameter(name, kind, default=option, annotation=type_)
            for name, (type_, option) in ((name, _OPTIONS[name]) for name in names)
        ]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(**{p.name: values[p.name] for p in own}, given={**_defaults(), **values})

        # What typer reads; annotations are types here, and not the texts that they are in the command.
        vars(called)["__signature__"] = inspect.Signature([*own, *more])
        called.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
        return called

    return decorate


def _defaults() -> dict[str, Any]:
    return {name: option.default for name, (_, option) in _OPTIONS.items()}


@_shared(*_JUDGE)
def evaluate(
    samples: str = typer.Argument(help=PLACES),
    reference: str = typer.Option(
        ..., "--reference", help="the data to cover, in the same forms, or what `reference` left"
    ),
    per_sample: str = typer.Option(None, "--per-sample", help="folder for Parquet files: bin and distance"),
    export_missing: str = typer.Option(
        None, "--export-missing", help="folder for REF's samples of the bins that hold fewer SAMPLES"
    ),
    *,
    given: dict[str, Any],
) -> None:
    """Scores samples against a reference: which modes are missing? NDB, JS, FID, precision, copies, ..."""
    comparison = _compare([samples], given)
    row = comparison.rows[0]
    if given["as_json"]:
        print(json.dumps(row.to_dict()))
        return
    result = row.evaluation.result
    table = Table("bin", "direction", "reference", "samples", "z", box=None, pad_edge=False)
    for k in [int(k) for k in result.by_evidence() if result.flagged[k]][:20]:
        shares = (f"{100 * part[k]:.2f} %" for part in (result.reference_proportions, result.sample_proportions))
        table.add_row(str(k), result.direction(k), *shares, f"{result.z[k]:+.1f}")
    if result.ndb:
        out_console.print(table)
    _print_scores(comparison)
    floor = result.js_floor
    print_fields(
        NDB=f"{result.ndb} of {result.bins} bins differ ({result.threshold}; {result.expected_by_chance:.1f} expected "
        f"by chance), NDB/K {result.ndb_over_k:.3f}",
        Holm=_verdict(result),
        JS=f"{result.js:.5f} nats, {'above' if result.js > floor.quantile else 'within'} chance: two sets of one "
        f"distribution have {floor.mean:.5f}, in 95 of 100 cases at most {floor.quantile:.5f}",
        samples=f"{result.n_samples:,} of {samples}",
        reference=f"{result.n_reference:,} of {reference}",
        scale=row.evaluation.protocol["scale"],
        **({"report": given["report"]} if given["report"] else {}),
    )


def _verdict(result: Any) -> str:
    """What is left of the differing bins after Holm's correction, in words."""
    if not result.ndb_holm:
        return "0 bins differ after correction for all of them: no mode is shown to be missing or repeated"
    return f"{result.ndb_holm} bins differ after correction for all of them: modes that are missed or repeated"


@_shared(*_JUDGE)
def compare(
    samples: list[str] = typer.Argument(help=PLACES + "; or JSON files that `evaluate --json` printed"),
    reference: str = typer.Option(None, "--reference", help="the data to cover, or what `reference` left"),
    *,
    given: dict[str, Any],
) -> None:
    """Scores several models or sets side by side against one reference; earlier results only by the same bins."""
    if all(name.endswith(".json") for name in samples):
        from cluster.scoring import saved_table

        if given["report"]:
            raise UserError("--report needs the samples, which saved results do not hold: name the sets themselves")
        print_table(saved_table(samples))
        return
    if reference is None:
        raise UserError("name the data to cover by --reference")
    comparison = _compare(samples, given)
    if given["as_json"]:
        print(json.dumps([row.to_dict() for row in comparison.rows]))
        return
    from eval.comparison_report import bins_table

    print_table(bins_table(comparison))
    _print_scores(comparison)
    if given["report"]:
        print_fields(report=given["report"])


@_shared(*_FIT, *_READ, *_RUN)
def reference(
    reference: str = typer.Argument(help=PLACES),
    out: str = typer.Option(..., "--out", help="folder or URL for the fitted bins and statistics"),
    *,
    given: dict[str, Any],
) -> None:
    """Fits bins and statistics to a reference once, so that every later evaluation uses the same yardstick."""
    from cluster.progress import Stages
    from cluster.scoring import reference_of, running
    from data import storage
    from eval.reference import REFERENCE

    place = storage.check_url(out)
    if storage.exists(storage.join(place, REFERENCE)):
        raise UserError(f"{out}: a reference is there already: give another folder, or remove it")
    known = _taking(given, given["reference_split"], 1)
    with running(_looking(given), Stages()) as runner:
        fitted, _ = reference_of(runner, reference, known, _options(given))
        fitted.save(place)
    _warn(reference, fitted.facts.get("reference_reach"))
    for each in fitted.bins:
        print_fields(bins=f"{len(each.counts)} over {each.n_reference:,} samples, fingerprint {each.fingerprint}")
    print_fields(reference=place)


@_shared("features", "classifier", "split", "as_json", *_READ, *_RUN)
def watch(
    samples: str = typer.Argument(help=PLACES),
    reference: str = typer.Option(..., "--reference", help="what `reference` left"),
    history: str = typer.Option(..., "--history", help="file to which the batch is appended, one JSON object a line"),
    max_ndb: int = typer.Option(0, "--max-ndb", min=0, help="bins that may differ after Holm's correction"),
    max_js: float = typer.Option(None, "--max-js", min=0, help="JS (nats) that may be reached (default: by chance)"),
    significance: float = typer.Option(
        0.001,
        "--significance",
        min=1e-4,
        max=0.5,
        help="rate of false alarms, for a batch and for all together; half of it each for bins and for JS",
    ),
    *,
    given: dict[str, Any],
) -> None:
    """Watches for drift: scores a new batch by a fitted reference; exit code 3 where it, or all together, drifted.

    A batch of the reference's own distribution alarms at a rate of --significance at most, and so do all batches
    together: the exit code is false at twice that rate at most.
    """
    from cluster.scoring import is_reference
    from cluster.watch import Thresholds, record

    if not is_reference(reference):
        raise UserError(f"{reference}: no fitted reference there: make one with `manymodes reference`")
    comparison = _compare([samples], {**given, "scores": "none"})
    batch, together = record(comparison.rows[0], Thresholds(significance, max_ndb, max_js), history)
    if given["as_json"]:
        print(json.dumps({"batch": batch, "all": together}))
    else:
        table = Table("", "samples", "NDB (Holm)", "limit", "JS (nats)", "limit", "drift", box=None, pad_edge=False)
        for name, found in (("this batch", batch), (f"all {together['batches']} batches", together)):
            limits = (str(found["ndb_limit"]), f"{found['js']:.5f}", f"{found['js_limit']:.5f}")
            table.add_row(name, f"{found['n']:,}", str(found["ndb_holm"]), *limits, "yes" if found["drift"] else "no")
        out_console.print(table)
        print_fields(drift=f"{batch['rule']}; false alarms: {significance:g} at most, for each line")
    if batch["drift"] or together["drift"]:
        raise typer.Exit(3)


@_shared("classifier", *_READ, *_RUN)
def features(
    place: str = typer.Argument(help=PLACES),
    features: str = typer.Option(..., "--features", help=EXTRACTORS),
    out: str = typer.Option(..., "--out", help="folder or URL for the pack of vectors"),
    split: str = typer.Option("test", "--split", help="splits of PLACE, as test or train,test"),
    *,
    given: dict[str, Any],
) -> None:
    """Writes the features of a set as a pack of vectors, in its order and with its labels, to be judged many times."""
    from cluster.feature_packs import write_features
    from cluster.progress import Stages
    from cluster.scoring import open_set, running
    from data import storage

    with running(_looking(given), Stages()) as runner:
        sets = {name: open_set(place, _taking(given, name)) for name in _parts(split)}
        manifest = write_features(runner, sets, place, storage.check_url(out))
    counts = ", ".join(f"{name} {record.samples:,}" for name, record in manifest.splits.items())
    print_fields(pack=manifest.base, vectors=f"{manifest.shape[0]} features each; {counts}")


@_shared("features", "seed", "size", "grey", "tracking_uri")
def study(
    reference: str = typer.Argument(help="labelled data: a pack, a folder of images, a .npz file, or a source"),
    out: str = typer.Option(..., "--out", help="folder or URL for study.json, study.png and study.html"),
    keep: str = typer.Option("0,0.25,0.5,0.75", "--keep", help="shares of the class that are kept, from 0 on, below 1"),
    classes: str = typer.Option(None, "--classes", help="thin these classes, one at a time (default: each)"),
    bins: int = typer.Option(100, "--bins", min=2, help="K-means bins"),
    splits: int = typer.Option(20, "--splits", min=2, help="random splits into reference and samples that are judged"),
    calibration: int = typer.Option(80, "--calibration", min=1, help="further splits, for the thresholds alone"),
    level: float = typer.Option(0.05, "--level", help="false-alarm rate that is allowed"),
    samples: int = typer.Option(5000, "--samples", min=10, help="samples of each half of a split, at most"),
    subsample: int = typer.Option(2000, "--subsample", min=10, help="samples for scores of pairs"),
    n_init: int = typer.Option(2, "--n-init", min=1, help="K-means initialisations"),
    scores: str = typer.Option(
        "all",
        "--scores",
        help="all, or some with commas between: ndb, ndb_holm, ndb_bh, js, fid, kid, precision, recall, density, "
        "coverage, sliced",
    ),
    by_class: str = typer.Option(
        None, "--by-class", help="the score that is also shown class by class (default: ndb_holm)"
    ),
    split: str = typer.Option("test", "--split", help="split of REF, where it has splits"),
    *,
    given: dict[str, Any],
) -> None:
    """Plants collapse in real data, one class at a time: how often does each score notice?"""
    from cluster.progress import Stages
    from cluster.scoring import Taking
    from cluster.studies import Plan, run_study
    from data import storage
    from eval.planted import MEASURES, Measuring

    names = tuple(MEASURES) if scores == "all" else tuple(_parts(scores))
    plan = Plan(
        keep=_shares(keep),
        classes=tuple(_parts(classes or "")),
        splits=splits,
        calibration=calibration,
        samples=samples,
        by_class=by_class,
        seed=given["seed"],
        measuring=Measuring(names, bins, n_init, subsample, level),
    )
    place, stages = storage.check_url(out), Stages()
    taking = Taking(split=split, **{name: given[name] for name in ("size", "grey", "tracking_uri")})
    found = run_study(reference, plan, taking, stages, out=place, features=given["features"])
    found.save(place, {name: round(value, 3) for name, value in stages.seconds.items()})
    print_table(found.table())
    print_table(found.class_table())
    out_console.print(found.finding())
    print_fields(**{name: storage.join(place, f"study.{name}") for name in ("html", "png", "json")})


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError:
        raise UserError(f"--keep {text}: give numbers from 0 on, below 1, with commas between") from None


def _looking(given: dict[str, Any]) -> Any:
    from cluster.scoring import Looking

    names = ("features", "classifier", "tracking_uri", "workers", "ray_address", "gpus_per_task")
    return Looking(**{name: given[name] for name in names})


def _taking(given: dict[str, Any], split: str, seed_step: int = 0) -> Any:
    from cluster.scoring import Taking

    same = {name: given[name] for name in ("n", "size", "grey", "tracking_uri")}
    return Taking(split=split, seed=given["seed"] + seed_step, **same)


def _options(given: dict[str, Any]) -> Any:
    from cluster.scoring import ReferenceOptions
    from eval.bins import BinSettings
    from eval.scores import ScoreSettings, parse_scores

    names = ("max_samples", "max_dimensions", "n_init", "whiten", "seed")
    same = {name: given[name] for name in names}
    settings = [BinSettings(n_bins=k, **same) for k in _numbers_of_bins(given["bins"])]
    scores = ScoreSettings(
        parse_scores(given["scores"]),
        *(given["subsample"] or ScoreSettings.subsample, given["seed"]),
        explicit=given["scores"] != "all",
    )
    return ReferenceOptions(settings or [BinSettings(**same)], scores, labels=not settings)


def _numbers_of_bins(text: str) -> list[int]:
    if text == "labels":
        return []
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise UserError(f"--bins {text}: give a number from 2 on, several with commas between, or labels")
    return numbers


def _compare(samples: list[str], given: dict[str, Any]) -> Comparison:
    """Judges the sets by the reference, warns where scores may mislead, and writes what files were asked for."""
    from cluster.densities import DensityOption
    from cluster.progress import Stages
    from cluster.scoring import held_out_of, is_reference, open_set, reference_of, running, score_sets
    from cluster.shapes import in_shape
    from data import storage
    from eval.evaluate import Rule
    from eval.stored import check_lasting

    rule = Rule(given["z_threshold"], given["significance"])
    _check_asked(rule, given)
    options = _options(given)
    stages = Stages(quiet=given["as_json"])
    known = _taking(given, given["reference_split"], 1)
    if given["held_out"] and is_reference(given["reference"]):
        raise UserError(
            f"--held-out: copies are searched among the reference's samples, which {given['reference']} does not hold: "
            "name the set that it was fitted to"
        )
    with running(_looking(given), stages) as runner:
        with stages.stage("open samples"):
            sets = {name: open_set(name, _taking(given, given["split"])) for name in samples}
            for name, opened in sets.items():
                opened.name = name  # as the user calls it
            searched = "memorisation" in options.scores.names
            named = given["held_out"] if searched else None
            held = None if named is None else open_set(named, _taking(given, given["split"]))
            asked = given["density"]
            density = DensityOption(asked, given["tracking_uri"], given["seed"]) if asked else None
            if density is not None:
                density.model()  # what is no density is refused before anything starts
            for opened in sets.values() if given["store"] else ():
                check_lasting(opened)

        def check(shape: tuple[int, ...]) -> None:
            nonlocal held
            sets.update({name: in_shape(opened, shape) for name, opened in sets.items()})
            held = None if held is None else in_shape(held, shape)

        fitted, partitions = reference_of(runner, given["reference"], known, options, check)
        if searched and held is None and partitions is not None:
            held = held_out_of(given["reference"], known, partitions)
        scores = options.scores
        if partitions is None:
            scores = scores.like(fitted.summary.settings)
            if given["subsample"] not in (None, scores.subsample):
                raise UserError(
                    f"{given['reference']}: fitted with --subsample {scores.subsample}: leave it out, or fit anew"
                )
        comparison = score_sets(
            *(runner, sets, fitted, partitions),
            rule=rule,
            scores=scores,
            held_out=held,
            store=None if given["store"] is None else storage.check_url(given["store"]),
            density=density,
        )
        _export(runner, comparison, given.get("per_sample"), given.get("export_missing"), density)
    _warn(given["reference"], fitted.facts.get("reference_reach"))
    for row in comparison.rows:
        _warn(row.name, row.evaluation.warning)
    if given["report"]:
        _write_report(given["report"], comparison, {name: round(value, 3) for name, value in stages.seconds.items()})
    return comparison


def _warn(name: str, warning: str | None) -> None:
    if warning:
        print(f"manymodes: warning: {name}: {warning}", file=sys.stderr)


def _export(
    runner: Runner,
    comparison: Comparison,
    per_sample: str | None,
    export: str | None,
    density: DensityOption | None,
) -> None:
    from cluster.exports import export_missing, neighbours_of, write_per_sample

    row, known = comparison.rows[0], comparison.reference
    if per_sample:
        write_per_sample(runner, row.samples, known.bins[0], neighbours_of(known), density, per_sample)
    if export:
        fewer = row.evaluation.result.fewer()
        if not fewer:
            print("manymodes: no bin has fewer samples, none is missing: nothing is exported", file=sys.stderr)
            return
        n, place = export_missing(runner, known, fewer, export)
        if not runner.stages.quiet:
            print_fields(exported=f"{n:,} samples of {len(fewer)} bins with fewer samples, or none, in {place}")


def _print_scores(comparison: Comparison) -> None:
    from eval.comparison_report import scores_table

    table = scores_table(comparison)
    if table is not None:
        print_table(table)


def _check_asked(rule: Rule, given: dict[str, Any]) -> None:
    """Refuses before any work what would be refused after it: scores that are there must not be lost then.

    Raises:
        UserError: a rule that flags no bin, or a place that cannot be written or is taken.
    """
    from cluster.exports import check_exports
    from cluster.questions import check_places
    from cluster.scoring import is_reference
    from data import storage
    from eval.metrics import ndb

    try:
        ndb.check_rule(rule.z_threshold, rule.significance)
    except ValueError as error:
        raise UserError(f"--z-threshold, --significance: {error}") from error
    report, export = given["report"], given.get("export_missing")
    for name in ("report", "store", "per_sample", "export_missing"):
        if given.get(name) is not None:
            storage.check_url(given[name])
    if report and posixpath.splitext(report)[1].lower() == ".json":
        raise UserError(f"--report {report}: a JSON file is written beside the report: name an HTML file")
    if report and storage.is_local(storage.check_url(report)):
        check_places(Path(storage.check_url(report)))
    if export and is_reference(given["reference"]):
        raise UserError(
            f"--export-missing: {given['reference']} does not hold its samples: name the data itself by --reference"
        )
    check_exports(given.get("per_sample"), export)


def _write_report(path: str, comparison: Comparison, seconds: dict[str, float]) -> None:
    from cluster.scoring import comparison_report
    from data import storage

    storage.write_text(path, comparison_report(comparison, seconds))
    beside = f"{posixpath.splitext(path)[0]}.json"
    storage.write_text(beside, json.dumps([row.to_dict() for row in comparison.rows]))
