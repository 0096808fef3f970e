"""Opens a model wherever it is: in the MLflow registry, or in the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.errors import UserError


class OpenedModel(Protocol):
    """A model ready to sample and score; `data` says what it was trained on (name, shape, levels, fingerprint)."""

    data: dict[str, Any]

    def sample(self, n: int, seed: int) -> np.ndarray: ...

    def log_prob(self, x: np.ndarray) -> np.ndarray: ...


class LocalModel:
    """A model in a folder, as NumPy in and NumPy out, in batches."""

    def __init__(self, folder: str, batch: int = 1024) -> None:
        from trainer.checkpoint import load_model

        self.model, document = load_model(folder)
        self.data: dict[str, Any] = document["data"]
        self.batch = batch

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n samples [n, *shape]."""
        samples = self.model.sample(n, torch.Generator().manual_seed(seed)).numpy()
        return np.asarray(samples).reshape(n, *self.data["shape"])

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x) in nats, [n]."""
        flat = torch.from_numpy(np.ascontiguousarray(x, np.float32)).flatten(1)
        with torch.inference_mode():
            return torch.cat([self.model.log_prob(part) for part in flat.split(self.batch)]).double().numpy()


def open_model(place: str, tracking_uri: str | None = None) -> OpenedModel:
    """Opens `models:/...` from the registry, or a model's folder or the folder of the run that made it.

    Raises:
        UserError: nothing there that can be loaded.
    """
    if place.startswith("models:"):
        from deploy.registry import RegisteredModel
        from trainer.tracking import resolve_uri

        return RegisteredModel(place, resolve_uri(tracking_uri))
    for folder in (Path(place) / "model", Path(place)):
        if (folder / "model.json").is_file():
            return LocalModel(str(folder))
    raise UserError(f"{place}: no model there; give models:/NAME@ALIAS or the --out folder of a finished run")
