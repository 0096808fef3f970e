"""Feature extractors of `eval.features`, and those that are this project's own classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.models import open_classifier
from data import storage
from data.errors import UserError
from eval import features
from eval.features import Extractor

SPECS = f"{features.SPECS}, classifier:models:/NAME@ALIAS or classifier:FOLDER (of a run)"


def open_extractor(spec: str, tracking_uri: str | None = None) -> Extractor:
    """Opens a feature extractor: a spec of `eval.features.open_extractor`, or `classifier:PLACE`.

    PLACE is models:/NAME@ALIAS or a run's --out folder; features are the activations of the classifier's last hidden
    layer. Its fingerprint, which `#sha256=HEX` at the end pins, is that of `weights.safetensors`.

    Raises:
        UserError: an unknown spec, or nothing there that can be opened.
    """
    bare, pin = features.split_pin(spec)
    kind, _, place = bare.partition(":")
    if kind != "classifier":
        if bare.partition(":")[0] not in features.KINDS:
            raise UserError(f"unknown feature extractor {spec!r}: choose one of {SPECS}")
        return features.open_extractor(spec)
    if not place:
        raise UserError(f"{spec!r} names no classifier: give classifier:models:/NAME@ALIAS or classifier:FOLDER")
    registered = place.startswith("models:")
    whole = place if registered else storage.check_url(place)
    opened = open_classifier(whole, tracking_uri)
    digest = storage.sha256(storage.join(opened.folder, "weights.safetensors"))
    features.check_pin(place, digest, pin)
    name = f"classifier:{place if registered else Path(whole).name}"
    shape, device = tuple(opened.data["shape"]), features.network_device()
    network = opened.model.to(device)

    def function(x: np.ndarray) -> Any:
        if x.shape[1:] != shape and (*x.shape[1:], 1) != shape:
            raise UserError(f"{name}: samples of shape {list(x.shape[1:])}, its classifier knows {list(shape)}")
        found = network.features(torch.from_numpy(x).flatten(1).to(device))
        return found, network.head(found)

    accuracy = opened.test_accuracy
    note = "test accuracy unknown" if accuracy is None else f"test accuracy {accuracy:.2%}"
    spec = f"classifier:{whole}#sha256={digest}"
    return Extractor(name, spec, digest, function, n_features=network.n_hidden, note=note, of_labels=True)
