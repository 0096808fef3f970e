"""Drift: a new batch against a fitted reference, with a history that judges all batches together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from data import storage
from data.errors import UserError, io_error
from eval.comparison import Row
from eval.metrics import ndb

_FORMAT = 1
# Samples in one bin of one batch; sums of them stay exact.
_MOST = 2**48
DEFAULT_LEVEL = 0.001
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Thresholds:
    """A set has drifted where more than `ndb` bins differ, or JS (nats) is above `js`.

    Bins differ by Holm's correction at `level` / 2; `js` None is what two sets of one distribution exceed at a rate of
    `level` / 2. With `ndb` 0 and `js` None a set of the reference's distribution is thus said to have drifted at a
    rate of `level` at most. The rate is over references too: batches that are held against one share its luck.
    """

    level: float = DEFAULT_LEVEL
    ndb: int = 0
    js: float | None = None


def verdict(result: ndb.NDBResult, thresholds: Thresholds) -> dict[str, Any]:
    """JSON-safe: the corrected NDB and JS, their limits, the rule in words, and whether a limit is passed."""
    half = thresholds.level / 2
    limit = result.js_limit(half) if thresholds.js is None else thresholds.js
    found, _ = result.corrected(half)
    chance = f"exceeded by chance at a rate of {half:g}" if thresholds.js is None else "as given"
    return {
        "ndb_holm": found,
        "ndb_limit": thresholds.ndb,
        "js": result.js,
        "js_limit": limit,
        "level": thresholds.level,
        "rule": f"more than {thresholds.ndb} bins by Holm's correction at {half:g}, or JS above its limit ({chance})",
        "drift": bool(found > thresholds.ndb or result.js > limit),
    }


def record(row: Row, thresholds: Thresholds, history: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Appends a batch to the history (one JSON object a line); returns its verdict and that of all batches together.

    Counts add, so all batches are judged without reading them again. A batch that is there already (the same
    samples) takes the place of the earlier one; one that shall no longer count is removed by deleting its line.

    Raises:
        UserError: the history is damaged, of other bins, or cannot be written.
    """
    evaluation = row.evaluation
    result, protocol = evaluation.result, evaluation.protocol
    place = storage.check_url(history)
    looked = ("space", "space_fingerprint", "classifier", "classifier_fingerprint", "labelled_by")
    entry = {
        "format": _FORMAT,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": row.name,
        "samples_fingerprint": protocol["samples_fingerprint"],
        "bins_fingerprint": protocol["bins_fingerprint"],
        **{name: protocol[name] for name in looked if name in protocol},
        "n": result.n_samples,
        **verdict(result, thresholds),
        "counts": result.sample_counts.tolist(),
    }
    with _alone(place):
        entries = [old for old in _read(place, entry) if old["samples_fingerprint"] != entry["samples_fingerprint"]]
        entries.append(entry)
        storage.write_text(place, "".join(json.dumps(each) + "\n" for each in entries))
    counts = np.sum([each["counts"] for each in entries], axis=0)
    together = ndb.score(result.reference_counts, counts, significance=thresholds.level)
    return entry, {"batches": len(entries), "n": int(counts.sum()), **verdict(together, thresholds)}


@contextmanager
def _alone(place: str) -> Iterator[None]:
    """Keeps other processes of this machine from the history; in an object store the last one wins."""
    if not storage.is_local(place):
        yield
        return
    lock = FileLock(f"{place}.lock", timeout=_LOCK_SECONDS)
    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{place}.lock: another process has held it for {_LOCK_SECONDS:g} s, or no lock can be had in this folder: "
            "try again, or name another --history"
        ) from error
    except OSError as error:
        raise io_error(error, place, "write") from error
    try:
        yield
    finally:
        lock.release()


def _read(place: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    if not storage.exists(place):
        return []
    found = []
    for number, line in enumerate(storage.read_bytes(place).decode(errors="replace").splitlines(), start=1):
        try:
            old = json.loads(line)
            counts, known, _ = old["counts"], old["bins_fingerprint"], old["samples_fingerprint"]
            if not all(type(count) is int and 0 <= count <= _MOST for count in counts):
                raise ValueError("counts are whole numbers")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{place}: line {number} is no record of a batch: repair or remove it") from error
        if known != entry["bins_fingerprint"] or len(counts) != len(entry["counts"]):
            raise UserError(
                f"{place}: line {number} is of bins {str(known)[:12]}, this batch of {entry['bins_fingerprint'][:12]}: "
                "give each reference a history of its own"
            )
        found.append(old)
    return found
