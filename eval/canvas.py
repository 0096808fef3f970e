"""What every figure shares: colours, axes, PNG bytes, and ways to draw samples of any shape.

Matplotlib is used through its objects with the Agg backend, so that nothing here depends on a display or on global
state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data import storage
from data.errors import UserError

# From the colour-blind-safe palette of M. Okabe and K. Ito, "Color Universal Design" (2008).
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, MUTED, PALE, FAINT = "#1f2328", "#6e7781", "#9aa5b1", "#dfe4e9"
# Against the palette's blue and vermillion this pair keeps its meaning in every figure.
DIRECTION_COLOURS = {"missing": VERMILLION, "fewer": VERMILLION, "more": BLUE, "equal": MUTED}
_DPI, _LARGE = 120, 350_000


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches, on white."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; one that would be large is reduced to the 256 colours that serve it best."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB")
    image.save(packed, "PNG", optimize=True)
    if packed.tell() > _LARGE:
        packed = io.BytesIO()
        image.quantize(256, Image.Quantize.MEDIANCUT).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def style_axes(axes: Axes) -> None:
    """Quiet axes: no box, small grey ticks, horizontal grid lines behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(axis="y", color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)


def bare(axes: Axes) -> None:
    """No ticks and no frame, for images and text."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are images: [H, W], or [H, W, C] with one or three channels."""
    return len(shape) in (2, 3) and min(shape[:2]) > 1 and (len(shape) == 2 or shape[2] in (1, 3))


def tile(x: np.ndarray, columns: int) -> np.ndarray:
    """Images `[n, H, W]` or `[n, H, W, C]` in [0, 1] side by side, row by row, as one uint8 image `[h, w, 3]`.

    Values outside [0, 1] are clipped, NaN becomes black; a white line parts the images, and cells without an image
    are white.

    Raises:
        UserError: samples that are not images.
    """
    if not is_image(x.shape[1:]):
        raise UserError(f"samples of shape {list(x.shape[1:])} are not images: [H, W], [H, W, 1] or [H, W, 3] are")
    images = np.nan_to_num(np.clip(np.asarray(x, np.float32), 0, 1)) * 255
    images = images.reshape(*images.shape[:3], -1).round().astype(np.uint8)
    n, height, width, channels = images.shape
    rows, gap = max(1, math.ceil(n / columns)), max(1, min(height, width) // 24)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image if channels == 3 else image.repeat(3, axis=2)
    return sheet


def save_png(url: str, image: np.ndarray) -> None:
    """Writes an uint8 image `[h, w, 3]` as PNG, whole or not at all, to a path or URL."""
    with storage.publish(url) as handle:
        Image.fromarray(image).save(handle, "PNG", optimize=True)


def show(axes: Axes, image: np.ndarray) -> None:
    """One image in the axes: sharp pixels where it is enlarged, smooth where it is reduced."""
    interpolation = "nearest" if max(image.shape[:2]) < 1000 else "auto"
    axes.imshow(image, interpolation=interpolation, interpolation_stage="rgba")
    bare(axes)


def draw_row(axes: Axes, x: np.ndarray, columns: int, colour: str) -> None:
    """Some samples `[n, *shape]` in one strip: images side by side, anything else as one curve each."""
    if len(x) == 0:
        bare(axes)
        axes.text(0.02, 0.5, "none", color=MUTED, fontsize=9, va="center", transform=axes.transAxes)
    elif is_image(x.shape[1:]):
        show(axes, tile(x, columns))
        axes.set_anchor("W")
    else:
        flat = x.reshape(len(x), -1)
        marker = "o" if flat.shape[1] < 8 else ""
        axes.plot(flat.T, color=colour, linewidth=0.8, alpha=0.7, marker=marker, markersize=2)
        style_axes(axes)
        axes.tick_params(labelsize=6, labelbottom=False)


def heading(figure: Figure, text: str, size: float = 11) -> None:
    """A left-aligned title over the whole figure."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=size, color=INK, fontweight="bold")


def labelled_sheet(x: np.ndarray, texts: Sequence[str], title: str) -> bytes:
    """Samples `[n, *shape]` as PNG, eight in a row, each with a short text above it."""
    columns = min(len(x), 8)
    rows = -(-len(x) // columns)
    ratio = x.shape[1] / x.shape[2] if is_image(x.shape[1:]) else 0.8
    width = 9.4 / columns
    figure = new_figure(9.4, rows * (width * ratio + 0.22) + 0.4)
    cells = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in cells[len(x) :]:
        axes.set_visible(False)
    for axes, sample, text in zip(cells, x, texts):
        draw_row(axes, sample[None], 1, INK)
        axes.set_anchor("C")
        axes.set_title(text, fontsize=8, color=MUTED, pad=2)
    heading(figure, title)
    return png(figure)
