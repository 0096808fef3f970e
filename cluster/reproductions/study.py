"""What a reproduction consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from cluster.recipe import Recipe
    from data.manifest import Manifest
    from eval.report import ReportFigure
    from trainer.objectives import Objective
    from trainer.settings import TrainingSettings


@dataclass(frozen=True)
class Member:
    """One row of the table: a shipped recipe, changed; `printed` is what the publication says, by the columns' keys.

    In an override {out} stands for the study's folder, where the prerequisites' models are, and {sha256 LABEL} for the
    checksum of a prerequisite's weights.
    """

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    printed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A measured number in the table: key, heading, decimals; `largest`: the largest of the seeds beside the mean."""

    key: str
    heading: str
    decimals: int = 3
    largest: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one training left.

    Attributes:
        seed: of the training.
        metrics: by the columns' keys (and more); `start/KEY` is the same before training. May be infinite or NaN.
        steps, curve: the training's objective as it was logged.
        followed: what `Reproduction.follow` gave at the checkpoints, by steps done.
        seconds: of training.
        drawn: arrays for the figures.
    """

    seed: int
    metrics: Mapping[str, float]
    steps: Sequence[int]
    curve: Sequence[float]
    seconds: float
    drawn: Mapping[str, np.ndarray]
    followed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


Outcomes = Mapping[str, Sequence[Outcome]]  # by the members' labels


def courses(outcomes: Outcomes, key: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """What was followed under `key`, by label: steps done, and values [seeds, checkpoints]."""
    found = {}
    for label, each in outcomes.items():
        steps = sorted(step for step, metrics in each[0].followed.items() if key in metrics) if each else []
        if steps:
            found[label] = (steps, np.array([[one.followed[step][key] for step in steps] for one in each]))
    return found


@dataclass
class Trained:
    """A model before or after training, as `Reproduction.measure` and `draw` get it."""

    model: Any
    critic: Any
    recipe: Recipe
    manifest: Manifest
    seed: int
    out: str  # the study's folder


class Reproduction(ABC):
    """A study of several recipes and seeds, after a publication."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]  # the publication, and which of its tables and figures
    prerequisites: ClassVar[tuple[Member, ...]] = ()  # trained first, once, and not in the table
    members: ClassVar[tuple[Member, ...]]
    columns: ClassVar[tuple[Column, ...]]
    note: ClassVar[str]  # how the numbers were taken, below the table
    seeds: ClassVar[int] = 5
    curve: ClassVar[str] = "loss"  # which logged metric is the curve
    measures_start: ClassVar[bool] = True  # whether models are measured before training, too

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:  # noqa: B027
        """Makes in `out` what all members are measured by, once, after the prerequisites; packs by members' labels."""

    def objective(self, recipe: Recipe) -> Callable[[Any, Manifest, TrainingSettings], Objective]:
        """What a member optimises."""
        return recipe.model.objective

    @abstractmethod
    def measure(self, trained: Trained) -> dict[str, float]:
        """The numbers of the columns, of a model before training and after it."""

    def follow(self, trained: Trained) -> dict[str, float]:
        """Numbers whose course over the training is drawn, of the model at each checkpoint (without its critic)."""
        return {}

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        """Arrays for the figures, of a trained model."""
        return {}

    @abstractmethod
    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        """The figures, of all that was trained."""
