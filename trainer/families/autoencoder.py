"""Autoencoders whose codes are shaped to a prior: SWAE, VAE, WAE-MMD, WAE-GAN, VAE-DFC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data import storage
from data.errors import UserError
from trainer.families.adversarial import CriticSettings, refuse_zero_3
from trainer.families.priors import PriorSettings
from trainer.settings import FamilySettings, InitialisationSettings, OptimiserSettings, Settings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.models.classifier import Classifier
    from trainer.objectives import Objective

_OF_KINDS = {"critic": ("gan",), "global_batch": ("sliced-wasserstein", "mmd")}
_OF_SLICES = ("projections", "prior_samples", "power")
_NAMES = {"none": "autoencoder", "sliced-wasserstein": "SWAE", "mmd": "WAE-MMD", "gan": "WAE-GAN", "kl": "VAE"}


class FeatureLossSettings(Settings):
    """Deep features: what a classifier of this project sees in an image and in its reconstruction."""

    model: str = Field(description="folder or URL of the classifier, or of the run that made it; all workers reach it")
    sha256: str | None = Field(None, description="of its weights.safetensors: training is refused with any other")
    weight: float = Field(1.0, gt=0, description="of the loss, Σ over hidden layers of ½ mean squared difference")

    @field_validator("model")
    @classmethod
    def _for_all_workers(cls, place: str) -> str:
        return storage.check_url(place)

    def classifier(self) -> Classifier:
        """The classifier.

        Raises:
            UserError: none there, one that is not pinned, or another than the one that is.
        """
        from trainer.checkpoint import load_model
        from trainer.models.classifier import Classifier

        base = self.model
        inner = storage.join(base, "model")
        folder = inner if storage.exists(storage.join(inner, "model.json")) else base
        model, document = load_model(folder)
        if not isinstance(model, Classifier):
            raise UserError(f"{self.model}: a model of the family {document['family']} is no classifier: give one")
        found = storage.sha256(storage.join(folder, "weights.safetensors"))
        if self.sha256 != found:
            what = "is not pinned" if self.sha256 is None else f"has other weights than {self.sha256[:12]}..."
            raise UserError(f"{self.model}: {what}: set model.reconstruction.features.sha256={found}")
        return model


class ReconstructionSettings(Settings):
    """What a sample and its reconstruction cost: weights of several terms."""

    cross_entropy: float = Field(0.0, ge=0, description="weight of the binary cross-entropy (nats); pixels only")
    absolute: float = Field(0.0, ge=0, description="weight of |x - x̂|")
    squared: float = Field(1.0, ge=0, description="weight of (x - x̂)², in units of the data's scale")
    summed: bool = Field(False, description="sums over pixels (a VAE's likelihood), instead of means")
    features: FeatureLossSettings | None = Field(None, description="deep-feature loss of a classifier; null: none")

    @model_validator(mode="after")
    def _asks_something(self) -> ReconstructionSettings:
        if not (self.cross_entropy or self.absolute or self.squared or self.features):
            raise ValueError("no weight is above 0: give cross_entropy, absolute, squared or features")
        return self


class RegulariserSettings(Settings):
    """What draws the codes to the prior."""

    kind: Literal["none", "sliced-wasserstein", "mmd", "gan", "kl"] = Field(
        "sliced-wasserstein", description="SWAE, WAE-MMD, WAE-GAN (a critic of codes) or VAE"
    )
    weight: float = Field(10.0, gt=0, description="λ, against the reconstruction")
    projections: int = Field(50, ge=1, description="sliced-wasserstein: random directions in a step")
    prior_samples: int = Field(1, ge=1, description="sliced-wasserstein: draws of the prior for each code")
    power: float = Field(2.0, ge=1, description="sliced-wasserstein: p of the cost |t|^p")
    global_batch: bool = Field(True, description="sliced-wasserstein, mmd: over all workers' codes, not each one's own")
    critic: CriticSettings = Field(
        default_factory=lambda: CriticSettings(
            n_hidden=128, n_layers=3, optimiser=OptimiserSettings(learning_rate=1e-3, beta1=0.5, beta2=0.999)
        ),
        description="gan",
    )

    @model_validator(mode="after")
    def _fits(self) -> RegulariserSettings:
        if self.kind != "sliced-wasserstein":
            for name in _OF_SLICES:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is of kind=sliced-wasserstein: leave it out")
        for name, kinds in _OF_KINDS.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if self.kind not in kinds and getattr(self, name) != default:
                raise ValueError(f"{name} is of kind={' or '.join(kinds)}: leave it out")
        return self


class AutoencoderSettings(FamilySettings):
    """An encoder and a decoder: convolutions for images, multi-layer perceptrons for other samples."""

    noun: ClassVar[str] = "autoencoder"
    loss: ClassVar[str] = "autoencoder's loss"
    loss_unit: ClassVar[str] = ""
    sections: ClassVar[tuple[str, ...]] = ("evaluation",)

    family: Literal["autoencoder"] = Field("autoencoder", description="model family; one file in trainer/models each")
    n_latent: int = Field(2, ge=1, description="dimension of the code")
    prior: PriorSettings = Field(default_factory=lambda: PriorSettings())
    n_hidden: int = Field(128, ge=1, description="units of a hidden layer")
    n_layers: int = Field(2, ge=0, description="hidden layers of each network; not of images")
    image: tuple[int, int] | None = Field(
        None, description="[height, width] of the images that the recipe is for; others are refused; null takes any"
    )
    width: int = Field(16, ge=1, description="images: channels of the first stage, which each stage doubles")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of training's matrix products; bfloat16 is left where a machine only emulates it"
    )
    channels_last: bool = Field(True, description="images: channels last in memory, which is faster in most places")
    codes_per_image: int = Field(
        1, ge=1, description="codes in the regulariser for each image that is decoded, all of training.batch_size"
    )
    reconstruction: ReconstructionSettings = Field(default_factory=lambda: ReconstructionSettings())
    regulariser: RegulariserSettings = Field(default_factory=lambda: RegulariserSettings())

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderSettings:
        self.prior.check_dimension(self.n_latent)
        if self.regulariser.kind == "kl" and self.prior.kind != "gaussian":
            raise ValueError(
                "regulariser.kind=kl has a closed form for prior=gaussian alone: set that, or another kind"
            )
        return self

    @property
    def label(self) -> str:
        kind = self.regulariser.kind
        name = "VAE-DFC" if kind == "kl" and self.reconstruction.features else _NAMES[kind]
        return name if kind in ("none", "kl") else f"{name}, {self.prior.label}"

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        kind, rows = self.regulariser.kind, training.batch_size
        if training.batch_size % (lanes * self.codes_per_image):
            raise ValueError(
                f"training.batch_size ({training.batch_size}) must be a multiple of {lanes} lanes times "
                f"model.codes_per_image ({self.codes_per_image})"
            )
        if kind in ("sliced-wasserstein", "mmd"):
            rows = rows if self.regulariser.global_batch else rows // lanes
            if rows < 2:
                raise ValueError(
                    f"a distribution of codes cannot be told from {rows} sample: raise training.batch_size "
                    f"({training.batch_size})"
                )
        if kind == "gan":
            refuse_zero_3(training, "kind=gan, in which each network is asked in the other's turn")

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        if self.image is not None and (len(manifest.shape) < 2 or tuple(manifest.shape[:2]) != self.image):
            raise UserError(
                f"{manifest.base}: samples of shape {list(manifest.shape)}, the recipe is for images of "
                f"{' x '.join(map(str, self.image))}: resize them (data.options.size), or set model.image=null"
            )
        if manifest.levels is None and self.reconstruction.cross_entropy:
            raise UserError(
                f"{manifest.base}: the cross-entropy is for pixels, these are real numbers: set "
                "model.reconstruction.cross_entropy=0 and squared=1"
            )
        self.prior.points(self.n_latent)
        if self.reconstruction.features:
            classifier = self.reconstruction.features.classifier()
            if (*classifier.shape, 1)[:3] != (*manifest.shape, 1)[:3]:
                raise UserError(
                    f"{manifest.base}: samples of shape {list(manifest.shape)}, the classifier "
                    f"{self.reconstruction.features.model} knows {list(classifier.shape)}: give another"
                )

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.autoencoder import Autoencoder

        points = self.prior.points(self.n_latent)
        model = Autoencoder(
            manifest.shape,
            self.n_latent,
            self.prior.config(points),
            self.n_hidden,
            self.n_layers,
            self.width,
            bounded=manifest.levels is not None,
            stochastic=self.regulariser.kind == "kl",
            precision=self.precision,
            channels_last=self.channels_last,
        )
        self.prior.fill(model.prior, points)
        return model

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initialise_scale

        if not model.bounded:
            initialise_scale(model, manifest, training, initialisation)

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        from trainer.objectives import autoencoding as of
        from trainer.objectives import regularisers
        from trainer.players import make_player

        r, features = self.regulariser, self.reconstruction.features
        player = make_player(model, training.optimiser, training.steps)
        terms = self.reconstruction.model_dump(exclude={"features"})
        reconstruction = of.Reconstruction(**terms, features=features.weight if features else 0.0)
        options: dict[str, Any] = {
            "stride": self.codes_per_image,
            "classifier": features.classifier() if features else None,
        }
        if r.kind == "gan":
            codes = manifest.model_copy(update={"shape": (self.n_latent,), "levels": None})
            critic = r.critic.player(model, codes, training, 1)
            return of.AdversarialAutoencoding(player, critic, model.prior, reconstruction, r.weight, **options)
        workers = regularisers.OverWorkers(r.global_batch)
        regulariser: regularisers.Regulariser | None = None
        if r.kind == "sliced-wasserstein":
            cost = regularisers.power(r.power)
            regulariser = regularisers.SlicedWasserstein(model.prior, r.projections, r.prior_samples, cost, workers)
        elif r.kind == "mmd":
            regulariser = regularisers.MaximumMeanDiscrepancy(model.prior, workers)
        elif r.kind == "kl":
            regulariser = regularisers.KullbackLeibler()
        return of.Autoencoding(player, reconstruction, regulariser, r.weight, **options)
