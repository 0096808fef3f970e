"""Watching batches for drift: the exit code, the history, and the rate of false alarms."""

import json

import numpy as np
from filelock import FileLock
from scored import FEW, blobs, run

from cluster.watch import Thresholds, verdict
from data.errors import UserError
from eval.metrics import ndb


def test_watch_tells_drift_by_its_exit_code_and_keeps_a_history(sets):
    run("reference", "known.npz", "--out", "ref", *FEW)
    quiet = run("watch", "same.npy", "--reference", "ref", "--history", "h/history.jsonl", "--json")
    assert quiet.exit_code == 0, quiet.exception
    loud = run("watch", "part.npy", "--reference", "ref", "--history", "h/history.jsonl", "--json")
    assert loud.exit_code == 3
    found = json.loads(loud.stdout)
    assert found["batch"]["drift"]
    assert found["all"]["batches"] == 2
    lines = [json.loads(line) for line in (sets / "h/history.jsonl").read_text().splitlines()]
    assert found["all"]["n"] == sum(line["n"] for line in lines)
    again = json.loads(run("watch", "part.npy", "--reference", "ref", "--history", "h/history.jsonl", "--json").stdout)
    assert again["all"] == found["all"]  # the same samples once more: no new batch
    assert all(line["level"] == 0.001 and "at 0.0005" in line["rule"] and line["space"] == "pixels" for line in lines)
    # A quiet batch behind a loud history: all batches together have drifted.
    more = blobs(3000, 9)
    near = np.square(more - np.load("known.npz")["x"][:1]).sum((1, 2, 3)) < 2.5
    np.save("more.npy", more[~near])
    np.save("quiet.npy", blobs(300, 7))
    assert run("watch", "more.npy", "--reference", "ref", "--history", "h/history.jsonl").exit_code == 3
    third = run("watch", "quiet.npy", "--reference", "ref", "--history", "h/history.jsonl", "--json")
    found = json.loads(third.stdout)
    assert (found["batch"]["drift"], found["all"]["drift"], third.exit_code) == (False, True, 3)
    run("reference", "same.npy", "--out", "other", *FEW)
    refused = run("watch", "part.npy", "--reference", "other", "--history", "h/history.jsonl")
    assert "history of its own" in str(refused.exception)
    unfitted = run("watch", "same.npy", "--reference", "known.npz", "--history", "h")
    assert "no fitted reference" in str(unfitted.exception)


def test_watch_alarms_at_its_rate():
    """200 batches of 3 samples a bin at 5 %: more than 22 alarms have odds of 1e-4; the union of two tests is bound."""
    rng, p = np.random.default_rng(3), np.random.default_rng(2).dirichlet(np.full(60, 2.0))
    found = [
        verdict(ndb.score(rng.multinomial(180, p), rng.multinomial(180, p)), Thresholds(level=0.05))["drift"]
        for _ in range(200)
    ]
    assert sum(found) <= 22


def test_a_damaged_history_is_told_and_kept(sets):
    watch = ("watch", "same.npy", "--reference", "ref", "--history", "h")
    run("reference", "known.npz", "--out", "ref", *FEW)
    assert run(*watch).exit_code == 0
    entry = {**json.loads((sets / "h").read_text()), "samples_fingerprint": "other"}
    counts = (5, [1.5] * 10, [-1] * 10, [10**30] * 10, [[1]] * 10)
    faults = [json.dumps({**entry, "counts": each}) for each in counts]
    for line in [*faults, "[" * 200_000, "[]", json.dumps(entry)[:-9]]:
        (sets / "h").write_text(line)
        refused = run(*watch)
        assert isinstance(refused.exception, UserError), line[:99]
        assert "line 1 is no record" in str(refused.exception)
        assert (sets / "h").read_text() == line


def test_a_history_that_another_process_holds_is_told(sets, monkeypatch):
    monkeypatch.setattr("cluster.watch._LOCK_SECONDS", 0.1)
    run("reference", "known.npz", "--out", "ref", *FEW)
    with FileLock("h.lock"):
        refused = run("watch", "same.npy", "--reference", "ref", "--history", "h")
    assert isinstance(refused.exception, UserError)
    assert "another process" in str(refused.exception)
