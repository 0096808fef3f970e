"""Details for the samples of a trained mixture, by a conditional GAN (MFA + pix2pix; Richardson & Weiss 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.errors import UserError
from trainer.families.adversarial import refuse_zero_3
from trainer.settings import FamilySettings, InitialisationSettings, OptimiserSettings, Settings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective

# The critic starts from a seed of its own: it leaves the generator's start as it is.
_CRITIC_SEED = 1


class PatchCriticSettings(Settings):
    """The critic of patches (PatchGAN) and its optimiser."""

    width: int = Field(32, ge=1, description="channels of the first convolution, which each stage doubles")
    stages: int = Field(2, ge=1, description="strided convolutions: two see patches of 18x18 pixels, three of 38x38")
    optimiser: OptimiserSettings = Field(
        default_factory=lambda: OptimiserSettings(learning_rate=2e-4, beta1=0.5, beta2=0.999)
    )


class Pix2PixSettings(FamilySettings):
    """A U-Net that adds details to a mixture's images; its optimiser is training.optimiser."""

    noun: ClassVar[str] = "U-Net"
    loss: ClassVar[str] = "generator's loss"
    sections: ClassVar[tuple[str, ...]] = ("evaluation",)

    family: Literal["pix2pix"] = Field("pix2pix", description="model family; one file in trainer/models each")
    mixture: str = Field(description="a trained MFA of the same data: models:/NAME@ALIAS, a model's or a run's folder")
    width: int = Field(32, ge=1, description="channels of the U-Net's first stage; each stage doubles them")
    l1_weight: float = Field(100.0, ge=0, description="weight of the L1 distance to the image, pixels in [-1, 1]")
    critic: PatchCriticSettings = Field(default_factory=lambda: PatchCriticSettings())

    @property
    def label(self) -> str:
        return "MFA + pix2pix"

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        if training.batch_size % lanes:
            raise ValueError(
                f"training.batch_size ({training.batch_size}) is shared by {lanes} lanes: make it a multiple of {lanes}"
            )
        refuse_zero_3(training, "a generator that is asked in its critic's turn: ZeRO-3 then holds it in parts")

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        from trainer.models.gan import halvings

        most = halvings(manifest.shape)
        if not most or manifest.levels is None:
            raise UserError(
                f"{manifest.base}: samples of shape {list(manifest.shape)} are no images of 8-bit pixels whose sides "
                "can be halved: details are for such images"
            )
        if self.critic.stages > most:
            raise UserError(f"model.critic.stages ({self.critic.stages}): these images allow {most}: lower it")
        self._opened(manifest)

    def build(self, manifest: Manifest) -> nn.Module:
        """The untrained U-Net around the trained mixture, which becomes part of the model."""
        from trainer.models.pix2pix import Pix2Pix

        mixture = self._opened(manifest)
        arguments = mixture.config
        del arguments["n_features"]
        model = Pix2Pix(manifest.shape, **arguments, width=self.width)
        model.mixture.load_state_dict(mixture.state_dict())
        return model

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        import torch

        from trainer.models.pix2pix import PatchCritic
        from trainer.objectives.pix2pix import ImageTranslation
        from trainer.players import make_player

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed + _CRITIC_SEED)
            critic = PatchCritic(manifest.shape, self.critic.width, self.critic.stages)
        return ImageTranslation(
            make_player(model, training.optimiser, training.steps),
            make_player(critic, self.critic.optimiser, training.steps),
            self.l1_weight,
        )

    def _opened(self, manifest: Manifest) -> Any:
        """The mixture.

        Raises:
            UserError: no model there, another one than an MFA, or one of samples of another shape.
        """
        from trainer.checkpoint import load_model

        if self.mixture.startswith("models:"):
            raise UserError(f"model.mixture={self.mixture}: only a job opens the registry: give the model's folder")
        model, document = load_model(self.mixture)
        if document["family"] != "mfa":
            raise UserError(
                f"model.mixture={self.mixture}: a model of the family {document['family']}: give a mixture of factor "
                "analysers"
            )
        if list(document["data"]["shape"]) != list(manifest.shape):
            raise UserError(
                f"model.mixture={self.mixture}: its samples have the shape {document['data']['shape']}, those of "
                f"{manifest.base} {list(manifest.shape)}: train it on the same data"
            )
        return model
