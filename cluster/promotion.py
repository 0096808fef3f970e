"""A candidate takes the champion's place in the registry, unless it is worse by the champion's own yardstick."""

from __future__ import annotations

import getpass
import json
import os
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster.models import LocalClassifier, LocalModel, open_model
from cluster.progress import Stages
from cluster.questions import samples_for
from cluster.recipe import RegistrySettings
from cluster.scoring import Looking, ReferenceOptions, Taking, is_reference, open_set, reference_of, running, score_sets
from data import storage
from data.errors import UserError
from data.manifest import MANIFEST, load_manifest
from deploy.registry import COMPLETE, REFERENCE_ARTIFACT, Entry, fetch_artifacts, find_entry, point_alias
from eval.challenge import Contest, contest_js, contest_means, contest_ndb, contest_paired
from eval.evaluate import Rule
from eval.report import ReportTable
from eval.scores import ScoreSettings
from trainer.tracking import mlflow_client, mlflow_errors, resolve_uri


@dataclass(frozen=True)
class Protocol:
    """How candidate and champion are compared.

    `reference` is a fitted reference that takes the place of the champion's own, `data` the held-out data whose
    `split` gives log-likelihoods (by default the champion's, where it is still there); `margin` is what the candidate
    may lose of them beyond chance, in nats.
    """

    n: int = 10_000
    seed: int = 0
    reference: str | None = None
    data: str | None = None
    split: str = "test"
    features: str | None = None
    margin: float = 0.0


