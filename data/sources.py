"""Where samples come from: built-in data sets, toys, MNIST's files, folders of images, and NumPy arrays."""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data import images
from data.errors import UserError, io_error
from data.limits import MAX_MAGNITUDE, MAX_SEED, MAX_SIDE
from data.storage import check_name, local_folder
from data.toys import TOYS, toy

SPECS = "digits, mnist:FOLDER, svhn:FOLDER, images:FOLDER, array:FILE.npy, array:FILE.npz, ring, swissroll, seven"


class SourceOptions(BaseModel):
    """How a source is cut into splits and its images into shape."""

    model_config = ConfigDict(extra="forbid")

    test_fraction: float = Field(0.2, ge=0, lt=1, description="share held out if there is no test split")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="fixes the held-out share, the subset and the order")
    size: int | None = Field(None, ge=1, le=MAX_SIDE, description="images: cut to a central square of so many pixels")
    crop: tuple[int, int, int, int] | None = Field(None, description="images: box (left, top, right, bottom)")
    grey: bool | None = Field(None, description="images: one channel; unset means so if every image is grey")
    max_samples: int | None = Field(None, ge=1, description="a random subset of each split, for trials")
    shuffle: bool = Field(True, description="shuffle the training split, so that sorted sources mix")
    class_ratios: dict[str | int, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        description='share of a class kept in the training split, by name or label number: {"9": 0.25}; others whole',
    )

    @field_validator("class_ratios")
    @classmethod
    def _keys_are_texts(cls, ratios: dict[str | int, float] | None) -> dict[str | int, float] | None:
        """As JSON has them, so that options are equal to themselves after they were stored."""
        if ratios is None:
            return None
        texts: dict[str | int, float] = {str(name): share for name, share in ratios.items()}
        if len(texts) < len(ratios):
            raise ValueError("a class is named twice")
        return texts


