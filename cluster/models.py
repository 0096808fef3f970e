"""Opens a model wherever it is: in the MLflow registry, or in the folder of a run."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import Any, TypeVar

import numpy as np
import torch

from data import storage
from data.errors import UserError
from data.sources import is_spec
from trainer.checkpoint import load_model


class LocalModel:
    """A model in a folder, NumPy in and NumPy out, in batches.

    `data` says what it was trained on: name, shape, levels (None where it is no density of dequantised pixels),
    fingerprint. What the model cannot do is refused in one line.

    Raises:
        UserError: the folder holds no model, or a damaged one.
    """

    def __init__(self, folder: str, batch: int = 1024) -> None:
        self.model, self.document = load_model(folder)
        self.folder, self.data, self.batch = folder, dict[str, Any](self.document["data"]), batch

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, the family and its arguments, and of what samples are put back on: of no place."""
        weights = storage.sha256(storage.join(self.folder, "weights.safetensors"))
        facts = [self.document["family"], self.document["arguments"], self.data["shape"], self.data.get("levels")]
        return hashlib.sha256(json.dumps([weights, *facts], sort_keys=True).encode()).hexdigest()

    @property
    def is_density(self) -> bool:
        """Whether the model has log-densities, and not samples alone."""
        return hasattr(self.model, "log_prob")

    def require(self, ability: str) -> None:
        """Raises UserError unless the model has the method `ability`."""
        if not hasattr(self.model, ability):
            raise UserError(
                f"the model of {self.data['name']} is of the family {self.document['family']}, which has no {ability}: "
                + (
                    "give a mixture or a responsibility GAN"
                    if ability == "responsibilities"
                    else "give a density, such as a mixture"
                )
            )

    def sample(self, n: int, seed: int, component: int | None = None) -> np.ndarray:
        """n samples [n, *shape], of all components or of one; the same for the same seed.

        Raises:
            UserError: some are not finite, as the model's parameters are out of all bounds; it draws none, or cannot
                draw from this component.
        """
        self.require("sample")
        chosen = {} if component is None else {"component": self._component(component)}
        samples = self.model.sample(n, torch.Generator().manual_seed(seed), **chosen).numpy()
        if not np.isfinite(samples).all():
            raise UserError(f"the model of {self.data['name']} draws NaN or infinite values: train it again")
        return np.asarray(samples).reshape(n, *self.data["shape"])

    def _component(self, number: int) -> int:
        if "component" not in inspect.signature(self.model.sample).parameters:
            raise UserError(f"--component {number}: the family {self.document['family']} draws from all: leave it out")
        if number >= self.model.n_components:
            raise UserError(f"component {number}: the model has components 0 to {self.model.n_components - 1}")
        return number

    def component_log_prob(self, x: np.ndarray) -> np.ndarray:
        """log π_k p(x | k) in nats, [n, n_components]."""
        self.require("component_log_prob")
        return self._over_batches(self.model.component_log_prob, x).double().numpy()

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats, [n]."""
        if hasattr(self.model, "component_log_prob"):
            return np.logaddexp.reduce(self.component_log_prob(x), axis=1)
        self.require("log_prob")
        return self._over_batches(self.model.log_prob, x).double().numpy()

    def _over_batches(self, function: Any, x: np.ndarray) -> torch.Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(x, np.float32)).flatten(1)
        with torch.inference_mode():
            return torch.cat([function(part) for part in flat.split(self.batch)])


class LocalClassifier(LocalModel):
    """A classifier in a folder. Samples x are [n, *shape]: images in [0, 1], other values as they were in training."""

    def log_probabilities(self, x: np.ndarray) -> np.ndarray:
        """log p(class | x) in nats, [n, C] float64."""
        return self._over_batches(self.model, x).double().log_softmax(1).numpy()

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """p(class | x), [n, C] float32."""
        return np.exp(self.log_probabilities(x)).astype(np.float32)

    def features(self, x: np.ndarray) -> np.ndarray:
        """Activations of the last hidden layer, [n, d] float32."""
        return self._over_batches(self.model.features, x).numpy()

    @property
    def test_accuracy(self) -> float | None:
        """Of the job that trained it; None where that did not judge it (`manymodes train`)."""
        found = (self.document.get("scores") or {}).get("test_accuracy")
        return None if found is None else float(found)


class LocalAutoencoder(LocalModel):
    """An autoencoder in a folder. Samples x are [n, *shape]: images in [0, 1], others as they were in training."""

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes [n, K] float32 of samples x."""
        return self._over_batches(self.model.encode, x).numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Samples [n, *shape] float32 of codes [n, K].

        Raises:
            UserError: codes of another dimension, or that are not finite.
        """
        if codes.ndim != 2 or codes.shape[1] != self.model.n_latent or not np.isfinite(codes).all():
            raise UserError(f"codes have the shape {list(codes.shape)}: give finite ones, [n, {self.model.n_latent}]")
        return self._over_batches(self.model.decode, codes).numpy().reshape(len(codes), *self.data["shape"])

    def prior_sample(self, n: int, seed: int) -> np.ndarray:
        """n draws of the codes' prior, [n, K] float32; the same for the same seed."""
        return np.asarray(self.model.prior.sample(n, torch.Generator().manual_seed(seed)).numpy())


