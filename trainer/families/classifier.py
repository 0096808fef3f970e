"""Classifiers of labelled data: the class probabilities and features that other models' samples are judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.errors import UserError
from trainer.settings import TRAIN_SPLIT, FamilySettings, InitialisationSettings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective


class ClassifierSettings(FamilySettings):
    """A convolutional network for images, a multi-layer perceptron for other samples."""

    noun: ClassVar[str] = "classifier"
    loss: ClassVar[str] = "cross-entropy"

    family: Literal["classifier"] = Field("classifier", description="model family; one file in trainer/models each")
    n_classes: int | None = Field(
        None, ge=2, le=100_000, description="labels are 0 to n_classes - 1; null takes the data's classes"
    )
    width: int = Field(32, ge=1, description="images: channels of the first stage, which each stage doubles")
    n_hidden: int = Field(128, ge=1, description="units of the hidden layer whose activations are the features")

    @property
    def label(self) -> str:
        return "classifier"

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        import numpy as np

        from data.stream import read_labels

        if not manifest.has_labels:
            raise UserError(f"{manifest.base}: the samples have no labels, which a classifier learns from: add them")
        n_classes = self._n_classes(manifest)
        for split in (name for name, record in manifest.splits.items() if record.samples):
            found = np.unique(read_labels(manifest, split))
            low, high = int(found[0]), int(found[-1])
            if low < 0 or high >= n_classes:
                raise UserError(
                    f"{manifest.base}: labels of {split} run from {low} to {high}, those of {n_classes} classes are "
                    f"0 to {n_classes - 1}: number them so, or set model.n_classes"
                )
            if split != TRAIN_SPLIT:
                continue
            if len(found) == 1:
                raise UserError(f"{manifest.base}: all samples of {split} are of class {low}: give two classes or more")
            if len(found) < n_classes and self._known(manifest) is None:
                absent = int(np.setdiff1d(np.arange(len(found) + 1), found)[0])
                raise UserError(
                    f"{manifest.base}: labels run from {low} to {high}, but none is {absent}: number the classes from "
                    "0, or set model.n_classes"
                )

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.classifier import Classifier

        return Classifier(manifest.shape, self._n_classes(manifest), self.width, self.n_hidden)

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initialise_scale

        initialise_scale(model, manifest, training, initialisation)

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        from trainer.objectives.classification import Classification
        from trainer.players import make_player

        return Classification(make_player(model, training.optimiser, training.steps))

    def _known(self, manifest: Manifest) -> int | None:
        return self.n_classes or (len(manifest.class_names) if manifest.class_names else None)

    def _n_classes(self, manifest: Manifest) -> int:
        """The number of classes: as set, as named by the data, or one more than the largest label."""
        from data.stream import read_labels

        return self._known(manifest) or max(2, int(read_labels(manifest, TRAIN_SPLIT).max()) + 1)
