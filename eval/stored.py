"""Statistics of partitions that are kept: a set that grew or shrank is judged again by reading only what is new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from data import storage
from data.errors import UserError
from data.partitions import Partitions
from eval.measure import View, light, observe_partition

# Changes when what is stored under a name does.
_FORMAT = 3
# Under this name a file holds the SHA-256 of all that is in it: a flipped bit would else be a wrong score.
_SUM = "sha256"


def observe_stored(
    partitions: Partitions, number: int, view: View, observers: Mapping[str, Any], store: str | None
) -> Mapping[str, Any]:
    """`observe_partition`, but from `store` where the same was observed of the same partition before.

    A file belongs to the partition's content, the view, and the observers' settings: its name is their fingerprint.
    Observers without `identity` and `restored` are never stored, nor is what is observed together with them.

    Raises:
        UserError: as `observe_partition` and `check_lasting`; or the store cannot be written.
    """
    if store is None or not all(hasattr(observer, "restored") for observer in observers.values()):
        return observe_partition(partitions, number, view, observers)
    check_lasting(partitions)
    facts = [
        _FORMAT,
        partitions.keys[number],
        partitions.seeds[number],
        partitions.scale,
        [[part.fingerprint, part.name] if part else None for part in (view.features, view.classifier)],
        {name: observer.identity() for name, observer in observers.items()},
    ]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    place = storage.join(store, f"{name}.safetensors")
    if storage.exists(place):
        return _restored(place, observers, number)
    found = observe_partition(partitions, number, view, observers)
    arrays = {
        f"{name} {key}": np.asarray(value, order="C")
        for name, observer in found.items()
        for key, value in observer.arrays().items()
    }
    with storage.publish(place) as handle:
        handle.write(save_tensors({**arrays, _SUM: np.frombuffer(_digest(arrays), np.uint8)}))
    return found


def check_lasting(partitions: Partitions) -> None:
    """Raises UserError for a set whose content may change under the same keys: what is stored of it would deceive."""
    if not partitions.lasting:
        raise UserError(
            f"{partitions.name}: nothing here tells whether its content has changed, so no statistics are kept of it: "
            "leave out --store, or pack it first"
        )


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.digest()


def _restored(place: str, observers: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    try:
        arrays = load_tensors(storage.read_bytes(place))
        if arrays.pop(_SUM).tobytes() != _digest(arrays):
            raise ValueError("its checksum differs")
        found = {}
        for name, observer in observers.items():
            own = {key[len(name) + 1 :]: value for key, value in arrays.items() if key.startswith(f"{name} ")}
            found[name] = observer.restored(own, number)
        return light(found)
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{place} is damaged: remove it, and it is made again") from error