@dataclass(frozen=True)
class Part:
    """One split of a source: `take(rows) -> [len(rows), *shape]` reads samples, `rows` [n] int64 chooses them."""

    take: Callable[[np.ndarray], np.ndarray]
    rows: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """Samples of one shape and dtype, in named splits, read block by block.

    Attributes:
        spec: what it was opened from; `options`: the options that were set.
        shape: of one sample: (height, width, channels) for images, (n_features,) for vectors.
        dtype: uint8 or float32.
        levels: number of values of a pixel, or None for real numbers.
        class_names: name of each label, where known.
        stamp: changes when a file of the source does (names, sizes, times of change).
        names: the name of the sample in a row, where it has one of its own (a file's).
    """

    name: str
    spec: str
    shape: tuple[int, ...]
    dtype: str
    levels: int | None
    class_names: tuple[str, ...] | None
    parts: dict[str, Part]
    options: dict[str, Any] = field(default_factory=dict)
    stamp: str = ""
    names: Callable[[int], str] | None = None

    @property
    def splits(self) -> dict[str, int]:
        """Samples per split."""
        return {split: len(part.rows) for split, part in self.parts.items()}

    def blocks(self, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Blocks of at most `rows` samples: "x" [rows, *shape] and, where known, "label" [rows] int64."""
        if split not in self.parts:
            raise UserError(f"{self.spec} has no split {split!r}: choose one of {', '.join(self.parts)}")
        part = self.parts[split]
        for start in range(0, len(part.rows), rows):
            chosen = part.rows[start : start + rows]
            block = {"x": np.ascontiguousarray(part.take(chosen), dtype=self.dtype)}
            if part.labels is not None:
                block["label"] = part.labels[chosen].astype(np.int64)
            yield block


def is_spec(text: str) -> bool:
    """Whether a text is meant as the spec of a source, and not as a path or URL."""
    kind = text.partition(":")[0]
    return text == "digits" or kind in TOYS or kind in _OPENERS


def open_source(spec: str, options: SourceOptions | None = None) -> Source:
    """Opens a source; samples are read when blocks are asked for.

    Args:
        spec: `digits` (8x8 images of scikit-learn, 17 levels), `mnist:FOLDER` (IDX files, gzipped or not),
            `svhn:FOLDER` (train_32x32.mat and test_32x32.mat, the format of Street View House Numbers),
            `images:FOLDER` (a tree of PNG and JPEG files; the folder that an image lies in is its class; folders
            `train`, `test` and `validation` at the top are splits), `array:FILE` (.npy, or .npz with `x` and
            perhaps `y`, `label` or `labels`), or a toy distribution, drawn by the options' seed (see `data.toys`).
        options: defaults where None.

    Raises:
        UserError: unknown spec, missing or damaged files, samples of different shapes. Values that are NaN, infinite or
            too large to compute with are refused when they are read.
    """
    options = options or SourceOptions()
    check_name(spec)
    kind, _, place = spec.partition(":")
    if spec == "digits":
        source = _open_digits(options)
    elif kind in TOYS:
        source = _open_toy(spec, kind, options)
    elif kind in _OPENERS and place:
        source = _OPENERS[kind](spec, place, options)
    else:
        raise UserError(f"unknown source {spec!r}: choose one of {SPECS}")
    # Defaults are left out, so that a pack's manifest does not change when an option is added.
    chosen = options.model_dump(mode="json", exclude_defaults=True)
    return replace(source, options=chosen)


def _divide(
    spec: str, given: dict[str, Part], options: SourceOptions, class_names: tuple[str, ...] | None = None
) -> dict[str, Part]:
    """The splits, `train` first: a lone one gives its held-out share to `test`; then subsets and order."""
    parts = dict(given)
    if len(given) == 1 and options.test_fraction:
        (split, part), n = next(iter(given.items())), len(next(iter(given.values())).rows)
        # At least one sample stays on either side.
        held = min(max(1, round(n * options.test_fraction)), n - 1)
        mixed = np.random.default_rng([options.seed, 0]).permutation(part.rows)
        if held:
            mixed[held:].sort()
            mixed[:held].sort()
            parts[split], parts["test"] = replace(part, rows=mixed[held:]), replace(part, rows=mixed[:held])
    for number, split in enumerate(sorted(parts)):
        rows = parts[split].rows
        rng = np.random.default_rng([options.seed, 1, number])
        if options.max_samples is not None and options.max_samples < len(rows):
            rows = np.sort(rng.choice(rows, options.max_samples, replace=False))
        if options.class_ratios and split == "train":
            rows = _thinned(spec, replace(parts[split], rows=rows), options, class_names)
        if options.shuffle and split == "train":
            rows = rng.permutation(rows)
        parts[split] = replace(parts[split], rows=rows)
    return {split: parts[split] for split in sorted(parts, key=lambda name: (name != "train", name))}


def _thinned(spec: str, part: Part, options: SourceOptions, class_names: tuple[str, ...] | None) -> np.ndarray:
    """The rows of a split, in their order, without what the class ratios leave out.

    Each class has a random order of its own and keeps the first of it: a smaller ratio keeps a subset of a larger one.
    """
    if part.labels is None:
        raise UserError(f"{spec}: has no labels: class_ratios needs the class of every sample")
    labels = part.labels[part.rows]
    known = range(len(class_names)) if class_names else np.unique(labels).tolist()
    numbers = {str(label): label for label in known}
    numbers.update({name: label for label, name in enumerate(class_names or ())})
    kept, seen = np.ones(len(labels), bool), set()
    for name, share in (options.class_ratios or {}).items():
        label = numbers.get(str(name))
        if label is None:
            names = class_names or [str(label) for label in known]
            listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(f"{spec}: class_ratios names the class {str(name)!r}, which is unknown: choose of {listed}")
        if label in seen:
            raise UserError(f"{spec}: class_ratios names the class {str(name)!r} twice: by name and by number")
        seen.add(label)
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([options.seed, 2, label % 2**64]).permutation(members)
        kept[order[round(share * len(members)) :]] = False
    if not kept.any():
        raise UserError(f"{spec}: class_ratios leaves no training sample: raise a ratio")
    return part.rows[kept]


def _whole(x: np.ndarray, labels: np.ndarray | None) -> Part:
    return Part(x.__getitem__, np.arange(len(x)), labels)


def _open_digits(options: SourceOptions) -> Source:
    from sklearn.datasets import load_digits  # only this source pays for the import

    digits = load_digits()
    x = digits.images.astype(np.uint8)[..., None]
    names = tuple("0123456789")
    parts = _divide("digits", {"train": _whole(x, digits.target)}, options, names)
    return Source("digits", "digits", x.shape[1:], "uint8", 17, names, parts)


def _open_toy(spec: str, kind: str, options: SourceOptions) -> Source:
    distribution = toy(spec)
    x, labels = distribution.draw(distribution.samples, np.random.default_rng([options.seed, 3]))
    parts = _divide(spec, {"train": _whole(x, labels)}, options)
    return Source(kind, spec, x.shape[1:], "float32", None, None, parts)


def _open_mnist(spec: str, place: str, options: SourceOptions) -> Source:
    folder = local_folder(place)
    given, shapes = {}, set()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x = _read_idx(folder, f"{prefix}-images", 3)[..., None]
        labels = _read_idx(folder, f"{prefix}-labels", 1)
        if len(x) != len(labels) or not x.size:
            raise UserError(f"{folder}: {len(x)} {split} images but {len(labels)} labels: fetch the files again")
        given[split] = _whole(x, labels)
        shapes.add(x.shape[1:])
    if len(shapes) > 1:
        raise UserError(f"{folder}: training and test images have different sizes: fetch the files again")
    stamp, names = _stamp(sorted(folder.glob("*-ubyte*"))), tuple("0123456789")
    parts = _divide(spec, given, options, names)
    return Source("mnist", spec, x.shape[1:], "uint8", 256, names, parts, stamp=stamp)


def _open_svhn(spec: str, place: str, options: SourceOptions) -> Source:
    from scipy.io import loadmat  # only this source pays for the import

    folder = local_folder(place)
    given, files = {}, []
    for split in ("train", "test"):
        path = folder / f"{split}_32x32.mat"
        if not path.is_file():
            raise UserError(f"{folder}: no file {path.name}: name the folder of train_32x32.mat and test_32x32.mat")
        try:
            content = loadmat(path, variable_names=["X", "y"])
            x, labels = np.moveaxis(content["X"], 3, 0), content["y"].reshape(-1) % 10  # a zero is labelled 10
        except Exception as error:  # scipy raises whatever a damaged file makes it stumble over
            raise UserError(f"{path}: truncated, or not a MATLAB file with X and y: fetch it again") from error
        if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) != len(labels) or not len(x):
            raise UserError(f"{path}: X is {x.dtype} {list(x.shape)} and y has {len(labels)} labels: fetch it again")
        given[split] = _whole(np.ascontiguousarray(x), labels.astype(np.int64))
        files.append(path)
    names = tuple("0123456789")
    parts = _divide(spec, given, options, names)
    return Source("svhn", spec, (32, 32, 3), "uint8", 256, names, parts, stamp=_stamp(files))


def _stamp(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read_idx(folder: Path, stem: str, n_dimensions: int) -> np.ndarray:
    """An IDX file of bytes: the magic 0x0000080D for D dimensions, their sizes (big-endian), the values."""
    names = [f"{stem}{dot}idx{n_dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no file {' or '.join(names)}: name the folder that holds the four MNIST files")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise io_error(error, str(path), "read") from error
    header = 4 + 4 * n_dimensions
    if data[:4] != bytes([0, 0, 8, n_dimensions]) or len(data) < header:
        raise UserError(f"{path}: not an IDX file of bytes with {n_dimensions} dimensions: fetch it again")
    shape = [int(size) for size in np.frombuffer(data, ">u4", n_dimensions, 4)]
    if len(data) - header != math.prod(shape):
        raise UserError(
            f"{path}: {len(data) - header} bytes of data, its header says {math.prod(shape)}: fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _open_images(spec: str, place: str, options: SourceOptions) -> Source:
    folder = local_folder(place)
    trees = images.find_trees(folder)
    classes = images.class_names(trees)
    # One list for all splits: a row is a place in it.
    files = [root / name for root, names in trees.values() for name in names]
    labels = None if classes is None else np.searchsorted(classes, [file.parent.name for file in files])
    given, start = {}, 0
    for split, (_, names) in trees.items():
        rows = np.arange(start, start + len(names))
        given[split] = Part(lambda rows: np.stack([images.load(files[row], shaping) for row in rows]), rows, labels)
        start += len(names)
    parts = _divide(spec, given, options, classes)
    used = np.sort(np.concatenate([part.rows for part in parts.values()]))
    shaping = images.plan([files[row] for row in used], options.size, options.crop, options.grey)

    def name(row: int) -> str:
        return files[row].relative_to(folder).as_posix()

    return Source(folder.name, spec, shaping.shape, "uint8", 256, classes, parts, stamp=_stamp(files), names=name)


def _open_array(spec: str, place: str, options: SourceOptions) -> Source:
    path = local_folder(place)
    x, labels = _read_arrays(path)
    if x.ndim < 2 or 0 in x.shape:
        raise UserError(f"{path}: no samples in an array of shape {x.shape}: give [n, ...], none of them zero")
    real = x.dtype.kind == "f"
    if not real and x.dtype != np.uint8:
        raise UserError(f"{path}: values of type {x.dtype}: save them as uint8 (0 to 255) or as float32")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != x.shape[:1]):
        raise UserError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}: give {len(x)} integers, one per sample"
        )
    if labels is not None and int(labels.max()) > np.iinfo(np.int64).max:
        raise UserError(f"{path}: the label {labels.max()} does not fit int64: number the classes from 0")
    given = Part(functools.partial(_reals, path, x), np.arange(len(x)), labels) if real else _whole(x, labels)
    parts = _divide(spec, {"train": given}, options)
    dtype, levels = ("float32", None) if real else ("uint8", 256)
    return Source(path.stem, spec, x.shape[1:], dtype, levels, None, parts, stamp=_stamp([path]))


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """x, memory-mapped where the file allows, and labels where there are any."""
    if path.suffix not in (".npy", ".npz"):
        raise UserError(f"{path}: an array must be a .npy or .npz file: save it with numpy.save")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file: check the path")
    try:
        if path.suffix == ".npy":
            return _array(np.load(path, mmap_mode="r", allow_pickle=False)), None
        with np.load(path, allow_pickle=False) as archive:
            label_keys = [key for key in ("y", "label", "labels") if key in archive.files]
            others = [key for key in archive.files if key not in label_keys]
            if "x" not in others and len(others) != 1:
                found = ", ".join(archive.files) or "nothing"
                raise UserError(f"{path}: holds {found}: name the array of samples x")
            labels = _array(archive[label_keys[0]]) if label_keys else None
            return _array(archive["x" if "x" in others else others[0]]), labels
    except OSError as error:
        raise io_error(error, str(path), "read") from error
    except UserError:
        raise
    except Exception as error:  # NumPy, its header's parser, zipfile and zlib have a dozen kinds for damaged files
        objects = "object" in str(error).lower() or "pickle" in str(error)
        reason = "holds Python objects" if objects else "truncated or not a NumPy file"
        if isinstance(error, MemoryError):
            reason = "announces more than this machine's memory holds"
        raise UserError(f"{path}: {reason}: save plain numbers with numpy.save or numpy.savez") from error


def _array(found: Any) -> np.ndarray:
    if not isinstance(found, np.ndarray):  # an archive under the name of an array, or a text in an archive
        raise ValueError("not an array")
    return found


def _reals(path: Path, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows as float32, checked as they are read: the file may be larger than memory."""
    with np.errstate(over="ignore"):  # a float64 beyond the range of float32 becomes infinite
        found = x[rows].astype(np.float32, copy=False)
    extent = np.abs(found.reshape(len(rows), -1)).max(axis=1, initial=0)
    usable = extent <= MAX_MAGNITUDE  # false for NaN
    if not usable.all():
        row = int(rows[~usable].min())
        if np.isfinite(extent[~usable][np.argmin(rows[~usable])]):
            raise UserError(f"{path}: row {row} holds values beyond {MAX_MAGNITUDE:g} in size: rescale the data")
        raise UserError(f"{path}: row {row} holds NaN or infinite values (as float32): remove or repair it")
    return found


_OPENERS = {"mnist": _open_mnist, "svhn": _open_svhn, "images": _open_images, "array": _open_array}