def model_folder(place: str) -> str | None:
    """The folder of the model that is stored at `place`, or in the run whose --out folder it is."""
    if is_spec(place):
        return None
    base = storage.check_url(place)
    for folder in (storage.join(base, "model"), base):
        if storage.exists(storage.join(folder, "model.json")):
            return folder
    return None


_Kind = TypeVar("_Kind", bound=LocalModel)


def open_model(place: str, tracking_uri: str | None = None) -> LocalModel:
    """Opens `models:/...` from the registry, or a model's folder or the folder of the run that made it.

    Returns:
        A `LocalClassifier` where the model gives class probabilities, a `LocalAutoencoder` where it has codes and their
        prior.

    Raises:
        UserError: nothing there that can be loaded.
    """
    if place.startswith("models:"):
        from deploy.registry import fetch_model
        from trainer.tracking import resolve_uri

        folder: str | None = fetch_model(place, resolve_uri(tracking_uri))
    else:
        folder = model_folder(place)
    if folder is None:
        raise UserError(f"{place}: no model there; give models:/NAME@ALIAS or the --out folder of a finished run")
    opened = LocalModel(folder)
    if hasattr(opened.model, "probabilities"):
        return LocalClassifier(folder)
    has_codes = all(hasattr(opened.model, name) for name in ("encode", "prior"))
    return LocalAutoencoder(folder) if has_codes else opened


def open_mixture(place: str, tracking_uri: str | None = None) -> LocalModel:
    """`open_model`, for what is asked of a mixture's components.

    Raises:
        UserError: no model there, or another one than a mixture.
    """
    opened = open_model(place, tracking_uri)
    opened.require("component_log_prob")
    return opened


def open_autoencoder(place: str, tracking_uri: str | None = None) -> LocalAutoencoder:
    """`open_model`, for codes.

    Raises:
        UserError: no model there, or one that is no autoencoder.
    """
    return _opened_as(LocalAutoencoder, "autoencoder", place, tracking_uri)


def open_classifier(place: str, tracking_uri: str | None = None) -> LocalClassifier:
    """`open_model`, for class probabilities.

    Raises:
        UserError: no model there, or one that is no classifier.
    """
    return _opened_as(LocalClassifier, "classifier", place, tracking_uri)


def _opened_as(kind: type[_Kind], noun: str, place: str, tracking_uri: str | None) -> _Kind:
    opened = open_model(place, tracking_uri)
    if not isinstance(opened, kind):
        raise UserError(f"{place}: a model of the family {opened.document['family']} is no {noun}: give one")
    return opened


def settle_mixture(recipe: Any, folder: str, tracking_uri: str) -> None:
    """Makes the mixture that a recipe's model builds on a folder that all nodes reach; most build on none.

    One of the registry is copied to `folder`, once: a job that goes on does so with the same version.

    Raises:
        UserError: no model there, or another one than a mixture.
    """
    place = getattr(recipe.model, "mixture", None)
    if place is None:
        return
    if place.startswith("models:"):
        own = storage.join(folder, "mixture")
        if not storage.exists(storage.join(own, "model.json")):
            fetched = open_mixture(place, tracking_uri).folder
            for name in ("weights.safetensors", "model.json"):  # the second makes it complete
                with storage.publish(storage.join(own, name)) as handle:
                    handle.write(storage.read_bytes(storage.join(fetched, name)))
        place = own
    recipe.model.mixture = open_mixture(place).folder
