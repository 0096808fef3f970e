"""The planted-collapse study: which score notices a class that is thinned, and how often? Its protocol and files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from cluster.progress import Stages
from cluster.questions import check_places
from cluster.scoring import Taking, open_view
from data import storage
from data.errors import UserError
from data.partitions import Partitions, open_partitions
from eval.measure import local_pass
from eval.metrics.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS
from eval.observed import Digest, Extent, Observed, Sketch
from eval.planted import MEASURES, Measuring, measure, plant, room
from eval.power import Power, allowed, power_curves, power_of
from eval.report import ReportFigure, ReportSection, ReportTable, render_report

# A class with fewer samples in the whole set has, in one half, too few to be thinned to a share.
_SMALLEST_CLASS = 40
_FILES = ("study.png", "study.html", "study.json")


@dataclass(frozen=True)
class Plan:
    """What the study does with a set: see `manymodes study --help` for the fields."""

    keep: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    classes: tuple[str, ...] = ()
    splits: int = 20
    calibration: int = 80
    samples: int = 5000
    by_class: str | None = None
    seed: int = 0
    measuring: Measuring = field(default_factory=Measuring)

    def __post_init__(self) -> None:
        if not self.keep or not all(0 <= share < 1 for share in self.keep) or len(set(self.keep)) < len(self.keep):
            raise UserError(f"kept shares {list(self.keep)}: give different ones from 0 on, below 1")
        names = self.measuring.names
        if self.by_class is not None and self.by_class not in names:
            raise UserError(f"{self.by_class} by class: it is not among the scores taken ({', '.join(names)})")
        if any(MEASURES[name].calibrated for name in names):
            allowed(self.splits + self.calibration, self.measuring.level)

    @property
    def shown(self) -> str:
        """The score that is shown class by class."""
        names = self.measuring.names
        return self.by_class or ("ndb_holm" if "ndb_holm" in names else names[0])


@dataclass(frozen=True)
class Study:
    """Power of every score, every value behind it, and the protocol."""

    plan: Plan
    classes: dict[int, str]
    powers: dict[str, Power]
    values: dict[str, Any]
    protocol: dict[str, Any]

    def table(self) -> ReportTable:
        """Power by score and kept share, and false alarms."""
        columns = ["score", *(f"{100 * share:.3g} % kept" for share in self.plan.keep), "false alarms", "allowed"]
        rows = []
        for name, power in self.powers.items():
            cells = [_pm(rate, error) for rate, error in zip(power.rates, power.errors)]
            false = _pm(power.false_alarms, power.false_alarm_error)
            rows.append([MEASURES[name].label, *cells, false, f"{power.nominal:.3g}"])
        facts = self.protocol
        note = (
            f"Share of sets that raise an alarm, over {self.plan.splits} splits and {len(self.classes)} classes; ±: "
            "standard error over splits, given the thresholds; of false alarms, where the true rate is the allowed "
            "one. Thresholds for a split are fixed by the untouched samples of all others, of which "
            f"{self.plan.calibration} serve this alone; Holm and BH alarm by their own p-values. "
            f"{facts['n_samples']:,} samples against {facts['n_reference']:,}; KID, precision, recall, density, "
            f"coverage and sliced Wasserstein see {facts['n_pairwise']:,} of each."
        )
        return ReportTable("Power against planted collapse", columns, rows, note)

    def class_table(self) -> ReportTable:
        """Power of one score by class."""
        power, shares = self.powers[self.plan.shown], self.protocol["class_shares"]
        columns = ["class", "share of the set", *(f"{100 * share:.3g} % kept" for share in self.plan.keep)]
        rows = [
            [name, f"{100 * shares[name]:.2f} %", *(_pm(*pair) for pair in zip(rates, errors))]
            for name, rates, errors in zip(self.classes.values(), power.class_rates, power.class_errors)
        ]
        note = f"±: binomial standard error over {self.plan.splits} splits."
        return ReportTable(f"By class: {MEASURES[self.plan.shown].label}", columns, rows, note)

    def figure(self) -> bytes:
        """Power against kept share as PNG bytes."""
        title = f"Which score notices a thinned class? {self.protocol['reference']}"
        return power_curves(self.powers, self.plan.keep, self.plan.measuring.level, title)

    def finding(self) -> str:
        """Which score notices most often, of those whose false alarms are not above the allowed rate beyond chance."""
        level, splits = self.plan.measuring.level, self.plan.splits
        if 1 / splits > level:
            return (
                f"{splits} splits only demonstrate the study and name no best score: one false alarm in them is a rate "
                f"of {1 / splits:.2f} already, where {level:.3g} is allowed. Take at least {math.ceil(1 / level)} "
                "splits."
            )
        loud = [name for name, power in self.powers.items() if power.miscalibrated]
        told = ", ".join(f"{MEASURES[name].label} ({self.powers[name].false_alarms:.2f})" for name in loud)
        left_out = f" Miscalibrated, and left out of this: {told}, which untouched samples alarm too often."
        if len(loud) == len(self.powers):
            return f"No score keeps to the allowed rate of false alarms, {level:.3g}: {told}."
        # One share alone may favour a score whose threshold was lucky.
        best = max((name for name in self.powers if name not in loud), key=lambda name: sum(self.powers[name].rates))
        power = self.powers[best]
        rates = ", ".join(
            f"{_pm(*pair)} where {100 * share:.3g} % are kept"
            for share, *pair in zip(self.plan.keep, power.rates, power.errors)
        )
        false = _pm(power.false_alarms, power.false_alarm_error)
        return (
            f"The score that notices most often is {MEASURES[best].label}: {rates}; untouched samples alarm it at a "
            f"rate of {false}, where {power.nominal:.3g} is allowed.{left_out if loud else ''}"
        )

    def save(self, folder: str, seconds: dict[str, float]) -> None:
        """Writes study.png, study.html and, last, study.json into a folder or URL, each whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        picture = self.figure()
        lead = (
            f"One class of {self.protocol['reference']} after the other is removed or thinned, in {self.plan.splits} "
            f"random splits into reference and samples. {self.finding()}"
        )
        caption = (
            "A steep curve notices early. Left: untouched samples, where every alarm is false. Standard errors are in "
            "the table."
        )
        sections = [
            ReportSection("Power", figures=[ReportFigure("Power", picture, caption, "Power against kept share")]),
            ReportSection("Which classes are hard", table=self.class_table()),
        ]
        timing = ReportTable("Stages", ["stage", "seconds"], [[name, f"{took:.1f}"] for name, took in seconds.items()])
        facts = {name: _told(value) for name, value in self.protocol.items() if not isinstance(value, dict)}
        page = render_report("manymodes: planted collapse", self.table(), sections, facts, timing, lead)
        scores = {name: power.to_dict() for name, power in self.powers.items()}
        document = {"protocol": self.protocol, "scores": scores, "values": self.values, "seconds": seconds}
        with storage.publish(storage.join(folder, _FILES[0])) as handle:
            handle.write(picture)
        storage.write_text(storage.join(folder, _FILES[1]), page)
        storage.write_text(storage.join(folder, _FILES[2]), json.dumps(document) + "\n")


