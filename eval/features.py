"""Feature extractors: the spaces in which samples are compared, opened from a short spec, each with its fingerprint."""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError, io_error, one_line, printable
from data.storage import local_folder
from eval.inception import N_FEATURES, inception_from, normalised

SPECS = "pixels, torchscript:FILE, onnx:FILE, inception:FILE, module:FILE.py:NAME or module:PACKAGE.MODULE:NAME"
_PIN = re.compile(r"^(.*)#sha256=([^#]*)$", re.DOTALL)
_BATCH_BYTES, _MOST = 16 << 20, 512
# Share of values that may lie outside of [0, 1], and how far any may: generators overshoot a little.
_OUTSIDE_SHARE, _OUTSIDE, _LARGEST = 0.1, 0.05, 2.0

Function = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Features:
    """Of n samples: features `x` [n, d] float32 and, where the extractor classifies, `probabilities` [n, C] float32."""

    x: np.ndarray
    probabilities: np.ndarray | None = None


class Extractor:
    """A map from samples to features, `extractor(x)`.

    Attributes:
        name: the spec, with the file's name instead of its place on this machine.
        spec: opens the same extractor in another process: the place is absolute, the file pinned.
        fingerprint: SHA-256 of the file that decides it; "pixels" for pixels.
        n_features: d; None until the first call where the file does not tell.
        preprocessing: what is done to images before the network sees them, in words.
        of_labels: whether its classes are the labels of the data, by their numbers.
        note: what else a reader of its scores should know, such as a classifier's test accuracy.
    """

    def __init__(
        self,
        name: str,
        spec: str,
        fingerprint: str,
        function: Function,
        *,
        n_features: int | None = None,
        preprocessing: str = "none",
        unit_range: bool = True,
        most: int = _MOST,
        note: str = "",
        of_labels: bool = False,
    ) -> None:
        """
        Args:
            function: maps a batch [m, *shape] float32 to features [m, d], or to (features, logits [m, C]); arrays or
                tensors.
            unit_range: images must be in [0, 1].
            most: samples in a batch.
        """
        self.name, self.spec, self.fingerprint = name, spec, fingerprint
        self.n_features, self.preprocessing, self.note = n_features, preprocessing, note
        self.of_labels = of_labels
        self._function, self._unit_range, self._most = function, unit_range, most

    def __call__(self, x: np.ndarray) -> Features:
        """Features of samples x [n, *shape] (images in [0, 1], channels last; or vectors), batch by batch.

        Raises:
            UserError: no samples, values that are not finite, images that are not in [0, 1], or a network that does
                not take such samples or answers with anything but [n, d] finite numbers.
        """
        self._check_input(x)
        size = max(1, min(self._most, _BATCH_BYTES // (4 * math.prod(x.shape[1:]))))
        features, logits = [], []
        for start in range(0, len(x), size):
            batch = np.ascontiguousarray(x[start : start + size], np.float32)
            try:
                with torch.inference_mode():
                    found = self._function(batch)
            except UserError:
                raise
            except Exception as error:  # whatever a network or a user's function stumbles over
                raise UserError(
                    f"{self.name}: fails on samples of shape {list(x.shape[1:])} ({type(error).__name__}: "
                    f"{_reason(error)}): give samples that it takes, or another extractor"
                ) from error
            parts = found if isinstance(found, tuple) else (found,)
            if len(parts) not in (1, 2):
                raise UserError(f"{self.name}: answers with {len(parts)} things: return features, or features, logits")
            features.append(self._checked(parts[0], len(batch), "features"))
            if len(parts) == 2:
                logits.append(self._checked(parts[1], len(batch), "logits"))
        out = np.concatenate(features)
        if self.n_features not in (None, out.shape[1]):
            raise UserError(f"{self.name}: gives {out.shape[1]} features instead of {self.n_features}: give another")
        self.n_features = out.shape[1]
        if not logits:
            return Features(out)
        joined = torch.from_numpy(np.concatenate(logits)).double()
        return Features(out, joined.softmax(1).float().numpy())

    def _check_input(self, x: np.ndarray) -> None:
        if x.ndim < 2 or not x.size:
            raise UserError(f"{self.name}: no samples in an array of shape {list(x.shape)}: give [n, ...]")
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{self.name}: the samples hold NaN or infinite values: remove or repair them")
        if self._unit_range and x.ndim > 2 and (low < -_OUTSIDE or high > 1 + _OUTSIDE):
            outside = float(np.mean((x < -_OUTSIDE) | (x > 1 + _OUTSIDE)))
            if high > _LARGEST or outside > _OUTSIDE_SHARE:
                remedy = "divide 8-bit images by 255" if high > _LARGEST else "bring [-1, 1] to [0, 1] by (x + 1) / 2"
                raise UserError(f"{self.name}: images run from {low:.3g} to {high:.3g} instead of 0 to 1: {remedy}")

    def _checked(self, found: Any, n: int, what: str) -> np.ndarray:
        try:
            values = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
            values = values.astype(np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name}: {what} are no array of numbers but {type(found).__name__}") from error
        if values.ndim != 2 or values.shape[0] != n or not values.shape[1]:
            raise UserError(f"{self.name}: {what} have shape {list(values.shape)} for {n} samples: return [{n}, d]")
        if not np.isfinite(values).all():
            raise UserError(f"{self.name}: {what} hold NaN or infinite values: check the file and the samples")
        return values


def open_extractor(spec: str) -> Extractor:
    """Opens a feature extractor; everything is read from this machine, nothing is fetched.

    Specs:
        pixels: the values themselves, flattened.
        torchscript:FILE: called with [n, c, h, w] for images, [n, d] for vectors; returns features, or a tuple
            (features, logits).
        onnx:FILE: one input as for TorchScript, outputs features and perhaps logits (the extra `onnx`).
        inception:FILE: Inception v3 in torchvision's weights (.pth or .safetensors), 2048 pooled features and 1000
            logits; or a TorchScript file that takes the same normalised images and gives 2048 features.
        module:FILE.py:NAME, module:PACKAGE.MODULE:NAME: the user's own function of a NumPy array [n, *shape]. This is
            the user's own code and it runs here, with everything that this process may do.

    Each file may be pinned by `#sha256=HEX` at the end (16 digits at least), compared before anything is loaded or
    executed. A module's pin covers its own file, not what that imports.

    Raises:
        UserError: an unknown spec, a missing or damaged file, a file of another kind or with another checksum.
    """
    bare, pin = split_pin(spec)
    kind, _, place = bare.partition(":")
    if bare == "pixels" and pin is None:
        return Extractor("pixels", "pixels", "pixels", lambda x: x.reshape(len(x), -1), unit_range=False)
    if kind not in _OPENERS or not place:
        raise UserError(f"unknown feature extractor {spec!r}: choose one of {SPECS}")
    return _OPENERS[kind](place, pin)


def split_pin(spec: str) -> tuple[str, str | None]:
    """A spec without its pin, and the pin's digits in lower case (None where there is none).

    Raises:
        UserError: a pin that is not 16 to 64 hexadecimal digits.
    """
    found = _PIN.match(spec)
    if found is None:
        return spec, None
    pin = found.group(2).lower()
    if not re.fullmatch("[0-9a-f]{16,64}", pin):
        raise UserError(f"{spec}: the pin must be 16 to 64 hexadecimal digits of the file's SHA-256: correct it")
    return found.group(1), pin


def check_pin(what: str, digest: str, pin: str | None) -> None:
    """Raises UserError unless the SHA-256 `digest` begins with the pin (None: anything does)."""
    if pin is not None and not digest.startswith(pin):
        raise UserError(f"{what}: its SHA-256 is {digest}, the pin says {pin}: use the file that was meant")


def network_device() -> torch.device:
    """Where networks run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pinned_file(place: str, pin: str | None) -> tuple[Path, bytes, str]:
    """A file's absolute path, its content and SHA-256: what is compared is what is loaded, whatever happens to it."""
    path = local_folder(place)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise io_error(error, str(path), "read") from error
    digest = hashlib.sha256(content).hexdigest()
    check_pin(str(path), digest, pin)
    return path, content, digest


def _open_torchscript(place: str, pin: str | None) -> Extractor:
    path, content, digest = _pinned_file(place, pin)
    network, device = _script(path, content), network_device()

    def function(x: np.ndarray) -> Any:
        return network(_channels_first(x).to(device))

    return Extractor(f"torchscript:{path.name}", f"torchscript:{path}#sha256={digest}", digest, function)


def _script(path: Path, content: bytes) -> nn.Module:
    try:
        network = torch.jit.load(io.BytesIO(content), map_location="cpu")
        if hasattr(network, "training"):  # a frozen one has no modes
            network.eval()
        return network.to(network_device())
    except Exception as error:  # damaged archives and graphs end in a dozen kinds of exceptions
        raise UserError(
            f"{path}: not a TorchScript file, or a damaged one ({_reason(error)}): save it with torch.jit.save"
        ) from error


def _open_onnx(place: str, pin: str | None) -> Extractor:
    path, content, digest = _pinned_file(place, pin)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnx: the package onnxruntime is not installed: pip install 'manymodes[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # its exceptions have no common class of their own
        raise UserError(
            f"{path}: not an ONNX file (with its weights inside), or a damaged one ({_reason(error)}): export it again"
        ) from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        kinds = ", ".join(f"{one.name} {one.type}" for one in inputs)
        raise UserError(f"{path}: takes {kinds or 'nothing'}: export it with one input of type tensor(float)")

    def function(x: np.ndarray) -> Any:
        return tuple(session.run(None, {inputs[0].name: _channels_first(x).numpy()}))

    width = session.get_outputs()[0].shape[-1:]
    n_features = width[0] if width and isinstance(width[0], int) else None
    return Extractor(f"onnx:{path.name}", f"onnx:{path}#sha256={digest}", digest, function, n_features=n_features)


def _open_inception(place: str, pin: str | None) -> Extractor:
    path, content, digest = _pinned_file(place, pin)
    if _is_script(content):
        network = _script(path, content)
    else:
        try:
            network = inception_from(_tensors(path, content)).to(network_device())
        except ValueError as error:
            raise UserError(f"{path}: {error}: give another file") from error

    def function(x: np.ndarray) -> Any:
        return network(normalised(_channels_first(x).to(network_device())))

    return Extractor(
        f"inception:{path.name}",
        f"inception:{path}#sha256={digest}",
        digest,
        function,
        n_features=N_FEATURES,
        preprocessing="grey to RGB, bilinear to 299x299 with antialias, torchvision's normalisation",
        most=32,
    )


def _is_script(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file; the latter is read without executing what a pickle may hold."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign pickles, refused classes
        raise UserError(
            f"{path}: not a file of weights (.pth or .safetensors), or a damaged one: fetch it again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no state dict: save network.state_dict() with torch.save")
    return dict(found)


def _open_module(place: str, pin: str | None) -> Extractor:
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise UserError(f"module:{place}: name the function too, as module:FILE.py:NAME or module:PACKAGE.MODULE:NAME")
    is_file = where.endswith(".py")
    path, content, digest = _pinned_file(where if is_file else _module_source(where), pin)
    try:
        module = _executed(path, content, digest) if is_file else importlib.import_module(where)
    except Exception as error:  # the user's code
        raise UserError(
            f"{path}: cannot be loaded ({type(error).__name__}: {one_line(error)}): correct it (--debug shows where)"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}: has no function {name!r}: name one that it defines")
    spec = f"module:{path if is_file else where}:{name}#sha256={digest}"
    return Extractor(f"module:{path.name if is_file else where}:{name}", spec, digest, function)


def _executed(path: Path, content: bytes, digest: str) -> types.ModuleType:
    """The file's own module, made of the content that was compared, under a name that hides no other module."""
    name = f"manymodes_features_{digest[:16]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _module_source(name: str) -> str:
    """The file of an importable module, found without importing it or the packages around it."""
    search: Any = None
    found = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        whole = ".".join(parts[:end])
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        found = next((spec for finder in finders if (spec := finder.find_spec(whole, search, None)) is not None), None)
        search = None if found is None else found.submodule_search_locations
        if found is None or (search is None and end < len(parts)):
            raise UserError(f"module {name!r}: not found: install it, set PYTHONPATH, or give the path of FILE.py")
    if found is None or not found.has_location or not found.origin:
        raise UserError(f"module {name!r}: has no source file: give another")
    return str(found.origin)


def _channels_first(x: np.ndarray) -> Tensor:
    """[n, h, w] or [n, h, w, c] as [n, c, h, w]; vectors as they are."""
    values = torch.from_numpy(x)
    if values.ndim == 2:
        return values
    if values.ndim == 3:
        return values.unsqueeze(1)
    if values.ndim == 4:
        return values.permute(0, 3, 1, 2).contiguous()
    raise UserError(f"samples of shape {list(x.shape[1:])} are neither images nor vectors: a network takes no others")


def _reason(error: BaseException) -> str:
    """What went wrong in one line: TorchScript and ONNX tell it last, after the place."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())


_OPENERS: dict[str, Callable[[str, str | None], Extractor]] = {
    "torchscript": _open_torchscript,
    "onnx": _open_onnx,
    "inception": _open_inception,
    "module": _open_module,
}
KINDS = ("pixels", *_OPENERS)
