"""Opens a model wherever it is: in the MLflow registry, or in the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import UserError
from trainer.checkpoint import load_model


class LocalModel:
    """A model in a folder, NumPy in and NumPy out, in batches.

    `data` says what it was trained on: name, shape, levels (None where it is no density of dequantised pixels),
    fingerprint.

    Raises:
        UserError: the folder holds no model, or a damaged one.
    """

    def __init__(self, folder: str, batch: int = 1024) -> None:
        self.model, document = load_model(folder)
        self.data: dict[str, Any] = document["data"]
        self.batch = batch

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n samples [n, *shape]; the same for the same seed.

        Raises:
            UserError: some are not finite, as the model's parameters are out of all bounds.
        """
        samples = self.model.sample(n, torch.Generator().manual_seed(seed)).numpy()
        if not np.isfinite(samples).all():
            raise UserError(f"the model of {self.data['name']} draws NaN or infinite values: train it again")
        return np.asarray(samples).reshape(n, *self.data["shape"])

    def component_log_prob(self, x: np.ndarray) -> np.ndarray:
        """log π_k p(x | k) in nats, [n, n_components]."""
        flat = torch.from_numpy(np.ascontiguousarray(x, np.float32)).flatten(1)
        with torch.inference_mode():
            parts = [self.model.component_log_prob(part) for part in flat.split(self.batch)]
        return torch.cat(parts).double().numpy()

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats, [n]."""
        return np.logaddexp.reduce(self.component_log_prob(x), axis=1)


def model_folder(place: str) -> str | None:
    """The folder of the model that is stored at `place`, or in the run whose --out folder it is."""
    for folder in (Path(place) / "model", Path(place)):
        if (folder / "model.json").is_file():
            return str(folder)
    return None


def open_model(place: str, tracking_uri: str | None = None) -> LocalModel:
    """Opens `models:/...` from the registry, or a model's folder or the folder of the run that made it.

    Raises:
        UserError: nothing there that can be loaded.
    """
    if place.startswith("models:"):
        from deploy.registry import fetch_model
        from trainer.tracking import resolve_uri

        return LocalModel(fetch_model(place, resolve_uri(tracking_uri)))
    folder = model_folder(place)
    if folder is None:
        raise UserError(f"{place}: no model there; give models:/NAME@ALIAS or the --out folder of a finished run")
    return LocalModel(folder)
