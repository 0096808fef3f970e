"""The trainer's part of a recipe: every field has a type, a default and a one-line meaning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from data.limits import MAX_SEED

if TYPE_CHECKING:  # reading a recipe needs no torch
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective

TRAIN_SPLIT, TEST_SPLIT = "train", "test"


class Settings(BaseModel):
    """Base of all settings: unknown fields are errors, values are checked when they are set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class FamilySettings(Settings, ABC):
    """A model family, as one choice of the recipe's `model`: its fields, and all that training asks of it.

    A subclass has a `family`, the name of its file in trainer/models, and stands in the list of `trainer.families`.
    """

    noun: ClassVar[str]  # what a job trains, in its messages
    loss: ClassVar[str]  # what it minimises
    loss_unit: ClassVar[str] = "nats per sample"
    methods: ClassVar[tuple[str, ...]] = ("sgd",)  # of training
    sections: ClassVar[tuple[str, ...]] = ()  # which of the recipe's initialisation, hierarchy, evaluation it uses
    dequantises: ClassVar[bool] = False  # whether the model may be a density of dequantised pixels

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call the model."""

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        """Refuses data that cannot be trained on, before any worker is started.

        Raises:
            UserError: what is wrong with it.
        """

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        """Refuses, when a recipe is read, what cannot be trained so; the data's order is cut into `lanes` shares.

        Raises:
            ValueError: which combination, and what to do.
        """

    @abstractmethod
    def build(self, manifest: Manifest) -> nn.Module:
        """The untrained model for the manifest's samples; torch's generator is seeded."""

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        """Sets the starting point from data, on rank 0; the other ranks get its tensors.

        Raises:
            UserError: data that does not give one.
        """

    @abstractmethod
    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        """What is optimised, with the model's networks as players.

        The player `model` is the model itself, what remains when training ends; others, such as a critic, help it.
        """


class InitialisationSettings(Settings):
    """How a mixture starts: clusters of the samples, and a factor analysis of each."""

    method: Literal["kmeans", "random", "k-subspaces"] = Field(
        "kmeans", description="clusters by K-means, or of n_factors + 1 random samples each, as they are or refined"
    )
    n_starts: int = Field(1, ge=1, description="starting points, of which the one of highest likelihood is taken")
    max_samples: int = Field(60_000, ge=1, description="samples read for the initialisation")
    kmeans_samples: int | None = Field(None, ge=1, description="random subset of them used by K-means; all if null")
    kmeans_dimensions: int | None = Field(None, ge=1, description="random subset of features used by K-means")
    n_init: int = Field(3, ge=1, description="K-means initialisations, of which the best is taken")
    noise_prior_count: float = Field(
        0.0, ge=0, le=1e12, description="pseudo-samples of the prior on the noise variances, which stays on in training"
    )
    noise_prior_smoothing: float = Field(
        0.0, ge=0, description="images: width in pixels of a Gaussian blur of the prior's variances"
    )


class OptimiserSettings(Settings):
    """Optimiser and learning-rate schedule of a player."""

    name: Literal["adam", "rmsprop", "sgd"] = Field("adam", description="update rule")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate; the momentum of sgd and rmsprop")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second decay rate; the smoothing of rmsprop")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    gradient_clip: float | None = Field(None, gt=0, description="largest gradient norm; null never clips")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a running average of the weights, which the trained model has; 0: the last",
    )


class EMSettings(Settings):
    """Expectation-maximisation: passes over the training split."""

    iterations: int = Field(20, ge=0, description="passes over the training split")
    tolerance: float | None = Field(
        0.0, ge=0, description="stop when a pass gains less, in nats per sample; null never stops early"
    )
    screening_features: int | None = Field(
        None, ge=1, description="random features by which components are screened for each sample; null takes all"
    )
    checkpoint_every: int = Field(5, ge=1, description="passes between checkpoints")


class TrainingSettings(Settings):
    """One training run of one model."""

    method: Literal["sgd", "em"] = Field("sgd", description="stochastic gradients, or expectation-maximisation")
    em: EMSettings = Field(default_factory=lambda: EMSettings())
    steps: int = Field(1000, ge=0, description="optimiser steps in all")
    batch_size: int = Field(256, ge=1, description="samples per step over all workers together")
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="fixes the order of the data, the dequantisation and the initialisation"
    )
    dequantise: bool = Field(True, description="add uniform noise to integer pixels, x = (v + u) / levels in [0, 1)")
    augment: list[Literal["mirror"]] = Field(
        default_factory=list, description="variants of the samples: by gradients a random one per epoch, by EM all"
    )
    engine: Literal["ddp", "deepspeed"] = Field("ddp", description="what synchronises the workers")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed's ZeRO stage")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(20, ge=1, description="steps between log entries")
    loader_workers: int = Field(0, ge=0, description="processes that read ahead; 0 is fastest for packed blocks")
    lanes: int | None = Field(
        None, ge=1, description="shares in which the data's order is cut; null takes the number of workers"
    )
    optimiser: OptimiserSettings = Field(default_factory=lambda: OptimiserSettings())

    @property
    def length(self) -> int:
        """Optimiser steps, or passes where it is by EM."""
        return self.steps if self.method == "sgd" else self.em.iterations

    def dequantises(self, levels: int | None) -> bool:
        """Whether data of so many levels (None: real numbers) is dequantised."""
        return self.dequantise and levels is not None
