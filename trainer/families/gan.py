"""Generators without a density: trained against a critic, or by optimal transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.families.adversarial import AdversarialSettings, TransportSettings
from trainer.settings import FamilySettings, InitialisationSettings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective


class GANSettings(FamilySettings):
    """A generator: transposed convolutions for images (DCGAN), a multi-layer perceptron for other samples."""

    noun: ClassVar[str] = "generator"
    loss: ClassVar[str] = "generator's loss"
    loss_unit: ClassVar[str] = ""
    sections: ClassVar[tuple[str, ...]] = ("evaluation",)

    family: Literal["gan"] = Field("gan", description="model family; one file in trainer/models each")
    n_latent: int = Field(32, ge=1, description="dimension of the noise")
    n_hidden: int = Field(128, ge=1, description="units of a hidden layer; not of images")
    n_layers: int = Field(3, ge=0, description="hidden layers; not of images")
    width: int = Field(32, ge=1, description="images: channels of the last hidden stage; each before it has twice more")
    adversarial: AdversarialSettings | None = Field(None, description="training against a critic; or null and ...")
    transport: TransportSettings | None = Field(None, description="... training by optimal transport; or null")

    @model_validator(mode="after")
    def _one_teacher(self) -> GANSettings:
        if (self.adversarial is None) == (self.transport is None):
            raise ValueError("a generator is trained by `adversarial` or by `transport`: give one of them")
        if self.adversarial and self.adversarial.needs_density:
            raise ValueError(
                "adversarial.likelihood_weight and assignment are for densities, such as family: flow: leave them out"
            )
        return self

    @property
    def label(self) -> str:
        if self.adversarial is None:
            return "Sinkhorn generator"
        if self.adversarial.loss != "wasserstein":
            return "GAN"
        return "WGAN-GP" if self.adversarial.gradient_penalty else "WGAN, clipped"

    @property
    def _training(self) -> AdversarialSettings | TransportSettings:
        found = self.adversarial or self.transport
        assert found is not None  # by the validator
        return found

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        self._training.check_training(training, lanes)

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.gan import Generator

        bounded = manifest.levels is not None
        return Generator(manifest.shape, self.n_latent, self.n_hidden, self.n_layers, self.width, bounded)

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initialise_scale

        if not model.bounded:
            initialise_scale(model, manifest, training, initialisation)

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        return self._training.objective(model, manifest, training)
