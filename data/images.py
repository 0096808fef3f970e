"""Folders of PNG and JPEG files: finding them, checking that they fit together, reading one into shape."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from data.errors import UserError, one_line
from data.storage import check_name

SUFFIXES = (".png", ".jpg", ".jpeg")
# Only these: other decoders of Pillow start programs or are rarely tested.
_FORMATS = ("PNG", "JPEG")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# What Pillow raises on damaged files, from its several decoders.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shaping:
    """How every image of a source becomes an array of `shape` (height, width, channels), uint8."""

    shape: tuple[int, int, int]
    size: int | None
    crop: Box | None


def find_trees(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """{split: (its folder, sorted relative paths of its images)}; one split `train` unless there is a folder train.

    Raises:
        UserError: no such folder, no images in it or in one of its splits, or a name that is not UTF-8.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: check the path")
    roots = {"train": folder}
    if (folder / "train").is_dir():
        roots = {name: folder / name for name in ("train", "validation", "test") if (folder / name).is_dir()}
    trees = {split: (root, _image_files(root)) for split, root in roots.items()}
    for root, files in trees.values():
        if not files:
            raise UserError(f"{root}: no PNG or JPEG files in this folder or below: check the path")
    return trees


def _image_files(root: Path) -> list[str]:
    found = []
    for parent, _, names in os.walk(root):
        below = os.path.relpath(parent, root)
        # Hidden files are what desktops leave behind: "._photo.jpg" is no image.
        found += [
            check_name(os.path.normpath(os.path.join(below, name)))
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def class_names(trees: dict[str, tuple[Path, list[str]]]) -> tuple[str, ...] | None:
    """Sorted names of the folders that images lie in; None if an image lies in no sub-folder."""
    files = [file for _, below in trees.values() for file in below]
    if any(os.path.dirname(file) == "" for file in files):
        return None
    return tuple(sorted({os.path.basename(os.path.dirname(file)) for file in files}))


def plan(files: list[Path], size: int | None, crop: Box | None, grey: bool | None) -> Shaping:
    """Decides the common shape from the files' headers; `grey` None means one channel if every image is grey.

    Raises:
        UserError: a damaged file, more than 8 bits per channel, a crop outside of an image, or, without `size`
            and `crop`, images of different shapes; each names the file.
    """
    if crop is not None and not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
        raise UserError(f"crop {crop} is empty: give (left, top, right, bottom) in pixels")
    first: tuple[int, int] | None = None
    all_grey = True
    for file in files:
        width, height, mode = _header(file)
        all_grey = all_grey and mode in _GREY_MODES
        if crop is not None and (crop[2] > width or crop[3] > height):
            raise UserError(f"{file}: crop {crop} leaves its {width}x{height} pixels: choose a smaller one")
        first = first or (width, height)
        if size is None and crop is None and (width, height) != first:
            raise UserError(
                f"{file}: {width}x{height} pixels where {files[0].name} has {first[0]}x{first[1]}: "
                "set size to bring all images to one shape"
            )
    if first is None:
        raise UserError("no images to read: check the path")
    width, height = first if crop is None else (crop[2] - crop[0], crop[3] - crop[1])
    if size is not None:
        width = height = size
    return Shaping((height, width, 1 if (all_grey if grey is None else grey) else 3), size, crop)


def load(file: Path, shaping: Shaping) -> np.ndarray:
    """One image file as uint8 [height, width, channels], shaped as planned; raises UserError where damaged."""
    return fit(decode(file, str(file), shaping.shape[2] == 1), shaping.size, shaping.crop)


def decode(place: Path | IO[bytes], name: str, grey: bool | None) -> Image.Image:
    """Reads a PNG or JPEG image to 8-bit grey or RGB; `grey` None keeps what it is.

    Raises:
        UserError: damaged, or more than 8 bits per channel; begins with `name`.
    """
    try:
        with _opened(place) as image:
            _check_mode(image.mode, name)
            is_grey = image.mode in _GREY_MODES if grey is None else grey
            return image.convert("L" if is_grey else "RGB")
    except _DAMAGED as error:
        raise _damaged(name, error) from error


def fit(image: Image.Image, size: int | None, crop: Box | None) -> np.ndarray:
    """An image as uint8 [height, width, channels]: cut to the box, then to its central square, then resized."""
    if crop is not None:
        image = image.crop(crop)
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        # Pillow widens the filter when it shrinks an image, which is the antialiasing.
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1)


@contextlib.contextmanager
def _opened(place: Path | IO[bytes]) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(place, formats=_FORMATS) as image:
            yield image


def _header(file: Path) -> tuple[int, int, str]:
    if not file.is_file():  # a pipe would wait for ever
        raise UserError(f"{file}: not a file, or a link to none: remove it")
    try:
        with _opened(file) as image:
            _check_mode(image.mode, str(file))
            return image.width, image.height, image.mode
    except _DAMAGED as error:
        raise _damaged(str(file), error) from error


def _check_mode(mode: str, name: str) -> None:
    if mode not in _GREY_MODES + _COLOUR_MODES:
        raise UserError(f"{name}: pixels of kind {mode} have more than 8 bits: convert the image to 8 bits first")


def _damaged(name: str, error: BaseException) -> UserError:
    # Pillow's own text may repeat the path.
    reason = type(error).__name__ if name in str(error) else one_line(error)
    return UserError(f"{name}: cannot be read as an image ({reason}): remove or replace it")
