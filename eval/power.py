"""How often scores notice planted collapse: thresholds by untouched samples, power, false alarms, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from eval import canvas
from eval.planted import MEASURES, Measure


@dataclass(frozen=True)
class Power:
    """What one score notices.

    Attributes:
        rates: [shares] how often thinned sets raise an alarm, averaged over classes and splits.
        errors: [shares] their standard errors over splits: binomial for one class; classes of one split are not
            independent, so the splits' means are what is averaged.
        class_rates, class_errors: [classes, shares], the same class by class: binomial.
        false_alarms: how often untouched samples do; false_alarm_error is its standard error where the true rate is
            `nominal`, the luck of the thresholds included.
        nominal: the rate that is allowed.
        n_null: sets behind `false_alarms`.
        threshold: beyond which there is an alarm, in the score's bad direction; the median over the judged splits.
    """

    rates: list[float]
    errors: list[float]
    class_rates: list[list[float]]
    class_errors: list[list[float]]
    false_alarms: float
    false_alarm_error: float
    nominal: float
    n_null: int
    threshold: float

    @property
    def miscalibrated(self) -> bool:
        """Whether false alarms are above the allowed rate by more than two standard errors."""
        return self.false_alarms > self.nominal + 2 * self.false_alarm_error

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def allowed(n: int, level: float) -> int:
    """Of n values of untouched samples the so many worst alarm: each is beyond the one of this rank among the others.

    Where all come from one distribution, that has probability rank / n, less where values tie (the rank argument of
    conformal prediction: Vovk, Gammerman and Shafer 2005).

    Raises:
        UserError: even one of n is more than `level`.
    """
    rank = math.floor(level * n + 1e-9)
    if not 0 < level < 1 or rank < 1:
        raise UserError(f"{n} splits cannot calibrate a threshold at level {level:g}: take a higher level, or more")
    return rank


def power_of(measure: Measure, level: float, calibration: np.ndarray, null: np.ndarray, thinned: np.ndarray) -> Power:
    """Power and false alarms of one score.

    The threshold for a split is the one-sided quantile of the untouched samples of all other splits.

    Args:
        measure: its bad direction, and whether it needs a threshold.
        level: the one-sided false-alarm rate that is allowed.
        calibration: values of untouched samples of splits that are not judged, [n].
        null: values of untouched samples of the judged splits, [splits].
        thinned: values of their thinned samples, [splits, classes, shares].

    Raises:
        UserError: as `allowed`.
    """
    splits, total = len(null), len(null) + len(calibration)
    thresholds, nominal = np.zeros(splits), level
    judged, error = np.concatenate([calibration, null]), math.sqrt(level * (1 - level) / total)
    if measure.calibrated:
        rank = allowed(total, level)
        worst = np.sort(measure.worse * judged)[::-1]
        # Without a value that is among the worst, the one after them moves up.
        thresholds = np.where(measure.worse * null >= worst[rank - 1], worst[rank], worst[rank - 1])
        judged, nominal = null, rank / total
        # Which of the worst belong to judged splits: hypergeometric.
        error = math.sqrt(rank * calibration.size * (total - rank) / (splits * (total - 1))) / total
    beyond = thresholds if measure.calibrated else np.zeros(total)
    alarms = measure.worse * thinned > thresholds[:, None, None]
    means, by_class = alarms.mean(axis=1), alarms.mean(axis=0)
    return Power(
        rates=means.mean(axis=0).tolist(),
        errors=(means.std(axis=0) / math.sqrt(splits)).tolist(),
        class_rates=by_class.tolist(),
        class_errors=np.sqrt(by_class * (1 - by_class) / splits).tolist(),
        false_alarms=float((measure.worse * judged > beyond).mean()),
        false_alarm_error=error,
        nominal=nominal,
        n_null=len(judged),
        threshold=measure.worse * float(np.median(thresholds)),
    )


_ORANGE, _SKY = "#E69F00", "#56B4E9"  # of the palette of `eval.canvas`
_STYLES: Mapping[str, tuple[str, str, str]] = {
    "ndb": (canvas.VERMILLION, "-", "o"),
    "ndb_holm": (canvas.VERMILLION, "--", "s"),
    "ndb_bh": (canvas.VERMILLION, ":", "D"),
    "js": (_ORANGE, "-", "^"),
    "fid": (canvas.BLUE, "-", "o"),
    "kid": (canvas.BLUE, "--", "s"),
    "sliced": (_SKY, "-", "v"),
    "coverage": (canvas.GREEN, "-", "o"),
    "recall": (canvas.GREEN, "--", "s"),
    "density": (canvas.MUTED, "-", "^"),
    "precision": (canvas.MUTED, ":", "v"),
}
_GAP = 0.078


def power_curves(found: Mapping[str, Power], keep: Sequence[float], level: float, title: str) -> bytes:
    """Power of every score against the share of the class that is kept; all of it is the false-alarm rate."""
    figure = canvas.new_figure(9, 5.2)
    axes = figure.add_subplot()
    canvas.style_axes(axes)
    shares = np.array([1.0, *sorted(keep, reverse=True)])
    order = np.argsort(-np.asarray(keep), kind="stable")
    curves = {name: np.array([each.false_alarms, *np.array(each.rates)[order]]) for name, each in found.items()}
    # Labels stand in the order of the curves at their end, and of the whole curves where these meet.
    names = sorted(curves, key=lambda name: (-curves[name][-1], -curves[name].mean()))
    heights = _spread(np.array([curves[name][-1] for name in names]))
    axes.axhline(level, color=canvas.PALE, linewidth=1, linestyle=(0, (2, 2)))
    beside = axes.get_yaxis_transform()
    for name, height in zip(names, heights):
        colour, line, marker = _STYLES[name]
        drawn: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 1.7, "clip_on": False}
        drawn |= {"marker": marker, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
        axes.plot(shares, curves[name], **drawn)
        # From the curve's end a thin line to a piece of the curve, and its name: ends may meet in one point.
        leader = ([1.008, 1.05], [curves[name][-1], height])
        axes.plot(*leader, color=colour, linewidth=0.6, alpha=0.7, clip_on=False, transform=beside)
        axes.plot([1.05, 1.075, 1.1], [height] * 3, markevery=[1], transform=beside, **drawn)
        axes.text(1.11, height, MEASURES[name].label, transform=beside, va="center", fontsize=9.5, color=colour)
    axes.set_xlim(1.0, shares[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xticks(shares, ["100 %\n(untouched)", *(f"{100 * share:.3g} %" for share in shares[1:])])
    told = f"share of the class that is kept (dotted: false alarms allowed, {level:.3g})"
    axes.set_xlabel(told, fontsize=9, color=canvas.MUTED)
    axes.set_ylabel("share of sets that raise an alarm", fontsize=9, color=canvas.MUTED)
    canvas.heading(figure, title)
    return canvas.png(figure)


def _spread(wanted: np.ndarray) -> np.ndarray:
    """Heights near the wanted ones (falling) that leave a gap between neighbours and stay within the axes."""
    steps = _GAP * np.arange(len(wanted))
    placed = np.minimum.accumulate(np.minimum(wanted, 1.0) + steps) - steps
    # What would hang below the axis pushes the others up.
    lowest = steps[::-1]
    return np.asarray(np.maximum(placed, lowest))
