"""What is stored: training checkpoints and finished models, as safetensors and readable JSON."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from data import storage
from data.errors import UserError, one_line, printable
from data.manifest import Manifest
from trainer.engines import State

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Steps done, the engine's state, and what the run was (recipe, lanes, ...)."""

    step: int
    state: State
    details: dict[str, Any]


def save_checkpoint(folder: str, step: int, state: State, details: dict[str, Any]) -> None:
    """Writes a checkpoint into a folder (a path or URL); the JSON is written last and makes it complete."""
    with storage.publish(storage.join(folder, "state.safetensors")) as handle:
        handle.write(save_tensors({name: value.contiguous() for name, value in state.items()}))
    document = {"format": FORMAT, "step": step, **details}
    storage.write_text(storage.join(folder, "checkpoint.json"), json.dumps(document, indent=1))


def load_checkpoint(folder: str, stream: dict[str, Any]) -> Checkpoint:
    """Reads a checkpoint made by any engine on any number of workers.

    Raises:
        UserError: it is missing or damaged, or its `stream` (what the order of the data depends on) was another:
            going on would silently train on other batches.
    """
    document = _read_json(storage.join(folder, "checkpoint.json"))
    if document.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder}: format {document.get('format')} is not known; start a new run")
    then = document.get("stream", {})
    for name, value in stream.items():
        if then.get(name) != value:
            raise UserError(
                f"checkpoint {folder}: the data's {name} was {then.get(name)}, now it is {value}; "
                "set it back, or choose another output folder for a new run"
            )
    state = _read_tensors(storage.join(folder, "state.safetensors"))
    return Checkpoint(int(document.pop("step")), state, document)


def save_model(
    folder: str,
    model: nn.Module,
    family: str,
    manifest: Manifest,
    *,
    dequantised: bool,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Writes a finished model: `weights.safetensors`, then `model.json` with its family, settings and data.

    Args:
        folder: path or URL.
        model: a model with a `config` of plain values.
        family: its file in trainer/models.
        manifest: the data that it was trained on; shape, levels and fingerprint are kept.
        dequantised: whether the model is a density of (v + u) / levels; else `levels` is stored as null.
        scores: what the model reached on test data, where it was judged.
    """
    data = {
        "name": manifest.name,
        "shape": list(manifest.shape),
        "levels": manifest.levels if dequantised else None,
        "fingerprint": manifest.fingerprint,
    }
    tensors: dict[str, Tensor] = {name: v.detach().cpu().contiguous() for name, v in model.state_dict().items()}
    weights = save_tensors(tensors)
    with storage.publish(storage.join(folder, "weights.safetensors")) as handle:
        handle.write(weights)
    document = {"format": FORMAT, "family": family, "arguments": model.config, "data": data}
    document["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    if scores is not None:
        document["scores"] = dict(scores)
    storage.write_text(storage.join(folder, "model.json"), json.dumps(document, indent=1))


def model_class(family: str) -> Any:
    """The network's class of a family.

    Raises:
        ImportError, AttributeError: there is no such family.
    """
    return importlib.import_module(f"trainer.models.{family}").MODEL


def load_model(folder: str) -> tuple[Any, dict[str, Any]]:
    """The model stored in a folder (in evaluation mode) and its `model.json`.

    Raises:
        UserError: the folder holds no model, a damaged one, one of another format, or weights that are not finite.
    """
    base = storage.check_url(folder)
    document = _read_json(storage.join(base, "model.json"))
    if document.get("format") != FORMAT:
        raise UserError(f"model {folder}: format {document.get('format')!r} is not known; use the version that made it")
    weights = storage.join(base, "weights.safetensors")
    known = document.get("weights_sha256")  # models of earlier versions do not tell
    if known is not None and storage.sha256(weights) != known:
        raise UserError(f"model {folder}: the weights are damaged (another checksum): copy it again, or train it again")
    try:
        model = model_class(document["family"])(**document["arguments"])
        model.load_state_dict(_read_tensors(weights))
        _check_model(model, document["data"])
    except (LookupError, ImportError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        # Which tensors do not fit is in the lines after the first.
        why = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"model {folder}: cannot be loaded ({why}); train it again") from error
    return model.eval(), document


def _check_model(model: Any, data: Any) -> None:
    """Raises ValueError or TypeError where `model.json` does not fit the network, or weights are not finite."""
    shape, levels = data["shape"], data.get("levels")
    if not (isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)):
        raise ValueError(f"the shape {shape!r} is no list of positive numbers")
    if math.prod(shape) != model.n_features:
        raise ValueError(f"the shape {shape} does not hold the network's {model.n_features} features")
    if levels is not None and not (type(levels) is int and levels >= 2):
        raise ValueError(f"{levels!r} is no number of levels")
    if not isinstance(data["name"], str) or not isinstance(data["fingerprint"], str):
        raise ValueError("the name or the fingerprint of the data is no text")
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite values")


def _read_json(url: str) -> dict[str, Any]:
    try:
        document = json.loads(storage.read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url} is damaged ({one_line(error)}); start from an earlier or a new run") from error
    if not isinstance(document, dict):
        raise UserError(f"{url} is damaged: it is not a JSON object; start from an earlier or a new run")
    return document


def _read_tensors(url: str) -> dict[str, torch.Tensor]:
    try:
        return dict(load_tensors(storage.read_bytes(url)))
    except SafetensorError as error:
        raise UserError(f"{url} is damaged ({one_line(error)}); start from an earlier or a new run") from error
