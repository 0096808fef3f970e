"""Mixtures of factor analysers: by gradients or EM, from clusters of the data, splittable into a hierarchy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.errors import UserError
from trainer.settings import TRAIN_SPLIT, FamilySettings, InitialisationSettings, TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest
    from trainer.objectives import Objective


class MFASettings(FamilySettings):
    """A mixture of factor analysers (of the root, where it is split)."""

    noun: ClassVar[str] = "root mixture"
    loss: ClassVar[str] = "negative log-posterior"
    methods: ClassVar[tuple[str, ...]] = ("sgd", "em")
    sections: ClassVar[tuple[str, ...]] = ("initialisation", "hierarchy", "evaluation")
    dequantises: ClassVar[bool] = True

    family: Literal["mfa"] = Field("mfa", description="model family; one file in trainer/models each")
    n_components: int = Field(10, ge=1, description="number of mixture components (of the root, where it is split)")
    n_factors: int = Field(6, ge=0, description="number of factors per component")
    noise_floor: float = Field(1e-5, gt=0, description="smallest noise variance, in squared units of the data")
    noise: Literal["diagonal", "isotropic"] = Field(
        "diagonal", description="noise variances: one per feature (MFA), or one per component (MPPCA)"
    )

    @property
    def label(self) -> str:
        return f"root MFA, K={self.n_components}"

    def check(self, manifest: Manifest, initialisation: InitialisationSettings) -> None:
        n = min(manifest.n_samples(TRAIN_SPLIT), initialisation.max_samples)
        if n < self.n_components:
            raise UserError(
                f"a mixture of {self.n_components} components cannot start from {n} samples: lower "
                "model.n_components, or give more samples"
            )

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.mfa import MFA

        return MFA(self.n_components, math.prod(manifest.shape), self.n_factors, self.noise_floor, self.noise)

    def initialise(
        self, model: Any, manifest: Manifest, training: TrainingSettings, initialisation: InitialisationSettings
    ) -> None:
        from trainer.initialise import initial_rows, initialise_mfa

        rows = initial_rows(manifest, training, initialisation)
        initialise_mfa(model, rows, initialisation, seed=training.seed, shape=tuple(manifest.shape))

    def objective(self, model: Any, manifest: Manifest, training: TrainingSettings) -> Objective:
        from trainer.fit import maximum_likelihood

        return maximum_likelihood(model, manifest, training)