def run_study(
    place: str, plan: Plan, taking: Taking, stages: Stages, *, out: str, features: str | None = None
) -> Study:
    """Splits a labelled set again and again, thins a class in one half, and asks every score whether it notices.

    Every split is a random half as reference and another as samples, without replacement, with bins and statistics of
    its own; so untouched samples follow the permutation distribution of each score. The untouched samples of all other
    splits fix the threshold for each; more splits serve for that alone. All sets of all splits have one size, that of
    the smallest.

    Args:
        place: see `open_partitions`; it needs labels. What has no splits is taken whole.
        plan: of the study.
        taking: how the place is read.
        stages: for progress.
        out: folder that the files will be written to; refused early where it cannot be one.
        features: spec of an extractor; the samples' own values where None.

    Raises:
        UserError: no labels, an unknown or too small class, or too few samples.
    """
    if storage.is_local(storage.check_url(out)):
        check_places(*(Path(storage.check_url(out)) / name for name in _FILES))
    view = open_view(features, None, taking.tracking_uri)
    partitions = open_partitions(place, split=taking.split, size=taking.size, grey=taking.grey, whole=True)
    taking.require(place, partitions.shape)
    with stages.stage("read samples", unit="samples") as advance:
        digest = {} if partitions.fingerprint else {"digest": Digest()}
        over = local_pass(partitions, view, advance)
        seen = over({"extent": Extent(), "pool": _Labelled(partitions.n, plan.seed), **digest})
    x, labels = seen["pool"].final()
    classes = _classes(partitions, labels, plan.classes)
    half = min(plan.samples, len(x) // 2)
    groups = {"calibrate": plan.calibration, "judge": plan.splits}
    every = (_splits(plan.seed, number, splits, len(x), half) for number, splits in enumerate(groups.values()))
    n = min(room(labels[rows], list(classes), plan.keep) for _, _, rows in itertools.chain(*every))
    if min(n, half) < plan.measuring.n_bins:
        raise UserError(
            f"{partitions.name}: {n} of {half} samples are left beside the largest class, for {plan.measuring.n_bins} "
            "bins: take fewer --bins, other --classes, or a larger set"
        )
    values: dict[str, dict[str, np.ndarray]] = {}
    for number, (stage, splits) in enumerate(groups.items()):
        keep = plan.keep if stage == "judge" else ()
        found = []
        with stages.stage(stage, total=splits, unit="splits") as advance:
            for done, (rng, known, rows) in enumerate(_splits(plan.seed, number, splits, len(x), half), 1):
                masks = plant(labels[rows], list(classes), keep, n, rng)
                seed = int(rng.integers(2**31))
                found.append(measure(x[known], x[rows], masks, plan.measuring, seed))
                advance(done)
        values[stage] = {name: np.stack([each[name] for each in found]) for name in plan.measuring.names}
    powers, shape = {}, (plan.splits, len(classes), len(plan.keep))
    kept: dict[str, Any] = {"calibration": {}, "untouched": {}, "thinned": {}}
    for name in plan.measuring.names:
        calibration, judged = values["calibrate"][name][:, 0], values["judge"][name]
        thinned = judged[:, 1:].reshape(shape)
        powers[name] = power_of(MEASURES[name], plan.measuring.level, calibration, judged[:, 0], thinned)
        for part, array in zip(kept.values(), (calibration, judged[:, 0], thinned)):
            part[name] = array.tolist()
    counts = np.array([np.count_nonzero(labels == label) for label in classes])
    protocol = {
        "reference": partitions.name,
        "source": place,
        "fingerprint": partitions.fingerprint or seen["digest"].hexdigest(),
        "split": taking.split,
        "size": taking.size,
        "grey": taking.grey,
        "scale": partitions.scale,
        "sample_shape": list(seen["extent"].shape),
        "space": view.space.name,
        "space_fingerprint": view.space.fingerprint,
        "n_set": seen["extent"].n,
        "n_used": len(x),
        "n_reference": half,
        "n_samples": n,
        "n_pairwise": min(n, half, plan.measuring.subsample),
        "classes": list(classes.values()),
        "class_labels": list(classes),
        "class_shares": dict(zip(classes.values(), (counts / len(x)).tolist())),
        "keep": list(plan.keep),
        "splits": plan.splits,
        "calibration_splits": plan.calibration,
        "level": plan.measuring.level,
        "bins": plan.measuring.n_bins,
        "initialisations": plan.measuring.n_init,
        "scores": list(plan.measuring.names),
        "by_class": plan.shown,
        "seed": plan.seed,
        "random_numbers": "numpy.random.default_rng([seed, 0 for calibration or 1, number of the split])",
        "threads": torch.get_num_threads(),
        "pairwise": "first samples of each set; KID: unbiased MMD² of one subset; sliced Wasserstein: p = 2, 500 "
        f"directions; precision, recall: {NEIGHBOURS} neighbours, density, coverage: {DENSITY_NEIGHBOURS}",
    }
    return Study(plan, classes, powers, kept, protocol)


class _Labelled:
    """A random subset of the set, all that fits into 1 GiB: features, with the label as one more column."""

    def __init__(self, n: int | None, seed: int) -> None:
        self.sketch = Sketch(None, n, seed)

    def observe(self, seen: Observed) -> None:
        if seen.labels is None or seen.labels.min() < 0:
            raise UserError("no labels: the study plants collapse by class; give a labelled set")
        labels = seen.labels[:, None].astype(np.float32)
        self.sketch.observe(replace(seen, features=np.concatenate([seen.features, labels], axis=1)))

    def merge(self, other: Self) -> None:
        self.sketch.merge(other.sketch)

    def final(self) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, d] and labels [n]."""
        found = self.sketch.features()
        return np.ascontiguousarray(found[:, :-1]), found[:, -1].astype(np.int64)


def _splits(
    seed: int, group: int, splits: int, n: int, half: int
) -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
    """Per split: its random numbers, the rows of the reference and those of the samples, both in random order."""
    for number in range(splits):
        rng = np.random.default_rng([seed, group, number])
        order = rng.permutation(n)
        yield rng, order[:half], order[half : 2 * half]


def _classes(partitions: Partitions, labels: np.ndarray, wanted: Sequence[str]) -> dict[int, str]:
    """The names of the classes that are thinned, by their labels."""
    known, counts = np.unique(labels, return_counts=True)
    names = partitions.class_names
    called = {int(label): names[label] if names and label < len(names) else str(label) for label in known}
    by_name = {name: label for label, name in called.items()} | {str(label): label for label in called}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UserError(f"{partitions.name}: no class {unknown[0]}: choose from {', '.join(called.values())}")
    chosen = sorted({by_name[name] for name in wanted} or called)
    sizes = dict(zip(known.tolist(), counts.tolist()))
    for label in chosen:
        if sizes[label] < _SMALLEST_CLASS:
            raise UserError(
                f"{partitions.name}: class {called[label]} has {sizes[label]} samples, fewer than {_SMALLEST_CLASS}: "
                "leave it out by --classes"
            )
    return {label: called[label] for label in chosen}


def _pm(rate: float, error: float) -> str:
    return f"{rate:.2f} ± {error:.2f}"


def _told(value: Any) -> Any:
    return ", ".join(str(each) for each in value) if isinstance(value, list) else value
