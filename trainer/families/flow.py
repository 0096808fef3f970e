"""Normalising flows (NICE, Real NVP) and their mixture, MixFlow, by stochastic gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data.errors import UserError
from trainer.families.adversarial import AdversarialSettings
from trainer.settings import TRAIN_SPLIT, FamilySettings, InitialisationSettings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective


class FlowSettings(FamilySettings):
    """A mixture of flows, or a single one."""

    noun: ClassVar[str] = "flow"
    loss: ClassVar[str] = "negative log-likelihood"
    sections: ClassVar[tuple[str, ...]] = ("initialisation", "evaluation")
    dequantises: ClassVar[bool] = True

    family: Literal["flow"] = Field("flow", description="model family; one file in trainer/models each")
    n_components: int = Field(1, ge=1, description="flows in the mixture; 1 is a single flow")
    n_couplings: int = Field(4, ge=0, description="coupling layers; of conv, for each mask at each scale")
    coupling: Literal["additive", "affine"] = Field("additive", description="coupling law: NICE's, or Real NVP's")
    network: Literal["mlp", "conv"] = Field("mlp", description="coupling networks: perceptrons, or convolutions")
    width: int = Field(100, ge=1, description="units, or channels, of a hidden layer")
    n_layers: int = Field(2, ge=0, description="hidden layers, or residual blocks, of a coupling network")
    residual: bool = Field(False, description="mlp: hidden layers add to what enters them")
    base: Literal["gaussian", "logistic"] = Field("gaussian", description="base distribution")
    affine: Literal["none", "diagonal", "full"] = Field(
        "diagonal", description="layer at the data: shift and width, or a triangular matrix; none is the naive start"
    )
    logit: float | None = Field(
        None, gt=0, lt=0.5, description="pixels: α of logit(α + (1 - 2 α) x) before the flow; null leaves them"
    )
    weights: Literal["gradient", "em"] = Field("gradient", description="how mixing coefficients are learnt")
    weight_rate: float = Field(0.05, gt=0, le=1, description="em: share λ of the way to the batch's responsibilities")
    weight_start: int = Field(0, ge=0, description="em: steps before the mixing coefficients move")
    entropic_weight: float = Field(0.0, ge=0, description="weight of the entropic regularisation -1/T Σ log π")
    stick_breaking: float | None = Field(
        None, gt=0, lt=1, description="share of the data that each further component must stand for; null prunes none"
    )
    pretrain_steps: int = Field(0, ge=0, description="first steps, in which each component learns its own label alone")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of training's matrix products; bfloat16 is left where a machine only emulates it"
    )

    adversarial: AdversarialSettings | None = Field(
        None, description="training against a critic, with or without likelihood; null: likelihood alone"
    )

    @model_validator(mode="after")
    def _one_prior(self) -> FlowSettings:
        if self.entropic_weight and self.stick_breaking is not None:
            raise ValueError("entropic_weight spreads the weights, stick_breaking gathers them: set one of them")
        return self

    @property
    def label(self) -> str:
        kind = "NICE" if self.coupling == "additive" else "Real NVP"
        if self.adversarial:
            likelihood = "+ML" if self.adversarial.likelihood_weight else ""
            kind += f", {'GAN' if self.adversarial.assignment == 'single' else 'PGAN'}{likelihood}"
        return kind if self.n_components == 1 else f"MixFlow ({kind}), T={self.n_components}"

    def check_training(self, training: TrainingSettings, lanes: int) -> None:
        if self.adversarial:
            self.adversarial.check_training(training, lanes)

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        shape, base = tuple(manifest.shape), manifest.base
        n = min(manifest.n_samples(TRAIN_SPLIT), initialisation.max_samples)
        if n < self.n_components:
            raise UserError(
                f"a mixture of {self.n_components} components cannot start from {n} samples: lower "
                "model.n_components, or give more samples"
            )
        if initialisation.method == "k-subspaces" or initialisation.noise_prior_count or initialisation.n_starts > 1:
            raise UserError(
                "a flow starts once, from K-means or random samples, without a noise prior: leave "
                "initialisation.n_starts and noise_prior_count out and set initialisation.method=kmeans or random"
            )
        if self.network == "conv" and (len(shape) not in (2, 3) or shape[0] % 2 or shape[1] % 2):
            raise UserError(
                f"{base}: samples of shape {list(shape)} are no images of even height and width: set model.network=mlp"
            )
        if self.logit is not None and manifest.levels is None:
            raise UserError(f"{base}: real numbers have no logit, which is for pixels: set model.logit=null")
        if math.prod(shape) == 1 and self.affine == "none":
            raise UserError(f"{base}: a single feature has no partner to be coupled with: set model.affine=diagonal")
        if self.pretrain_steps and self.n_components > 1 and not manifest.has_labels:
            raise UserError(f"{base}: the samples have no labels to pre-train by: set model.pretrain_steps=0")

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.flow import Flow

        options = self.model_dump(exclude={"family", "pretrain_steps", "adversarial"})
        return Flow(manifest.shape, n_train=manifest.n_samples(TRAIN_SPLIT), **options)

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initial_rows
        from trainer.initialise_flow import initialise_flow

        if self.affine != "none":
            initialise_flow(model, initial_rows(manifest, training, initialisation), initialisation, seed=training.seed)

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        from trainer.objectives.likelihood import PretrainedLikelihood
        from trainer.players import make_player

        player = make_player(model, training.optimiser, training.steps)
        n_train = manifest.n_samples(TRAIN_SPLIT)
        likelihood = PretrainedLikelihood(player, n_train, self.n_components, self.pretrain_steps)
        if self.adversarial is None:
            return likelihood
        return self.adversarial.objective(model, manifest, training, likelihood, self.pretrain_steps)
