"""Pictures of what a classifier takes for what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval import canvas

_MOST_NUMBERS, _MOST_NAMES = 20, 40


def confusion_matrix(confusion: np.ndarray, names: Sequence[str]) -> bytes:
    """Counts [C, C] by label (rows) and predicted class (columns), shaded by their share of the row.

    The shade is of the square root, so that single errors are seen; few classes have their counts written in.
    """
    n_classes = len(confusion)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(8.4, max(4.2, 0.46 * n_classes + 1.2))
    figure = canvas.new_figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if n_classes <= _MOST_NAMES:
        rotation = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(n_classes), names, fontsize=8.5, color=canvas.INK, rotation=rotation)
        axes.set_yticks(range(n_classes), names, fontsize=8.5, color=canvas.INK)
    if n_classes <= _MOST_NUMBERS:
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.25 else canvas.INK
            text = f"{confusion[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(canvas.PALE)
    axes.set_xlabel("predicted class", fontsize=9, color=canvas.MUTED)
    axes.set_ylabel("label", fontsize=9, color=canvas.MUTED)
    canvas.heading(figure, "Confusion matrix (samples)")
    return canvas.png(figure)