@dataclass
class Outcome:
    """What a promotion found and did.

    `contests` are empty where there was no champion; `facts` are tags; `uncompared` says why `--force` was needed to
    promote what could not be compared.
    """

    candidate: Entry
    champion: Entry | None
    contests: list[Contest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    uncompared: str | None = None
    promoted: bool = False

    @property
    def worse(self) -> list[Contest]:
        """The scores that speak against the candidate."""
        return [contest for contest in self.contests if contest.worse]

    def table(self) -> ReportTable:
        """All scores side by side."""
        champion = "–" if self.champion is None else f"champion (version {self.champion.version})"
        columns = ["score", f"candidate (version {self.candidate.version})", champion, "verdict"]
        rows = [[c.score, c.candidate, c.champion, "worse" if c.worse else "not worse"] for c in self.contests]
        return ReportTable(f"{self.candidate.name}: candidate and champion", columns, rows, " ".join(self.notes))


def promote(
    name: str,
    protocol: Protocol,
    *,
    source: str = "candidate",
    target: str = "champion",
    tracking_uri: str | None = None,
    force: bool = False,
    stages: Stages | None = None,
) -> Outcome:
    """Compares what the alias `source` points at with what `target` does, and moves `target` where it is not worse.

    Both draw samples that are judged by one reference: the one that the champion was judged by in its own run, so
    that a candidate cannot bring a yardstick that lacks what it lacks itself. Rules: see `eval.challenge`. Without a
    champion the candidate only has to be complete. `force` promotes whatever is found, and that is recorded.

    Raises:
        UserError: no candidate, an incomplete one, or no common yardstick.
    """
    uri, stages = resolve_uri(tracking_uri), stages or Stages()
    if source == target:
        raise UserError(f"--from and --to are both {source}: name two aliases")
    try:
        RegistrySettings(alias=target)
    except ValidationError as error:
        raise UserError(
            f"--to {target!r} cannot be an alias: letters, digits, _ and -, no latest, v1, v2, ..."
        ) from error
    candidate = find_entry(name, uri, source)
    if candidate is None:
        raise UserError(f"{name} has no version with the alias {source}: give --from another alias, or train one")
    champion = find_entry(name, uri, target)
    outcome = Outcome(candidate, champion)
    if champion is not None and champion.version == candidate.version:
        outcome.promoted = True
        outcome.notes.append(f"Version {candidate.version} is {target} already.")
        return outcome
    model = _complete(candidate, uri)
    if champion is not None:
        try:
            _compare(outcome, model, champion, protocol, uri, stages)
        except UserError as error:
            if not force:
                raise
            outcome.uncompared = str(error)
    if outcome.worse and not force:
        return outcome
    tags = {**_lineage(candidate, uri), **_record(outcome, target)}
    point_alias(candidate, target, uri, tags=tags, over=None if champion is None else champion.version)
    outcome.promoted = True
    return outcome


def _complete(entry: Entry, uri: str) -> LocalModel:
    """The candidate's model, if it was registered to the end, its run has ended well, and it works."""
    what = f"{entry.name} version {entry.version}"
    if entry.tags.get(COMPLETE) != "true":
        raise UserError(f"{what} was not registered to the end: call its job again")
    with mlflow_errors(uri):
        status = mlflow_client(uri).get_run(entry.run_id).info.status
    if status != "FINISHED":
        raise UserError(f"{what}: its run {entry.run_id} is {status.lower()}, not finished: call its job again")
    model = open_model(entry.uri, uri)
    if hasattr(model.model, "sample"):
        model.sample(2, 0)
    return model


def _compare(
    outcome: Outcome, candidate: LocalModel, champion: Entry, protocol: Protocol, uri: str, stages: Stages
) -> None:
    incumbent = open_model(champion.uri, uri)
    for what in ("shape", "levels"):
        if candidate.data[what] != incumbent.data[what]:
            raise UserError(
                f"{champion.name}: the candidate's {what} is {candidate.data[what]}, the champion's "
                f"{incumbent.data[what]}: models of different data do not compare; use another name (registry.name)"
            )
    if candidate.data["fingerprint"] != incumbent.data["fingerprint"]:
        outcome.notes.append("They were trained on different data, and are judged by the champion's.")
    draws = [hasattr(each.model, "sample") for each in (candidate, incumbent)]
    if draws[0] != draws[1]:
        raise UserError(f"{champion.name}: one of candidate and champion draws samples, the other does not")
    if all(draws):
        _compare_samples(outcome, champion, protocol, uri, stages)
    with stages.stage("compare held-out data"):
        _compare_values(outcome, candidate, incumbent, champion, protocol, uri)


def _compare_samples(outcome: Outcome, champion: Entry, protocol: Protocol, uri: str, stages: Stages) -> None:
    entries = {"candidate": outcome.candidate, "champion": champion}
    taking = Taking(n=protocol.n, seed=protocol.seed, tracking_uri=uri)
    with tempfile.TemporaryDirectory() as folder:
        place = _yardstick(outcome, champion, protocol, uri, folder)
        with running(Looking(features=protocol.features, tracking_uri=uri), stages) as runner:
            reference, _ = reference_of(runner, place, taking, ReferenceOptions((), ScoreSettings(())))
            comparison = score_sets(
                *(runner, {name: open_set(entry.uri, taking) for name, entry in entries.items()}, reference, None),
                rule=Rule(),
                scores=ScoreSettings(()),
            )
    for one, other in zip(comparison.rows[0].evaluations, comparison.rows[1].evaluations, strict=True):
        outcome.contests += [contest_ndb(one.result, other.result), contest_js(one.result, other.result)]
    first, protocol_of = comparison.rows[0].evaluation.result, comparison.rows[0].evaluation.protocol
    outcome.facts |= {
        "promotion.bins": str(protocol_of["bins_fingerprint"]),
        "promotion.protocol": f"{first.n_samples} samples each, seed {protocol.seed}, {first.bins} bins of "
        f"{first.n_reference} samples of {reference.name}",
    }
    outcome.notes.append(f"Samples: {first.n_samples:,} of each, by {first.bins} bins of {reference.name}.")


def _yardstick(outcome: Outcome, champion: Entry, protocol: Protocol, uri: str, folder: str) -> str:
    """The folder of the reference that both are judged by."""
    if protocol.reference is not None:
        if not is_reference(protocol.reference):
            raise UserError(f"{protocol.reference}: no fitted reference there: make one with `manymodes reference`")
        return protocol.reference
    found = fetch_artifacts(champion.run_id, REFERENCE_ARTIFACT, folder, uri)
    candidate = outcome.candidate
    if found is None and candidate.tags.get("data.fingerprint") == champion.tags.get("data.fingerprint"):
        found = fetch_artifacts(candidate.run_id, REFERENCE_ARTIFACT, folder, uri)
    if found is None:
        raise UserError(
            f"the run of {champion.name} version {champion.version} keeps no reference: fit one to the data that "
            "both should cover (`manymodes reference`) and give it by --reference"
        )
    return found


def _compare_values(
    outcome: Outcome,
    candidate: LocalModel,
    incumbent: LocalModel,
    champion: Entry,
    protocol: Protocol,
    uri: str,
) -> None:
    """Log-likelihood (of classifiers: cross-entropy and accuracy) on the same samples, or as they were recorded."""
    models = (candidate, incumbent)
    classify = all(isinstance(model, LocalClassifier) for model in models)
    if not classify and not all(model.is_density for model in models):
        return
    place = protocol.data or _data_of(champion, uri)
    if place is not None:
        blocks = samples_for(incumbent, place, split=protocol.split, seed=protocol.seed)
        values = [_values(models, block, classify) for block in blocks]
        for score in values[0]:
            ours, theirs = (np.concatenate([value[score][side] for value in values]) for side in (0, 1))
            outcome.contests.append(contest_paired(score, ours, theirs, **_terms(score, protocol)))
        return
    entries = (outcome.candidate, champion)
    if len({entry.tags.get("data.fingerprint") for entry in entries}) > 1:
        outcome.notes.append("No likelihoods: they were recorded on different data; name held-out data by --data.")
        return
    for name, score in _RECORDED.items():
        found = [(entry.tags.get(name), entry.tags.get(f"{name}_se")) for entry in entries]
        if all(mean and error for mean, error in found):
            pairs = [(float(mean or 0), float(error or 0)) for mean, error in found]
            outcome.contests.append(contest_means(score, *pairs, **_terms(score, protocol)))


def _terms(score: str, protocol: Protocol) -> dict[str, Any]:
    return {
        "higher_is_better": score != _CROSS_ENTROPY,
        "margin": 0.0 if score == _ACCURACY else protocol.margin,
    }


_LOG_LIKELIHOOD, _CROSS_ENTROPY, _ACCURACY = "test log-likelihood (nats)", "test cross-entropy (nats)", "test accuracy"
_RECORDED = {
    "test_log_likelihood": _LOG_LIKELIHOOD,
    "test_cross_entropy": _CROSS_ENTROPY,
    "test_accuracy": _ACCURACY,
}


def _values(models: tuple[LocalModel, LocalModel], block: Any, classify: bool) -> dict[str, list[np.ndarray]]:
    """Every score's value of every sample of a block, of both models."""
    if not classify:
        return {_LOG_LIKELIHOOD: [model.log_prob(block.x) for model in models]}
    if block.label is None:
        raise UserError("the held-out data has no labels to compare classifiers by: give others by --data")
    logs = [model.log_probabilities(block.x) for model in models if isinstance(model, LocalClassifier)]
    rows = np.arange(len(block.x))
    return {
        _CROSS_ENTROPY: [-log[rows, block.label] for log in logs],
        _ACCURACY: [(log.argmax(1) == block.label).astype(np.float64) for log in logs],
    }


def _data_of(entry: Entry, uri: str) -> str | None:
    """The packed data of an entry's run, where it still lies unchanged at the recorded place."""
    with mlflow_errors(uri):
        recorded = mlflow_client(uri).get_run(entry.run_id).inputs.dataset_inputs
    for found in recorded:
        with suppress(UserError, ValueError, OSError):
            source = json.loads(found.dataset.source)
            place = storage.check_url(str(source.get("uri") or source.get("url")))
            known = storage.exists(storage.join(place, MANIFEST))
            if known and load_manifest(place).fingerprint == entry.tags.get("data.fingerprint"):
                return place
    return None


def _lineage(entry: Entry, uri: str) -> dict[str, str]:
    """Run, recipe and data as tags; versions that were registered before these were tags get them now."""
    with mlflow_errors(uri):
        run = mlflow_client(uri).get_run(entry.run_id)
    recipe = entry.tags.get("recipe") or run.data.tags.get("recipe", "unknown")
    return {"run": entry.run_id, "recipe": recipe}


def _record(outcome: Outcome, target: str) -> dict[str, str]:
    """What is kept of the promotion with the version, who and when among it."""
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    who = f"{_user()}@{socket.gethostname()}"
    over = "none" if outcome.champion is None else str(outcome.champion.version)
    tags = {"promotion.to": target, "promotion.at": stamp, "promotion.by": who, "promotion.over": over, **outcome.facts}
    for contest in outcome.contests:
        tags[f"promotion.score.{contest.score.split(' (')[0]}"] = f"{contest.candidate}; champion {contest.champion}"
    if outcome.worse or outcome.uncompared:
        why = outcome.uncompared or "; ".join(contest.text for contest in outcome.worse)
        tags["promotion.forced"] = f"{stamp} by {who}, although: {why}"
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
