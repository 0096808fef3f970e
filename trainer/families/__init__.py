"""The model families: a recipe's `model` is one of them, told apart by its field `family`.

A new family is a model in trainer/models, an objective in trainer/objectives, its settings here, and a line below.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Discriminator, Tag

from trainer.families.autoencoder import AutoencoderSettings
from trainer.families.classifier import ClassifierSettings
from trainer.families.flow import FlowSettings
from trainer.families.gan import GANSettings
from trainer.families.latent_mixture import LatentMixtureSettings
from trainer.families.mfa import MFASettings
from trainer.families.pix2pix import Pix2PixSettings
from trainer.families.responsibility import ResponsibilitySettings
from trainer.settings import FamilySettings


def _family(value: Any) -> str:
    """The family that a recipe or an object names; a recipe that names none is of a mixture."""
    return str(value.get("family", "mfa") if isinstance(value, dict) else getattr(value, "family", "mfa"))


ModelSettings = Annotated[
    Annotated[MFASettings, Tag("mfa")]
    | Annotated[ClassifierSettings, Tag("classifier")]
    | Annotated[FlowSettings, Tag("flow")]
    | Annotated[GANSettings, Tag("gan")]
    | Annotated[LatentMixtureSettings, Tag("latent_mixture")]
    | Annotated[Pix2PixSettings, Tag("pix2pix")]
    | Annotated[ResponsibilitySettings, Tag("responsibility")]
    | Annotated[AutoencoderSettings, Tag("autoencoder")],
    Discriminator(_family, custom_error_type="unknown_family", custom_error_message="unknown family"),
]

FAMILIES: dict[str, type[FamilySettings]] = {
    get_args(choice)[1].tag: get_args(choice)[0] for choice in get_args(get_args(ModelSettings)[0])
}
