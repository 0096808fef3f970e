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

    {out} in an override stands for the study's folder, where the prerequisites' models are.
    """

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    printed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A measured number in the table: its key, heading, and number of decimals."""

    key: str
    heading: str
    decimals: int = 3


@dataclass(frozen=True)
class Outcome:
    """What one training left.

    Attributes:
        seed: of the training.
        metrics: by the columns' keys (and more); `start/KEY` is the same before training.
        steps, curve: the training's objective as it was logged.
        seconds: of training.
        drawn: arrays for the figures.
    """

    seed: int
    metrics: Mapping[str, float]
    steps: Sequence[int]
    curve: Sequence[float]
    seconds: float
    drawn: Mapping[str, np.ndarray]


Outcomes = Mapping[str, Sequence[Outcome]]  # by the members' labels


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

    def prepare(self, out: str, packs: Mapping[str, Manifest], notice: Callable[[str], None]) -> None:  # noqa: B027
        """Makes in `out` what all members are measured by, once, after the prerequisites; packs by members' labels."""

    def objective(self, recipe: Recipe) -> Callable[[Any, Manifest, TrainingSettings], Objective]:
        """What a member optimises."""
        return recipe.model.objective

    @abstractmethod
    def measure(self, trained: Trained) -> dict[str, float]:
        """The numbers of the columns, of a model before training and after it."""

    def draw(self, trained: Trained) -> dict[str, np.ndarray]:
        """Arrays for the figures, of a trained model."""
        return {}

    @abstractmethod
    def figures(self, outcomes: Outcomes) -> list[ReportFigure]:
        """The figures, of all that was trained."""
