"""Feature extractors of `eval.features`, and those that are this project's own classifiers and encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.models import LocalClassifier, LocalModel, open_autoencoder, open_classifier
from data import storage
from data.errors import UserError
from eval import features
from eval.features import Extractor

SPECS = f"{features.SPECS}, classifier:models:/NAME@ALIAS or classifier:FOLDER (of a run), encoder: likewise"
_OPEN: dict[str, Callable[..., LocalModel]] = {"classifier": open_classifier, "encoder": open_autoencoder}


def open_extractor(spec: str, tracking_uri: str | None = None) -> Extractor:
    """Opens a feature extractor: a spec of `eval.features.open_extractor`, `classifier:PLACE`, or `encoder:PLACE`.

    PLACE is models:/NAME@ALIAS or a run's --out folder; features are the activations of the classifier's last hidden
    layer, or the autoencoder's codes. Its fingerprint, which `#sha256=HEX` at the end pins, is that of
    `weights.safetensors`.

    Raises:
        UserError: an unknown spec, or nothing there that can be opened.
    """
    bare, pin = features.split_pin(spec)
    kind, _, place = bare.partition(":")
    if kind not in _OPEN:
        if bare.partition(":")[0] not in features.KINDS:
            raise UserError(f"unknown feature extractor {spec!r}: choose one of {SPECS}")
        return features.open_extractor(spec)
    if not place:
        raise UserError(f"{spec!r} names no {kind}: give {kind}:models:/NAME@ALIAS or {kind}:FOLDER")
    registered = place.startswith("models:")
    whole = place if registered else storage.check_url(place)
    opened = _OPEN[kind](whole, tracking_uri)
    digest = storage.sha256(storage.join(opened.folder, "weights.safetensors"))
    features.check_pin(place, digest, pin)
    name = f"{kind}:{place if registered else Path(whole).name}"
    shape, device = tuple(opened.data["shape"]), features.network_device()
    network = opened.model.to(device)

    def function(x: np.ndarray) -> Any:
        if x.shape[1:] != shape and (*x.shape[1:], 1) != shape:
            raise UserError(f"{name}: samples of shape {list(x.shape[1:])}, its {kind} knows {list(shape)}")
        rows = torch.from_numpy(x).flatten(1).to(device)
        if kind == "encoder":
            return network.encode(rows)
        found = network.features(rows)
        return found, network.head(found)

    spec = f"{kind}:{whole}#sha256={digest}"
    if kind == "encoder":
        return Extractor(name, spec, digest, function, n_features=network.n_latent)
    accuracy = opened.test_accuracy if isinstance(opened, LocalClassifier) else None
    note = "test accuracy unknown" if accuracy is None else f"test accuracy {accuracy:.2%}"
    return Extractor(name, spec, digest, function, n_features=network.n_hidden, note=note, of_labels=True)
