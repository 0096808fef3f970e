"""A generator with a latent mixture and a classifier that tells its Gaussians apart (Huang et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data.errors import UserError
from trainer.families.adversarial import refuse_zero_3
from trainer.settings import FamilySettings, InitialisationSettings, OptimiserSettings, Settings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective

# The discriminator starts from a seed of its own: it leaves the model's start as it is.
_DISCRIMINATOR_SEED = 1


def _adam() -> OptimiserSettings:
    return OptimiserSettings(learning_rate=2e-4, beta1=0.5, beta2=0.999)


class EncoderSettings(Settings):
    """The layers before the last of discriminator and classifier, and their optimisers."""

    n_hidden: int = Field(100, ge=1, description="units of a hidden layer")
    n_layers: int = Field(1, ge=0, description="hidden layers; of images: after the convolutions")
    width: int = Field(32, ge=1, description="images: channels of the first convolution, which each stage doubles")
    shared: bool = Field(False, description="one encoder for both, which moves with either")
    discriminator: OptimiserSettings = Field(default_factory=_adam, description="of the discriminator and its encoder")
    classifier: OptimiserSettings = Field(default_factory=_adam, description="of the classifier and its own encoder")


class ResponsibilitySettings(FamilySettings):
    """Responsibility learning; the generator's optimiser is training.optimiser. Defaults are the paper's letter."""

    noun: ClassVar[str] = "responsibility GAN"
    loss: ClassVar[str] = "generator's loss"
    sections: ClassVar[tuple[str, ...]] = ("evaluation",)

    family: Literal["responsibility"] = Field(
        "responsibility", description="model family; one file in trainer/models each"
    )
    n_components: int = Field(10, ge=2, description="Gaussians of the noise")
    n_latent: int = Field(32, ge=1, description="dimension of the noise")
    n_hidden: int = Field(128, ge=1, description="generator: units of a hidden layer; not of images")
    n_layers: int = Field(3, ge=0, description="generator: hidden layers; not of images")
    width: int = Field(32, ge=1, description="images: channels of the generator's last hidden stage; doubled before it")
    spread: float = Field(1.0, ge=0, description="standard deviation of the Gaussians' means at the start")
    prior: Literal["learnt", "unit"] = Field("learnt", description="learns means and deviations; unit: means alone")
    adversarial_loss: Literal["minimax", "non-saturating"] = Field("minimax", description="of the generator (eq. 6)")
    pairs: Literal["independent", "augmented", "nearest"] | None = Field(
        "independent", description="what eq. 5 compares real images with; null leaves eq. 5 out"
    )
    agreement: Literal["information", "invariance"] = Field(
        "information", description="eq. 5, or assignments that a change of the image leaves, certain and equally many"
    )
    generated: Literal["all", "drawn"] = Field(
        "all", description="images of all Gaussians beside each real one, or of one that its responsibilities draw"
    )
    uniform_share: float = Field(0.0, ge=0, le=1, description="share of equal weights in the responsibilities of eq. 6")
    classifier_adversarial: bool = Field(True, description="whether the classifier moves by eq. 6, too")
    label_steps: int | None = Field(
        0, ge=0, description="first steps, with the cross-entropy to the Gaussians' numbers; null: all steps"
    )
    classifier_consistency: float = Field(1.0, ge=0, description="weight of eq. 4 in the classifier's loss")
    generator_consistency: float = Field(
        0.0, ge=0, description="weight of eq. 4 in the generator's loss, of whose other part eq. 6 takes a K-th"
    )
    discriminators: Literal["one", "each"] = Field(
        "one", description="one for all Gaussians, or one for each: a common value, and what each adds to it"
    )
    real_penalty: float = Field(
        0.0, ge=0, description="weight of |∇f|² / 2 at the data (R1) in the discriminator's loss"
    )
    encoder: EncoderSettings = Field(default_factory=lambda: EncoderSettings())
    prior_optimiser: OptimiserSettings = Field(default_factory=_adam, description="of the Gaussians; its average, too")

    @model_validator(mode="after")
    def _pairs_belong_together(self) -> ResponsibilitySettings:
        if self.agreement == "invariance" and self.pairs != "augmented":
            raise ValueError(
                "model.agreement=invariance compares an image with a changed one of it: set model.pairs=augmented, or "
                "model.agreement=information"
            )
        if self.generated == "drawn" and self.pairs == "independent":
            raise ValueError(
                "model.generated=drawn draws the image beside a real one by what that one is: model.pairs=independent "
                "cannot be; set augmented, nearest or null"
            )
        return self

    @model_validator(mode="after")
    def _averages_fit(self) -> ResponsibilitySettings:
        encoder = self.encoder
        if encoder.shared and encoder.discriminator.average != encoder.classifier.average:
            raise ValueError(
                "model.encoder.shared=true: the encoder moves by encoder.discriminator, the classifier's last layer by "
                "encoder.classifier: set the same average for both"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_there(self) -> ResponsibilitySettings:
        if self.generated == "drawn" and self.classifier_adversarial:
            raise ValueError(
                "model.generated=drawn leaves no weights for the classifier to learn eq. 6 by: set "
                "model.classifier_adversarial=false, or model.generated=all"
            )
        return self

    @property
    def label(self) -> str:
        return f"responsibility GAN, K={self.n_components}"

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        if training.batch_size % lanes:
            raise ValueError(
                f"training.batch_size ({training.batch_size}) is shared by {lanes} lanes: make it a multiple of {lanes}"
            )
        refuse_zero_3(training, "a player that is asked in the others' turns: ZeRO-3 then holds it in parts")

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        from trainer.models.gan import halvings

        if self.encoder.shared and not self.encoder.n_layers and not halvings(manifest.shape):
            raise UserError(
                f"model.encoder.n_layers=0: samples of shape {list(manifest.shape)} are no images, and leave a shared "
                "encoder without layers: raise it"
            )

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.responsibility import ResponsibilityGAN

        return ResponsibilityGAN(
            manifest.shape,
            self.n_components,
            *(self.n_latent, self.n_hidden, self.n_layers, self.width),
            bounded=manifest.levels is not None,
            spread=self.spread,
            prior=self.prior,
            encoder_hidden=self.encoder.n_hidden,
            encoder_layers=self.encoder.n_layers,
            encoder_width=self.encoder.width,
            shared=self.encoder.shared,
        )

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initialise_scale

        if not model.bounded:
            initialise_scale(model, manifest, training, initialisation)

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        import torch
        from torch import nn

        from trainer.models.gan import Critic
        from trainer.objectives.responsibility import Decoder, ResponsibilityLearning
        from trainer.players import make_player

        encoder = self.encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed + _DISCRIMINATOR_SEED)
            discriminator: nn.Module
            heads = 1 + self.n_components if self.discriminators == "each" else 1
            if encoder.shared:
                discriminator = nn.Linear(model.encoder.n_outputs, heads)
            else:
                layers = encoder.n_layers
                discriminator = Critic(manifest.shape, heads, encoder.n_hidden, layers, layers, encoder.width)
                discriminator.set_scale(model.offset, model.scale)
        chosen = {
            "model": (Decoder(model.generator), training.optimiser),
            "prior": (model.prior, self.prior_optimiser),
            "classifier": (model.classifier, encoder.classifier),
            "discriminator": (discriminator, encoder.discriminator),
        }
        if encoder.shared:
            chosen["encoder"] = (model.encoder, encoder.discriminator)
        return ResponsibilityLearning(
            {name: make_player(module, settings, training.steps) for name, (module, settings) in chosen.items()},
            loss=self.adversarial_loss,
            pairs=self.pairs,
            agreement=self.agreement,
            generated=self.generated,
            uniform_share=self.uniform_share,
            classifier_adversarial=self.classifier_adversarial,
            label_steps=self.label_steps,
            classifier_consistency=self.classifier_consistency,
            generator_consistency=self.generator_consistency,
            real_penalty=self.real_penalty,
        )
