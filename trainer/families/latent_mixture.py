"""Generators whose noise is a mixture of Gaussians, without a classifier: trained as other generators are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.families.gan import GANSettings

if TYPE_CHECKING:
    from torch import nn

    from data.manifest import Manifest


class LatentMixtureSettings(GANSettings):
    """A generator of a latent mixture with equal weights: DeLiGAN, where means and deviations are learnt."""

    # A family's name is its own, and no kind of its parent's.
    family: Literal["latent_mixture"] = Field(  # type: ignore[assignment]
        "latent_mixture", description="model family; one file in trainer/models each"
    )
    n_components: int = Field(10, ge=1, description="Gaussians of the noise")
    spread: float = Field(1.0, ge=0, description="standard deviation of the Gaussians' means at the start")
    prior: Literal["learnt", "unit", "fixed"] = Field(
        "learnt", description="learns means and deviations; unit: means alone, deviations one; fixed: nothing"
    )

    sections: ClassVar[tuple[str, ...]] = ("evaluation",)

    @property
    def label(self) -> str:
        kind = "latent mixture" if self.prior == "fixed" else "DeLiGAN"
        return f"{kind}, K={self.n_components}"

    def build(self, manifest: Manifest) -> nn.Module:
        from trainer.models.latent_mixture import LatentMixture

        return LatentMixture(
            manifest.shape,
            self.n_components,
            *(self.n_latent, self.n_hidden, self.n_layers, self.width),
            bounded=manifest.levels is not None,
            spread=self.spread,
            prior=self.prior,
        )
